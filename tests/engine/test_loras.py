"""Jobs that each name their own LoRAs, in shared forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stepweave import Loras, StepEngine
from stepweave.errors import EngineMisuseError, LoraError, LoraNotFoundError
from tests.support.loras import hooks_of, plain, save_lora, shapes
from tests.support.together import SECONDS, TOLERANCE, difference, numbers, submit_together

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Named = Sequence[tuple[str, float]]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EFFECT = 0.01  # of each adapter, on a pixel


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different ranks, for different layers; one is also of a text encoder."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        "rings": save_lora(
            folder / "rings.safetensors", shapes,
            {"transformer": ATTENTION, "text_encoder": ("q_proj", "v_proj")},
        ),
        "chalk": save_lora(
            folder / "chalk" / "pytorch_lora_weights.safetensors", shapes,
            {"transformer": ("to_q", "add_k_proj", "ff.net.0.proj")}, rank=8, seed=1, told=True,
        ),
    }  # fmt: skip


def request(seed: int) -> dict[str, Any]:
    return {
        "prompt": ["a red circle", "a blue star on a green background"][seed % 2],
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 4 + seed % 2,
        "guidance_scale": 2.0 if seed % 3 else 1.0,
        "max_sequence_length": 1,
        "output_type": "np",
    }


NAMED: list[Named] = [
    [],
    [("rings", 0.8)],
    [("chalk", 1.5)],
    [("rings", 0.3)],
    [("chalk", -0.5)],
    [("rings", 0.5), ("chalk", 0.7)],
    [("chalk", 0.7), ("rings", 0.5)],
    [],
]


@pytest.fixture(scope="module")
def wanted(files: dict[str, Path]) -> list[torch.Tensor]:
    """What plain calls with `set_adapters` give."""
    using = plain(shapes(), files)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests
    found = [numbers(using(lora)(**request(seed))) for seed, lora in enumerate(NAMED)]
    torch.set_num_threads(before)
    return found


@pytest.fixture
def engine(files: dict[str, Path]) -> Iterator[StepEngine]:
    pipeline = shapes()
    loras = Loras(pipeline, files["rings"].parent)
    with StepEngine(pipeline, loras=loras) as engine:
        yield engine


def requests() -> list[Callable[[], dict[str, Any]]]:
    return [
        lambda seed=seed, lora=lora: {**request(seed), "lora": lora}  # type: ignore[misc]
        for seed, lora in enumerate(NAMED)
    ]


def test_jobs_of_any_adapters_and_scales_share_forwards_and_are_right(
    engine: StepEngine, wanted: list[torch.Tensor]
) -> None:
    bare = shapes()
    for seed, (lora, expected) in enumerate(zip(NAMED, wanted, strict=True)):
        effect = difference(expected, numbers(bare(**request(seed))))
        assert effect > EFFECT if lora else effect == 0.0
    jobs = submit_together(engine, requests())
    results = [numbers(job.result(SECONDS)) for job in jobs]
    for result, expected in zip(results, wanted, strict=True):
        assert difference(result, expected) <= TOLERANCE
    stats = engine.stats()
    assert stats.forwards["transformer"].merged_share > 0.7
    assert stats.unshared == []


@pytest.mark.full
def test_a_reproducible_job_is_bitwise_the_plain_call_with_set_adapters(
    engine: StepEngine, wanted: list[torch.Tensor]
) -> None:
    jobs = submit_together(engine, requests(), reproducible=True)
    for job, expected in zip(jobs, wanted, strict=True):
        assert torch.equal(numbers(job.result(SECONDS)), expected)


def test_the_callers_pipeline_is_unchanged(files: dict[str, Path]) -> None:
    pipeline = shapes()
    expected = numbers(pipeline(**request(1)))
    with StepEngine(pipeline, loras=Loras(pipeline, files["rings"].parent)) as engine:
        jobs = submit_together(engine, requests()[:3])
        direct = numbers(pipeline(**request(1)))  # meanwhile
        for job in jobs:
            job.result(SECONDS)
        assert torch.equal(direct, expected)
        assert torch.equal(numbers(pipeline(**request(1))), expected)
        assert hooks_of(pipeline) != []
    assert hooks_of(pipeline) == []
    assert torch.equal(numbers(pipeline(**request(1))), expected)


@pytest.mark.full
def test_rows_without_an_adapter_are_bitwise_those_of_the_same_batch_without_any(
    files: dict[str, Path],
) -> None:
    """The same forward, with the rows of other jobs adapted or not; no knee, which would depend on
    how long forwards take, divides it."""
    results = []
    for lora in ([], [("chalk", 1.0)]):
        pipeline = shapes()
        loras = Loras(pipeline, files["rings"].parent)
        with StepEngine(pipeline, loras=loras, knee=False) as engine:
            # one of these rows has an adapter in both cases, so that the calls are of one kind
            for _ in range(2):
                jobs = submit_together(
                    engine,
                    [lambda: request(1), lambda: {**request(2), "lora": [("chalk", 0.5)]}],
                )
                [job.result(SECONDS) for job in jobs]
            jobs = submit_together(
                engine, [lambda: request(4), lambda lora=lora: {**request(5), "lora": lora}]
            )
            results.append(numbers(jobs[0].result(SECONDS)))
            assert engine.stats().forwards["transformer"].merged_share > 0.5
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "mode",
    ["off", *(pytest.param(mode, marks=pytest.mark.full) for mode in ("threads", "request"))],
)
def test_other_modes_give_the_same(
    mode: Any, files: dict[str, Path], wanted: list[torch.Tensor]
) -> None:
    pipeline = shapes()
    loras = Loras(pipeline, files["rings"].parent)
    with StepEngine(pipeline, mode, loras=loras) as engine:
        jobs = [engine.submit(**one()) for one in requests()]
        for job, expected in zip(jobs, wanted, strict=True):
            assert difference(numbers(job.result(SECONDS)), expected) <= TOLERANCE


@pytest.mark.full
def test_a_scale_among_the_arguments_for_attention_multiplies_the_adapters(
    engine: StepEngine, files: dict[str, Path]
) -> None:
    arguments = {**request(1), "joint_attention_kwargs": {"scale": 0.5}}
    expected = numbers(plain(shapes(), files)([("rings", 0.8)])(**arguments))
    arguments = {**request(1), "joint_attention_kwargs": {"scale": 0.5}}
    job = engine.submit(**arguments, lora=[("rings", 0.8)])
    assert difference(numbers(job.result(SECONDS)), expected) <= TOLERANCE


def test_what_a_job_cannot_name_is_told_at_once(engine: StepEngine) -> None:
    with pytest.raises(LoraNotFoundError, match=r"'ring' \(did you mean rings\?\)"):
        engine.submit(**request(1), lora=[("ring", 1.0)])
    with pytest.raises(LoraError, match="scale of the LoRA 'rings' is 11; it must be -10 to 10"):
        engine.submit(**request(1), lora=[("rings", 11.0)])
    with pytest.raises(LoraError, match="'rings' is named twice"):
        engine.submit(**request(1), lora=[("rings", 1.0), ("rings", 0.5)])
    with pytest.raises(LoraError, match="9 LoRAs; the limit is 8"):
        engine.submit(**request(1), lora=[(f"{i}", 1.0) for i in range(9)])


def test_adapters_have_their_price(files: dict[str, Path]) -> None:
    pipeline = shapes()
    with StepEngine(pipeline, loras=Loras(pipeline, files=files)) as engine:
        named: list[Named] = [
            [],
            [("rings", 1.0)],
            [("rings", 1.0), ("chalk", 0.5)],
            [("rings", 0.0)],
        ]
        for lora in named:
            engine.submit(**request(1), lora=lora).result(SECONDS)
        keys = [key for key in engine.curves() if key.module == "transformer"]
        assert sorted(key.adapters for key in keys) == [0, 1, 2]
        others = {key.adapters for key in engine.curves() if key.module.startswith("vae")}
        assert others == {0}
        [dear] = [key for key in keys if key.adapters == 2]
        for _ in range(9):
            engine._planner.cost.observe(dear, 1, 100.0)
        alone = [engine.alone(**request(1), lora=lora) for lora in named]
        assert [bool(seconds and seconds > 100) for seconds in alone] == [False, False, True, False]
        told = engine.estimate(**request(1), lora=named[2])
        assert told is not None
        assert told.finish > 100


@pytest.mark.parametrize(
    "lora",
    [
        "rings",
        ["rings"],
        ("rings", 1.0),
        {"rings": 1.0},
        [{"name": "rings"}],
        [("rings", "much")],
        5,
    ],
)
def test_what_is_no_list_of_names_and_scales_is_told(files: dict[str, Path], lora: Any) -> None:
    pipeline = shapes()
    with StepEngine(pipeline, loras=Loras(pipeline, files=files)) as engine:
        with pytest.raises(LoraError, match=r"it must be a list such as \[\(\"rings\", 0.8\)\]"):
            engine.submit(**request(1), lora=lora)
        assert engine.waiting == 0


def test_an_engine_without_adapters_says_how_to_have_them() -> None:
    with StepEngine(shapes()) as engine, pytest.raises(EngineMisuseError, match="loras="):
        engine.submit(**request(1), lora=[("rings", 1.0)])
