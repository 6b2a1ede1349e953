"""Certificates: modules that would be wrong when merged are served alone, and correctly; what is
right is merged.

Each denoiser does one thing that breaks, or only seems to break, when the rows of other jobs join.
Every test compares the jobs' results with those of plain calls, and looks at the certificate.
"""

from __future__ import annotations

import logging
import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from stepweave import StepEngine
from stepweave.certification import certificates as certify
from stepweave.certification import proof
from stepweave.memory import row_limits
from tests.support.comparing import state_of
from tests.support.toy import (
    SECONDS,
    STEPS,
    WIDTH,
    Arguments,
    Call,
    Forward,
    Outside,
    Served,
    Toy,
    Unseeded,
    call,
    fresh,
    honest,
    module,
    others,
    serve,
    submit_together,
)

Tensor = torch.Tensor


pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What certificates had to say."""
    return [one.getMessage() for one in caplog.records if one.name == certify.__name__]


def constant(**arguments: Any) -> Arguments:
    """The same arguments at every step, the very same objects."""
    return lambda step: arguments


# What is right is merged


def each_row(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x)


def test_an_honest_module_is_certified_by_one_proof_and_audited_soon_and_merged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = serve(each_row, others())
    served.check()
    assert served.state == "certified"
    assert served.certificate["largest_error"] < 1e-6
    assert served.stats.proofs == served.certificate["proofs"] == 5, (
        "a proof, audits of 1, 2 and 4, a look at 2 rows"
    )
    assert served.merged_share > 0.85
    assert max(served.by_rows) == 4
    assert refusals(caplog) == []


def test_jobs_of_one_and_of_several_rows_share_forwards() -> None:
    served = serve(each_row, [call(seed, rows=1 + seed % 3) for seed in range(6)])
    served.check()
    assert served.state == "certified"
    assert max(served.by_rows) == 12


# (a), (b) Rows that are not apart


def mixes_rows(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x) + x.mean(0, keepdim=True)


def mixes_a_hundredth(self: nn.Module, x: Tensor) -> Tensor:
    return 0.99 * honest(x) + 0.01 * honest(x).mean(0, keepdim=True)


def rolls_rows(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x).roll(1, 0)


def sorts_rows(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x)[x[:, 0].argsort()]


def normalises_over_the_batch(self: nn.Module, x: Tensor) -> Tensor:
    return honest((x - x.mean(0)) / (x.std(0, unbiased=False) + 0.5))


def scales_by_the_largest(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x / x.abs().max())


def counts_rows(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x) / len(x)


every_mixer = pytest.mark.parametrize(
    "forward",
    [
        mixes_rows,
        mixes_a_hundredth,
        rolls_rows,
        sorts_rows,
        normalises_over_the_batch,
        scales_by_the_largest,
        counts_rows,
    ],
)


@pytest.mark.parametrize("rows", [1, 2])
@every_mixer
def test_a_module_whose_rows_are_not_apart_runs_alone(
    forward: Forward, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(forward, others(rows=rows))
    served.check_alone()
    [line] = refusals(caplog)
    assert "denoiser 3 float32 runs alone: merged and alone differ" in line
    assert served.certificate["reason"] in line
    assert served.stats.proofs == 1, "one failed proof is enough"


@every_mixer
def test_it_would_be_wrong_if_nothing_were_certified(
    forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the tests of this module can fail."""
    monkeypatch.setattr(
        certify.Certificates, "decide", lambda self, calls: (certify.Verdict.MERGE, list(calls))
    )
    assert serve(forward, others(rows=2)).wrong()


@every_mixer
def test_it_would_be_wrong_if_every_proof_passed(
    forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (certify, proof):
        monkeypatch.setattr(where, "compare", lambda pairs, rows=(): 0.0)
    monkeypatch.setattr(certify, "told_apart", lambda merged, single: True)
    assert serve(forward, others(rows=2)).wrong()


def test_a_module_in_training_mode_runs_alone_and_leaves_no_certificate() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return honest(x) + (x.mean(0) if self.training else 0)

    pipeline, plain = Toy(module(forward).train()), Toy(module(forward).train())
    with StepEngine(pipeline) as engine:
        results = [
            job.result(SECONDS) for job in submit_together(engine, [fresh(one) for one in others()])
        ]
    served = Served(results, [plain(**fresh(one)) for one in others()], engine.stats())
    served.check(exact=True)
    assert served.merged_share == 0
    assert len(served.stats.certificates) <= 1


# (c) Captions of different length


def captions(
    lengths: Sequence[int], *, mask: bool = False, scale: float = 1.0, rows: int = 1
) -> list[Call]:
    """Calls with captions of these lengths, with a mask of ones or with none."""
    calls = []
    for seed, length in enumerate(lengths):
        caption = scale * (
            1 + torch.rand(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))
        )
        masks = (
            {"encoder_hidden_states_mask": torch.ones(rows, length, dtype=torch.int64)}
            if mask
            else {}
        )
        calls.append(call(seed, constant(encoder_hidden_states=caption, **masks), rows=rows))
    return calls


def ignores_the_mask(
    self: nn.Module,
    x: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
) -> Tensor:
    return honest(x + encoder_hidden_states.mean(1))


