"""How far results of merged and of single calls may differ in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepweave import StepEngine
from stepweave.certification.compare import Differ, Pair, compare
from tests.support.tiny import FAMILIES, SIDE
from tests.support.waiting import SECONDS

TOKENS, CHANNELS, QUIET = 77, 64, 8
ROUNDING = 0.008  # noise of a text encoder of 12 layers in bfloat16, of its results' size
LEVELS = torch.ones(CHANNELS)
LEVELS[:QUIET] = 0.05


def results(number: int, size: float = 1.0) -> Tensor:
    """One row of tokens; the first channels are quiet."""
    drawn = torch.Generator().manual_seed(number)
    return size * LEVELS * torch.randn(1, TOKENS, CHANNELS, generator=drawn)


def compared(rounding: float = ROUNDING, leak: float = 0.0, by_count: float = 0.0) -> None:
    """Results of one call alone, among copies and among others. Channels add up numbers of each
    other, so the noise of all is the same. The first channel takes from other rows, and from their
    number."""
    alone = results(0)
    noise = rounding * torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    several = alone + noise
    several[..., 0] += by_count
    merged = several.clone()
    merged[..., 0] += leak * (results(2)[..., 0] - alone[..., 0])
    alone, several, merged = (item.to(torch.bfloat16) for item in (alone, several, merged))
    compare([Pair(merged, alone, lambda: [several])], [results(2).to(torch.bfloat16)])


def test_quiet_channels_may_have_the_noise_of_the_others() -> None:
    compared()


@pytest.mark.parametrize("leak", [0.5, 1.0])
def test_noise_hides_no_other_row_in_a_quiet_channel(leak: float) -> None:
    with pytest.raises(Differ):
        compared(leak=leak)


@pytest.mark.parametrize("by_count", [0.1, 1.0])
def test_noise_hides_no_dependence_on_the_number_of_rows_in_a_quiet_channel(
    by_count: float,
) -> None:
    with pytest.raises(Differ):
        compared(by_count=by_count)


def test_where_all_channels_are_noisy_nothing_can_be_said() -> None:
    with pytest.raises(Differ):
        compared(rounding=0.06)


def by_length(alike: bool, last_bits: float = 1.0, leak: float = 0.0) -> None:
    """Results alone and among copies are the same; merged, a share `last_bits` of the numbers
    differs in the last bit, as where sums are of another length, and rows leak into each other."""
    alone = (1 + torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    drawn = torch.rand(alone.shape, generator=torch.Generator().manual_seed(1))
    merged = torch.where(drawn < last_bits, alone + 2**-7, alone) + leak
    compare([Pair(merged, alone, lambda: [alone], alike=alike)], [alone + 0.5])


def test_calls_of_other_lengths_may_differ_in_last_bits() -> None:
    by_length(alike=False)
    by_length(alike=True, last_bits=0.0)
    with pytest.raises(Differ):
        by_length(alike=True)


def test_last_bits_hide_no_other_row() -> None:
    with pytest.raises(Differ):
        by_length(alike=False, leak=2**-6)


def embeddings(leak: float = 0.0, numbers: int = 48) -> None:
    """Embeddings of equal prompts in single precision: a number for each channel, some near zero,
    which adds up numbers of the others' size."""
    drawn = torch.Generator().manual_seed(3)
    alone = torch.randn(1, numbers, generator=drawn)
    alone[:, ::5] /= 50
    noise = 1e-7 * (0.5 + torch.rand(4, numbers, generator=drawn) / 2)
    noise[0, ::5] = 0  # by chance
    copies = [alone + row for row in noise]
    merged = alone + noise[1]
    merged[:, 0] += leak
    compare([Pair(merged, alone, lambda: copies, alike=True)])


def test_numbers_near_zero_may_have_the_roundings_of_the_others() -> None:
    embeddings()


@pytest.mark.parametrize("leak", [1e-5, 1e-3])
def test_roundings_hide_no_other_row_in_a_number_near_zero(leak: float) -> None:
    with pytest.raises(Differ):
        embeddings(leak)


@pytest.mark.full
def test_prompts_of_other_lengths_share_steps_in_bfloat16() -> None:
    """Attention with a mask rounds otherwise than without."""
    pipeline = FAMILIES["qwen_image"].build().to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    calls = [
        {
            "prompt": prompt,
            "negative_prompt": " ",
            "true_cfg_scale": 4.0,
            "num_inference_steps": 4,
            "height": SIDE,
            "width": SIDE,
            "generator": torch.Generator().manual_seed(seed),
        }
        for seed, prompt in enumerate(["a ring", "a large blue cross", "a star on red"] * 4)
    ]
    with StepEngine(pipeline) as engine:
        for job in [engine.submit(**call) for call in calls]:
            job.result(SECONDS)
        stats = engine.stats()
    kinds = [kind for kind in stats.certificates if kind["call"] == "transformer"]
    assert [kind["state"] for kind in kinds] == ["certified"]
    assert stats.forwards["transformer"].merged_share > 0.7
    assert max(stats.forwards["transformer"].by_rows) > 4