def honours_the_mask(
    self: nn.Module,
    x: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
) -> Tensor:
    mask = encoder_hidden_states_mask
    if mask is None:
        mask = torch.ones(encoder_hidden_states.shape[:2])
    return honest(x + (encoder_hidden_states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def takes_no_mask(self: nn.Module, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    return honest(x + encoder_hidden_states.mean(1))


with_and_without_mask = pytest.mark.parametrize("mask", [False, True])


@with_and_without_mask
def test_captions_are_padded_where_the_module_honours_the_mask(mask: bool) -> None:
    served = serve(honours_the_mask, captions([3, 9, 5, 3], mask=mask))
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.7
    assert max(served.by_rows) == 4


@with_and_without_mask
def test_captions_of_different_length_are_kept_apart_where_the_module_ignores_the_mask(
    mask: bool, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(ignores_the_mask, captions([3, 9, 3, 9, 5], mask=mask))
    served.check()
    assert served.state == "certified"
    assert 0 < served.merged_share < 0.8, "equal lengths are still merged"
    assert set(served.by_rows) == {1, 2}
    [line] = refusals(caplog)
    assert "calls of different sizes are not merged" in line


def test_they_would_be_wrong_if_every_comparison_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "compare", lambda pairs, rows=(): 0.0)
    monkeypatch.setattr(certify, "told_apart", lambda merged, single: True)
    assert serve(ignores_the_mask, captions([3, 9, 3, 9, 5])).wrong()


def test_captions_without_a_mask_are_never_padded() -> None:
    served = serve(takes_no_mask, captions([3, 9, 3, 9]))
    served.check()
    assert served.state == "certified"
    assert set(served.by_rows) == {1, 2}


def test_a_mask_with_holes_is_kept() -> None:
    calls = captions([4, 7, 4], mask=True, rows=2)
    for one in calls:
        one["arguments"](0)["encoder_hidden_states_mask"][0, 1] = 0
    served = serve(honours_the_mask, calls)
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.5


def test_a_small_difference_in_length_does_not_prove_a_large_one() -> None:
    """Padding 200 tokens to 201 dilutes a caption by half a percent, padding 2 to 200 by 99 %."""
    near, far = captions([200, 201], scale=2e-4), captions([2, 200], scale=2e-4)
    served = serve(ignores_the_mask, near, far)
    served.check()


def test_lengths_further_apart_than_was_tried_are_kept_apart_and_cost_no_certificate() -> None:
    """The oldest of a group may be of middling length: the others are close enough to it, and not
    to each other."""
    served = serve(
        bears_little_padding,
        captions([100, 90]),
        # each within a tenth of the first, the second and third a fifth apart
        captions([95, 86, 106, 95]),
        captions([95, 95]),
    )
    served.check()
    assert served.state == "certified"
    assert served.stats.proofs <= 10, "of which audits are most"
    assert served.merged_share > 0.4


def bears_little_padding(
    self: nn.Module,
    x: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
) -> Tensor:
    y = honours_the_mask(self, x, encoder_hidden_states, encoder_hidden_states_mask)
    mask = encoder_hidden_states_mask
    return y if mask is None else y + 0.1 * (mask.float().mean(1, keepdim=True) < 0.85)


# (d) Random numbers


def draws_from_the_default_generator(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x) + torch.randn(x.shape)


def drops_out(self: nn.Module, x: Tensor) -> Tensor:
    # so many that no two draws are the same by chance
    kept = torch.dropout(torch.ones(len(x), 64), 0.5, train=True)
    return honest(x) * kept.mean(1, keepdim=True)


@pytest.mark.parametrize("forward", [draws_from_the_default_generator, drops_out])
def test_a_module_that_draws_from_the_default_generator_runs_alone(
    forward: Forward, caplog: pytest.LogCaptureFixture
) -> None:
    with StepEngine(Unseeded(module(forward))) as engine:
        jobs = submit_together(engine, [{}] * 4)
        results = [job.result(SECONDS) for job in jobs]
    plain = Unseeded(module(forward))
    expected = []
    with torch.random.fork_rng(devices=[]):
        for job in jobs:
            torch.default_generator.manual_seed(job.seed)
            expected.append(plain())
    Served(results, expected, engine.stats()).check_alone()
    assert len(refusals(caplog)) == 1


def test_a_job_draws_the_same_numbers_whoever_is_submitted_meanwhile() -> None:
    """Seeds of later jobs must not come from the default generator while a job's own stands in its
    place."""
    running, go_on = threading.Event(), threading.Event()

    def wait(step: int) -> dict[str, Any]:
        running.set()
        assert go_on.wait(SECONDS)
        return {}

    with StepEngine(Unseeded(module(draws_from_the_default_generator))) as engine:
        first = engine.submit(wait)
        assert running.wait(SECONDS)
        late = engine.submit()
        go_on.set()
        results = [first.result(SECONDS), late.result(SECONDS)]
    plain = Unseeded(module(draws_from_the_default_generator))
    with torch.random.fork_rng(devices=[]):
        for job, result in zip([first, late], results, strict=True):
            torch.default_generator.manual_seed(job.seed)
            assert torch.equal(plain(), result)


def draws_from_an_argument(self: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    return honest(x) + torch.randn(x.shape, generator=generator)


def draws_and_raises(self: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    y = honest(x) + torch.randn(x.shape, generator=generator)
    if len(x) > 1:
        raise ValueError("one at a time")
    return y


def draws_and_runs_out_of_memory(self: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    y = honest(x) + torch.randn(x.shape, generator=generator)
    if len(x) > 1:
        raise torch.OutOfMemoryError
    return y


def draws_from_a_list(self: nn.Module, x: Tensor, generator: list[torch.Generator]) -> Tensor:
    return honest(x) + torch.randn(x.shape, generator=generator[0])


@pytest.mark.parametrize(
    "forward",
    [draws_from_an_argument, draws_from_a_list, draws_and_raises, draws_and_runs_out_of_memory],
)
def test_a_module_that_draws_from_a_jobs_generator_runs_alone(forward: Forward) -> None:
    def own(seed: int) -> Any:
        generator = torch.Generator().manual_seed(100 + seed)
        return [generator] if forward is draws_from_a_list else generator

    def anew() -> list[list[Call]]:
        return [[call(seed, constant(generator=own(seed))) for seed in range(4)]]

    served = serve(forward, anew=anew)
    served.check(exact=True)
    assert served.merged_share == 0
    assert all(one["state"] != "certified" for one in served.stats.certificates)


# (e), (l) Arguments of which only the first row counts, and arguments without rows


def uses_the_first_ids(self: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return honest(x + ids[0])


def uses_every_id(self: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return honest(x + ids)


def parting(same: int, rows: int = 1) -> list[Call]:
    """Calls whose ids are equal for some steps, and then differ."""

    def of_job(seed: int) -> Arguments:
        return lambda step: {
            "ids": torch.full((rows, WIDTH), 0.1 * (seed + 1 if step >= same else 1))
        }

    return [call(seed, of_job(seed), rows=rows) for seed in range(4)]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("same", [0, 3])
def test_an_argument_of_which_the_first_row_counts_must_be_equal(
    same: int, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(uses_the_first_ids, parting(same, rows))
    served.check()
    if same:
        assert served.state == "certified", "what is equal goes on being merged"
        assert served.merged_share >= 0.3
        [entry] = served.stats.unshared
        assert entry["reason"] == "must_be_equal"
        assert "only where equal: ids" in entry["detail"]
    else:
        assert served.state == "failed"


def test_an_argument_that_comes_to_differ_is_proven_then_and_merged() -> None:
    served = serve(uses_every_id, parting(3))
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.7


def test_a_row_given_for_all_rows_of_a_job_is_given_to_each() -> None:
    calls = [
        call(seed, constant(ids=torch.full((1, WIDTH), 0.1 * seed)), rows=2) for seed in range(4)
    ]
    served = serve(uses_every_id, calls)
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.7


def uses_the_time(self: nn.Module, x: Tensor, timestep: Any) -> Tensor:
    return honest(x + torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1) / 1000)


def uses_the_first_time(self: nn.Module, x: Tensor, timestep: Any) -> Tensor:
    return honest(x + torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)[0] / 1000)


def branches_on_the_time(self: nn.Module, x: Tensor, timestep: Any) -> Tensor:
    return honest(x) if timestep > 500 else -honest(x)


TIMES: dict[str, Callable[[float], Any]] = {
    "0-d tensor": torch.tensor,
    "0-d tensor of whole numbers": lambda time: torch.tensor(int(time)),
    "tensor": lambda time: torch.tensor([time]),
    "float": float,
    "int": int,
}


def times(
    make: Callable[[float], Any], *, same: int = 0, count: int = 4, rows: int = 1
) -> list[Call]:
    """Calls at times of their own, after so many steps at which all are at the same."""

    def of_job(seed: int) -> Arguments:
        return lambda step: {
            "timestep": make(900.0 - 10 * step - (150 * seed if step >= same else 0))
        }

    return [call(seed, of_job(seed), rows=rows) for seed in range(count)]


every_time = pytest.mark.parametrize("make", TIMES.values(), ids=TIMES)


@pytest.mark.parametrize("rows", [1, 2])
@every_time
def test_jobs_at_different_times_are_merged(make: Callable[[float], Any], rows: int) -> None:
    served = serve(uses_the_time, times(make, rows=rows))
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.7
    assert max(served.by_rows) == 4 * rows


@pytest.mark.parametrize("same", [0, 3, STEPS])
@every_time
def test_a_module_that_takes_one_time_for_all_rows_gets_no_other(
    make: Callable[[float], Any], same: int
) -> None:
    """As long as all jobs are at the same step nothing is wrong with it; then some join that are
    not."""
    served = serve(uses_the_first_time, times(make, same=same), times(make))
    served.check()
    assert served.state == ("certified" if same else "failed")


@every_time
def test_a_module_that_branches_on_the_time_is_served_right(make: Callable[[float], Any]) -> None:
    serve(branches_on_the_time, times(make, count=6)).check()


def rotates(self: nn.Module, x: Tensor, tables: Any) -> Tensor:
    """Rotary tables of (positions, WIDTH), without a dimension for rows."""
    cosine, sine = tables
    return honest(x * cosine.sum(0) + x.flip(1) * sine.sum(0))


def tables(kind: type, numbers: Sequence[float], positions: int = 5, rows: int = 1) -> list[Call]:
    calls = []
    for seed, number in enumerate(numbers):
        table = torch.arange(positions * WIDTH).reshape(positions, WIDTH) * number / 10
        calls.append(call(seed, constant(tables=kind((table.cos(), table.sin()))), rows=rows))
    return calls


@pytest.mark.parametrize("kind", [tuple, list])
def test_tables_without_rows_are_shared_where_they_are_equal(kind: type) -> None:
    equal = serve(rotates, tables(kind, [1, 1, 1, 1]))
    equal.check()
    assert equal.state == "certified"
    assert equal.merged_share > 0.7
    unequal = serve(rotates, tables(kind, [1, 2, 3, 4]))
    unequal.check(exact=True)
    assert unequal.merged_share == 0
    both = serve(rotates, tables(kind, [1, 2, 1, 2]))
    both.check()
    assert both.state == "certified"
    assert set(both.by_rows) == {1, 2}


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("kind", [tuple, list])
def test_tables_with_as_many_positions_as_rows_do_no_harm(kind: type, rows: int) -> None:
    serve(rotates, tables(kind, [1, 2, 1, 2], rows, rows)).check()


def scales_by_a_list(self: nn.Module, x: Tensor, scales: list[Any]) -> Tensor:
    """A number for each row."""
    return honest(x) * torch.tensor([float(one) for one in scales]).reshape(-1, 1)


def lists(*entries: Sequence[Any]) -> list[Call]:
    return [
        call(seed, constant(scales=list(own)), rows=len(own)) for seed, own in enumerate(entries)
    ]


class Scale:
    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return float(self.value)


ENTRIES: dict[str, tuple[Any, Any]] = {
    "float": (1.0, 2.0),
    "int": (1, 2),
    "str": ("1", "2"),
    "object": (Scale(1), Scale(2)),
}


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_a_list_with_an_entry_for_each_row(entries: tuple[Any, Any]) -> None:
    one, two = entries
    equal, unequal, mixed = [
        lists([one, one]) * 3,
        lists([one, two]) * 3,
        lists([one, two], [two, one], [one, one]),
    ]
    calls = [
        [own | {"generator": seed} for seed, own in enumerate(calls)]
        for calls in (equal, unequal, mixed)
    ]
    served = serve(scales_by_a_list, calls[0])
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.6
    serve(scales_by_a_list, calls[1]).check()
    serve(scales_by_a_list, *calls).check()


def takes_a_caption_for_each_row(self: nn.Module, x: Tensor, captions: list[Tensor]) -> Tensor:
    return honest(x + torch.stack([caption.mean(0) for caption in captions]))


def test_a_list_with_a_tensor_of_any_length_for_each_row_is_joined() -> None:
    def own(seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        return constant(
            captions=[torch.rand(3 + seed + row, WIDTH, generator=generator) for row in range(2)]
        )

    served = serve(
        takes_a_caption_for_each_row, [call(seed, own(seed), rows=2) for seed in range(4)]
    )
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.7


def skips_layers(self: nn.Module, x: Tensor, layers: list[Any]) -> Tensor:
    """Takes a setting that has nothing to do with rows, and yet may have as many entries."""
    return (
        honest(x) * sum(sum(one) if isinstance(one, (list, tuple)) else one for one in layers) / 10
    )


@pytest.mark.parametrize(
    "layers", [[7, 8], [[1, 2], [3, 4]], [(1,), (2, 3)], [1.5, 2.5], [7, 8, 9], [7]]
)
def test_a_list_of_settings_with_as_many_entries_as_rows_is_merged(layers: list[Any]) -> None:
    served = serve(skips_layers, [call(seed, constant(layers=layers), rows=2) for seed in range(4)])
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.7


def adds_pairs(self: nn.Module, x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return honest(x + sum(one * other for one, other in pairs))


def test_a_list_of_pairs_of_tensors_with_as_many_entries_as_rows_is_merged() -> None:
    def own(seed: int) -> Arguments:
        return constant(
            pairs=[
                (torch.full((2, WIDTH), 0.1 * seed), torch.full((2, WIDTH), 0.3)) for _ in range(2)
            ]
        )

    served = serve(adds_pairs, [call(seed, own(seed), rows=2) for seed in range(4)])
    served.check()
    assert served.state == "certified"


def takes_guidance_late(self: nn.Module, x: Tensor, guidance: Tensor, timestep: Tensor) -> Tensor:
    """Takes guidance into account in the last half only, and then that of the first row for all."""
    return torch.where(timestep[:, None] < 500, honest(x + guidance[0]), honest(x))


def test_an_argument_that_has_no_effect_in_the_first_calls_is_not_taken_for_proven() -> None:
    """A proof tries it where another argument is far from what it was."""

    def own(seed: int) -> Arguments:
        return lambda step: {
            "guidance": torch.tensor([0.5 * seed]),
            "timestep": torch.tensor([900.0 - 150 * step]),
        }

    served = serve(takes_guidance_late, [call(seed, own(seed)) for seed in range(4)])
    served.check(exact=True)
    assert served.state == "certified"
    assert served.merged_share == 0
    assert ["guidance" in one["detail"] for one in served.stats.unshared] == [True]


def test_values_that_hardly_differ_prove_nothing_of_others() -> None:
    """Two jobs at neighbouring times, of which the first one's does for both; then two that are far
    apart."""

    def at(*numbers: float) -> list[Call]:
        return [
            call(seed, constant(timestep=torch.tensor([number])))
            for seed, number in enumerate(numbers)
        ]

    served = serve(uses_the_first_time, at(900.0, 900.01), at(900.0, 100.0))
    served.check(exact=True)
    assert ["timestep" in one["detail"] for one in served.stats.unshared] == [True]


# (f), (g) Modules that are right until they are not


@pytest.mark.parametrize("jobs", [9, 12])
def test_a_module_that_is_wrong_from_nine_rows_on_is_found_before_it_serves_nine(
    jobs: int, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return honest(x) + (len(x) > 8)

    served = serve(forward, others(2), others(jobs))
    served.check()
    assert served.state == "failed"
    assert served.certificate["rows"] == 0, "nothing is believed any more"
    assert max(served.by_rows) == 2
    assert len(refusals(caplog)) == 1


def test_a_proof_covers_four_times_its_rows() -> None:
    served = serve(each_row, others(2), others(8), others(9), others(32))
    served.check()
    assert served.state == "certified"
    assert served.certificate["rows"] == 32, "what a look covered"


@pytest.mark.parametrize("wrong", [5, 6, 7])
def test_a_number_of_rows_that_was_never_merged_is_looked_at(wrong: int) -> None:
    """As of a module that takes its rows in threes where it can."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return honest(x) + (len(x) == wrong)

    served = serve(forward, others(4), *[others(4)] * 4, others(wrong))
    served.check()
    assert served.merged_share > 0.5


def uses_time_and_weights(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
    self.outside.forwards += 1
    return honest(x + torch.sin(timestep[:, None] / 300).to(x.dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_proofs_and_audits_take_at_most_a_fiftieth_of_the_forwards(dtype: torch.dtype) -> None:
    """Of 3,000 after a warm-up, single calls of proofs and audits counted one by one."""

    def at(seed: int, steps: int) -> Call:
        return call(
            seed,
            lambda step: {"timestep": torch.tensor([999.0 - 999 * step / steps])},
            steps=steps,
            dtype=dtype,
        )

    denoiser = module(uses_time_and_weights)
    denoiser.outside = outside = Outside(forwards=0)
    with StepEngine(Toy(denoiser), knee=False) as engine:
        run_all(engine, [at(seed, 10 + seed) for seed in range(4)])
        run_before, checks_before = outside.forwards, engine.stats().checks
        while outside.forwards - run_before < 3000:
            run_all(engine, [at(seed, 100 + 20 * seed) for seed in range(8)])
        stats = engine.stats()
    share = (stats.checks - checks_before) / (outside.forwards - run_before)
    assert 0 < share <= 0.02
    assert stats.forwards["denoiser"].merged_share > 0.9
    used = sum(stats.forwards["denoiser"].by_rows.values())
    assert outside.forwards - used <= stats.checks + 2, (
        "forwards that are neither used nor counted as checks"
    )


class Turncoat(Outside):
    """A denoiser that goes wrong, in merged forwards only, once it is told to."""

    def __init__(self) -> None:
        super().__init__(wrong=False, served_wrong=0)

    def module(self) -> nn.Module:
        def forward(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = honest(x) if residual is None else honest(x + residual)
            wrong = self.wrong and len(x) > 1
            self.served_wrong += wrong
            return y + 0.1 if wrong else y

        return module(forward)


def run_all(engine: StepEngine, calls: Sequence[Call]) -> list[Any]:
    return [job.result(SECONDS) for job in submit_together(engine, [fresh(one) for one in calls])]


@pytest.mark.parametrize("audit_every", [1, 2, 5])
def test_an_audit_finds_a_module_that_goes_wrong_later(
    audit_every: int, caplog: pytest.LogCaptureFixture
) -> None:
    turncoat = Turncoat()
    with StepEngine(Toy(turncoat.module()), audit_every=audit_every) as engine:
        results = run_all(engine, others())
        turncoat.wrong = True
        run_all(engine, others())
        results += run_all(engine, others())
    plain = Toy(module(each_row))
    served = Served(
        results, [plain(**fresh(one)) for one in [*others(), *others()]], engine.stats()
    )
    served.check()
    assert served.state == "failed"
    assert turncoat.served_wrong <= audit_every + 2, (
        "those between two audits, the audit, and copies of its calls"
    )
    assert len(refusals(caplog)) == 1


def test_with_every_forward_audited_nothing_is_ever_wrong() -> None:
    outside = Outside(merged=0)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        outside.merged += len(x) > 1
        return honest(x) + (0.1 if len(x) > 1 and outside.merged > 4 else 0)

    served = serve(forward, others(), others(), audit_every=1)
    served.check()
    assert served.state == "failed"
    assert served.certificate["merged_forwards"] <= 4


@pytest.mark.parametrize("name", ["control", "denoiser"])
def test_audits_reach_both_modules_of_a_pipeline_that_calls_two_in_turn(name: str) -> None:
    """As ControlNet and UNet are called. Every second merged forward, or every thousandth, is
    always the same one's."""
    turncoats = {"control": Turncoat(), "denoiser": Turncoat()}
    pipeline = Toy(turncoats["denoiser"].module(), turncoats["control"].module())
    with StepEngine(pipeline, audit_every=2) as engine:
        run_all(engine, others(steps=20))
        turncoats[name].wrong = True
        run_all(engine, others(steps=20))
    states = {one["call"]: one["state"] for one in engine.stats().certificates}
    assert states[name] == "failed"


# (h) Results that cannot be taken apart, and results that can


class Slotted:
    __slots__ = ("sample",)

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class Plain:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample
        self.kind = "plain"


@dataclass
class Output(BaseOutput):
    sample: Tensor
    extra: Any = None


Pair = namedtuple("Pair", "sample other")
Shape = Callable[[Tensor], Any]

INSEPARABLE: dict[str, Shape] = {
    "a 0-d tensor": lambda y: Plain(y.sum()),
    "rows summed": lambda y: y.sum(0, keepdim=True),
    "rows in the second dimension": lambda y: {"sample": y[0], "transposed": y.T.unsqueeze(0)},
    "slots": Slotted,
    "slots in a tuple": lambda y: (y, Slotted(y)),
    "a loss beside it": lambda y: {"sample": y, "loss": y.sum()},
    "an iterator beside it": lambda y: {"sample": y, "rest": iter([y])},
}
SEPARABLE: dict[str, Shape] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, 2 * y),
    "list of more tensors than there are rows": lambda y: [y] * 20,
    "list of a tensor for each row": lambda y: list(y.unbind()),
    "named tuple": lambda y: Pair(y, None),
    "dict": lambda y: {"sample": y, "scale": 2.0},
    "BaseOutput": lambda y: Output(sample=y),
    "BaseOutput with a tuple": lambda y: Output(sample=y, extra=(y, 2 * y)),
    "object": Plain,
    "whole numbers beside it": lambda y: {"sample": y, "codes": (y * 100).long()},
    "rows that share memory beside it": lambda y: {
        "sample": y,
        "zeros": torch.zeros(1, 2).expand(len(y), 2),
    },
}


def returns(shape: Shape) -> Forward:
    return lambda self, x: shape(honest(x))


@pytest.mark.parametrize("shape", INSEPARABLE.values(), ids=INSEPARABLE)
def test_a_result_that_cannot_be_taken_apart_keeps_calls_alone(shape: Shape) -> None:
    served = serve(returns(shape), others())
    served.check(exact=True)
    assert served.merged_share == 0
    assert served.state != "certified"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("shape", SEPARABLE.values(), ids=SEPARABLE)
def test_a_result_that_can_be_taken_apart_is_merged(shape: Shape, rows: int) -> None:
    served = serve(returns(shape), others(rows=rows))
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.8


class Listed(Toy):
    """Samples as a list with a tensor for each row, and predictions too, as in Z-Image."""

    @torch.no_grad()
    def __call__(
        self, *, generator: torch.Generator | None = None, gate: threading.Event | None = None
    ) -> Any:
        if gate is not None:
            return super().__call__(gate=gate)
        x = torch.randn(1, 4, WIDTH, generator=generator)
        for _ in self.progress_bar(range(STEPS)):
            x = 0.9 * x + 0.3 * torch.stack(self.denoiser(list(x.unbind())))
        return x


@pytest.mark.parametrize("jobs", range(2, 7))
def test_a_list_of_samples_is_never_taken_for_a_list_of_batches(jobs: int) -> None:
    """At four rows each of the samples, of four channels, looks like a tensor with all the rows."""

    def forward(self: nn.Module, x: list[Tensor]) -> list[Tensor]:
        return [honest(one) for one in x]

    def calls() -> list[Call]:
        return [{"generator": torch.Generator().manual_seed(seed)} for seed in range(jobs)]

    with StepEngine(Listed(module(forward))) as engine:
        for job in submit_together(engine, calls()[:2]):
            job.result(SECONDS)
        results = [job.result(SECONDS) for job in submit_together(engine, calls())]
    plain = Listed(module(forward))
    served = Served(results, [plain(**one) for one in calls()], engine.stats())
    served.check()
    assert served.state == "certified"
    assert max(served.by_rows) == jobs


# (i), (j) Errors


def test_a_module_that_raises_when_merged_runs_alone(caplog: pytest.LogCaptureFixture) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise ValueError("one at a time, please")
        return honest(x)

    served = serve(forward, others())
    served.check_alone()
    assert "ValueError: one at a time, please" in served.certificate["reason"]
    assert len(refusals(caplog)) == 1


def test_a_certified_module_that_raises_when_merged_is_run_alone_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outside = Outside(merged=0)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        outside.merged += len(x) > 1
        if len(x) > 1 and outside.merged > 20:
            raise ValueError("not any more")
        return honest(x)

    served = serve(forward, *[others(4)] * 6)
    served.check()
    assert served.state == "failed"
    assert served.stats.retried == 1
    assert set(served.stats.jobs) == {"succeeded"}
    assert len(refusals(caplog)) == 1


def raises_for_large_values(self: nn.Module, x: Tensor, value: Tensor) -> Tensor:
    if (value > 100).any():
        raise ValueError("value is too large")
    return honest(x + value)


@pytest.mark.parametrize("bad_from", [0, 3])
def test_a_job_that_fails_by_itself_takes_the_certificate_from_no_other(bad_from: int) -> None:
    def own(seed: int) -> Arguments:
        return lambda step: {
            "value": torch.tensor([[1000.0 if seed == 2 and step >= bad_from else 0.1 * seed]])
        }

    calls = [call(seed, own(seed), steps=8) for seed in range(4)]
    good = [0, 1, 3]
    with StepEngine(Toy(module(raises_for_large_values))) as engine:
        jobs = submit_together(engine, [fresh(one) for one in calls])
        with pytest.raises(ValueError, match="value is too large"):
            jobs[2].result(SECONDS)
        results = [jobs[i].result(SECONDS) for i in good]
    plain = Toy(module(raises_for_large_values))
    served = Served(results, [plain(**fresh(calls[i])) for i in good], engine.stats())
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.5


def test_jobs_that_fail_do_not_use_up_the_attempts() -> None:
    bad = [call(seed, constant(value=torch.tensor([[1000.0 + seed]]))) for seed in range(2)]
    good = [call(seed, constant(value=torch.tensor([[0.1 * seed]]))) for seed in range(4)]
    with StepEngine(Toy(module(raises_for_large_values))) as engine:
        for _ in range(certify.ATTEMPTS + 1):
            for job in submit_together(engine, [fresh(one) for one in bad]):
                with pytest.raises(ValueError, match="value is too large"):
                    job.result(SECONDS)
        results = run_all(engine, good)
    plain = Toy(module(raises_for_large_values))
    served = Served(results, [plain(**fresh(one)) for one in good], engine.stats())
    served.check()
    assert served.state == "certified"


def fits_four(self: nn.Module, x: Tensor) -> Tensor:
    if len(x) > 4:
        raise torch.OutOfMemoryError("no room for more than 4 rows")
    return honest(x)


@pytest.mark.parametrize("jobs", [5, 8, 12, 20])
def test_what_does_not_fit_into_memory_is_halved_and_no_job_is_lost(
    jobs: int, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(fits_four, others(jobs))
    served.check()
    assert served.state == "certified"
    assert served.stats.out_of_memory > 0
    assert max(served.by_rows) <= 4
    assert served.merged_share > 0.5
    assert refusals(caplog) == []


@pytest.mark.parametrize("rows", [1, 2])
def test_memory_that_runs_out_once_does_not_keep_calls_alone_for_good(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have taken it for a while."""
    monkeypatch.setattr(row_limits, "RECOVERY", 5)
    failed: list[nn.Module] = []

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > rows and not failed:
            failed.append(self)
            raise torch.OutOfMemoryError
        return honest(x)

    served = serve(forward, others(steps=60, rows=rows))
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.5


def test_a_module_with_no_room_for_two_rows_runs_alone() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise torch.OutOfMemoryError
        return honest(x)

    served = serve(forward, others())
    served.check_alone("pending")


# (k) Calls that cannot be told apart


def test_equal_jobs_prove_nothing() -> None:
    served = serve(each_row, *[[call(7, steps=1)] * 4] * 3)
    served.check_alone("pending")


def test_equal_jobs_do_not_keep_different_ones_from_being_proven() -> None:
    """A warm-up, or a load test that sends one request over and over, must not leave the kind alone
    for good."""
    served = serve(each_row, *[[call(7, steps=1)] * 2] * (2 * certify.ATTEMPTS), others())
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.1


def test_equal_jobs_are_merged_once_the_kind_is_certified() -> None:
    served = serve(each_row, others(2), [call(7)] * 4)
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.6


def test_results_that_never_differ_are_not_merged_and_not_proven_for_ever() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return torch.full_like(x, 0.5)

    served = serve(forward, others(steps=4 * certify.ATTEMPTS))
    served.check_alone("pending")
    assert "too alike" in served.certificate["reason"]
    assert served.stats.proofs <= 2 * certify.ATTEMPTS


# Arguments that are written to, and arguments that keep no version


def writes_to_its_sample(self: nn.Module, x: Tensor) -> Tensor:
    y = honest(x)
    x.mul_(0.5)
    return y


def writes_to_a_table(self: nn.Module, x: Tensor, given: Tensor) -> Tensor:
    y = honest(x + given.sum(0))
    given.mul_(0.9)
    return y


def writes_to_nested_tables(self: nn.Module, x: Tensor, given: dict[str, Any]) -> Tensor:
    cosine, sine = given["tables"]
    y = honest(x + cosine.sum(0) + sine.sum(0))
    sine.mul_(0.9)
    return y


def writes_to_a_caption(self: nn.Module, x: Tensor, given: list[Tensor]) -> Tensor:
    y = honest(x + torch.stack([caption.mean(0) for caption in given]))
    given[-1].mul_(0.9)
    return y


def table_of(seed: int) -> Tensor:
    return torch.full((5, WIDTH), 0.1)


WRITTEN: dict[str, tuple[Forward, Callable[[int], Any]]] = {
    "table": (writes_to_a_table, table_of),
    "nested tables": (
        writes_to_nested_tables,
        lambda seed: {"tables": (table_of(seed), table_of(seed))},
    ),
    "named tables": (
        writes_to_nested_tables,
        lambda seed: {"tables": Pair(table_of(seed), table_of(seed))},
    ),
    "captions": (writes_to_a_caption, lambda seed: [torch.full((2 + seed, WIDTH), 0.1 * seed)]),
}


def test_a_module_that_writes_to_its_sample_runs_alone() -> None:
    """The pipeline reads the sample after the call; a merged forward writes to a copy of it."""
    served = serve(writes_to_its_sample, others())
    served.check_alone()


@pytest.mark.parametrize(("forward", "make"), WRITTEN.values(), ids=WRITTEN)
def test_a_module_that_writes_to_another_argument_runs_alone(
    forward: Forward, make: Callable[[int], Any]
) -> None:
    """A proof, which runs it twice, must not leave its marks on what the calls were given."""

    def anew() -> list[list[Call]]:
        return [[call(seed, constant(given=make(seed))) for seed in range(4)]]

    served = serve(forward, anew=anew)
    served.check_alone()


def test_tensors_made_in_inference_mode_are_merged_without_errors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Embeddings that a caller computed beforehand: torch counts no version of such tensors."""
    with torch.inference_mode():
        ids = [torch.full((1, WIDTH), 0.1 * seed) for seed in range(4)]
        table = torch.full((5, WIDTH), 0.1)

    def forward(self: nn.Module, x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        return honest(x + ids + table.sum(0))

    served = serve(forward, [call(seed, constant(ids=ids[seed], table=table)) for seed in range(4)])
    served.check()
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []
    assert served.state == "certified"


class Encoder(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        return honest(input_ids.float())


class Overwriting(DiffusionPipeline):
    """Writes to the encoder's input once it has the result."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.register_modules(encoder=encoder)

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        given = torch.tensor([list(ids)])
        result = self.encoder(given).clone()
        given.zero_()
        return result


def test_what_an_encoder_gave_is_remembered_for_what_it_was_given() -> None:
    texts = [[1, 2, 3], [0, 0, 0], [1, 2, 3]]
    generator = torch.Generator()
    with StepEngine(Overwriting(Encoder().eval())) as engine:
        results = [engine.submit(ids=ids, generator=generator).result(SECONDS) for ids in texts]
    plain = Overwriting(Encoder().eval())
    Served(results, [plain(ids) for ids in texts], engine.stats()).check(exact=True)
    assert engine.stats().cache_hits == 1


# The record


def test_proofs_and_refusals_leave_no_trace_on_the_pipeline() -> None:
    pipeline = Toy(module(mixes_rows))
    before = state_of(pipeline)
    with StepEngine(pipeline) as engine:
        run_all(engine, others())
    assert state_of(pipeline) == before
    assert "forward" not in vars(pipeline.denoiser)
    assert not hasattr(pipeline.denoiser, "_diffusers_hook")


class Wide(Toy):
    """Samples of any width."""

    @torch.no_grad()
    def __call__(
        self,
        *,
        width: int = 0,
        generator: torch.Generator | None = None,
        gate: threading.Event | None = None,
    ) -> Any:
        if gate is not None:
            return super().__call__(gate=gate)
        x = torch.randn(1, width, generator=generator)
        for _ in self.progress_bar(range(STEPS)):
            x = 0.9 * x + 0.3 * self.denoiser(x)
        return x


def test_each_size_of_sample_has_a_certificate_of_its_own() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return honest(x) + (x.mean() if x.shape[1] == 5 else 0)

    def calls() -> list[Call]:
        return [
            {"width": 3 + 2 * (i % 2), "generator": torch.Generator().manual_seed(i)}
            for i in range(6)
        ]

    with StepEngine(Wide(module(forward))) as engine:
        results = [job.result(SECONDS) for job in submit_together(engine, calls())]
    plain = Wide(module(forward))
    served = Served(results, [plain(**one) for one in calls()], engine.stats())
    served.check()
    states = {one["sample"]: one["state"] for one in served.stats.certificates}
    assert states == {"3 float32": "certified", "5 float32": "failed"}


def takes_anything(
    self: nn.Module, x: Tensor, number: int = 0, weights: Tensor | None = None
) -> Tensor:
    return honest(x)


def test_certificates_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "KEPT", 8)
    served = serve(
        takes_anything, [call(seed, lambda step: {"number": step}, steps=20) for seed in range(3)]
    )
    served.check()
    assert len(served.stats.certificates) == 8


def test_calls_that_can_have_no_certificate_push_none_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "KEPT", 8)
    weights = nn.Parameter(torch.zeros(4, 4))  # gradients may be wanted
    served = serve(
        takes_anything,
        others(),
        [call(seed, constant(weights=weights), steps=20) for seed in range(4)],
    )
    served.check()
    assert [one["state"] for one in served.stats.certificates if one["merged_forwards"]] == [
        "certified"
    ]
