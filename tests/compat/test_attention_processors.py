"""Attention processors that calls swap, and modules that cut their batch into parts: as pipelines
with PAG do."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepweave import StepEngine
from stepweave.compat.attention_processors import AttentionProcessors, set_processor
from stepweave.compat.torch_state import quiet
from stepweave.engine import Mode
from stepweave.engine.fiber import Fiber
from stepweave.errors import RequestCancelledError
from tests.support.toy import CLOSE, honest
from tests.support.waiting import SECONDS

STEPS = 8

pytestmark = pytest.mark.usefixtures("every_row_pays")


class Plain:
    def __call__(self, x: Tensor) -> Tensor:
        return honest(x)


class Parts:
    """Treats each part of the batch in a way of its own, as PAG's processors do."""

    def __init__(self, parts: int, strength: float = 1.0) -> None:
        self.parts = parts
        self.strength = strength

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat(
            [honest(x) * (1 + self.strength * i) for i, x in enumerate(x.chunk(self.parts))]
        )


class Attention(nn.Module):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.processor(x)
        return result


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(Plain()), Attention(Plain())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


class Guided(DiffusionPipeline):
    """Swaps the first attention's processor for the length of a call; with `parts` 1 it leaves all
    as it is."""

    def __init__(self, denoiser: nn.Module | None = None) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser or Denoiser().eval())
        self.set_progress_bar_config(disable=True)

    def _set_pag_attn_processor(self, parts: int, strength: float) -> None:
        set_processor(self.denoiser.first, Parts(parts, strength))

    @torch.no_grad()
    def __call__(
        self,
        parts: int,
        *,
        images: int = 1,
        strength: float = 1.0,
        steps: int = STEPS,
        generator: torch.Generator | None = None,
        gate: threading.Event | None = None,
    ) -> Tensor | None:
        if gate is not None:
            assert gate.wait(SECONDS)
            return None
        x = torch.randn(images, 3, generator=generator)
        original = self.denoiser.first.processor
        if parts > 1:
            self._set_pag_attn_processor(parts, strength)
        with self.progress_bar(total=steps) as bar:
            for _ in range(steps):
                x = 0.9 * x + 0.1 * sum(self.denoiser(torch.cat([x] * parts)).chunk(parts))
                bar.update()
        set_processor(self.denoiser.first, original)
        return x


def calls(count: int = 6, **changes: Any) -> list[dict[str, Any]]:
    return [{"parts": 3, "seed": i, **changes} for i in range(count)]


def arguments(call: dict[str, Any]) -> dict[str, Any]:
    given = dict(call)
    return {"generator": torch.Generator().manual_seed(given.pop("seed")), **given}


def check(engine: StepEngine, wanted: list[dict[str, Any]]) -> None:
    gate = threading.Event()
    engine.submit(parts=1, gate=gate, generator=torch.Generator())
    jobs = [engine.submit(**arguments(one)) for one in wanted]
    gate.set()
    plain = Guided()
    for job, one in zip(jobs, wanted, strict=True):
        expected = plain(**arguments(one))
        assert expected is not None
        assert (job.result(SECONDS) - expected).abs().max() <= CLOSE, one


def share(engine: StepEngine) -> float:
    return engine.stats().forwards["denoiser"].merged_share


@pytest.mark.parametrize("parts", [2, 3])
def test_jobs_whose_processors_cut_the_batch_share_forwards(parts: int) -> None:
    pipeline = Guided()
    base = pipeline.denoiser.first.processor
    with StepEngine(pipeline) as engine:
        check(engine, calls(parts=parts))
        check(engine, calls(parts=parts))
        assert share(engine) > 0.5
        assert max(engine.stats().forwards["denoiser"].by_rows) == 6 * parts
    assert pipeline.denoiser.first.processor is base


def test_jobs_of_several_images_run_with_those_of_one() -> None:
    with StepEngine(Guided()) as engine:
        for _ in range(3):
            check(engine, [{"parts": 3, "seed": i, "images": 1 + i % 2} for i in range(6)])
        assert share(engine) > 0.4


def test_jobs_with_and_without_processors_of_their_own_do_not_get_each_others() -> None:
    pipeline = Guided()
    wanted = [{"parts": 1 + i % 3, "seed": i, "strength": 1.0 + i // 6} for i in range(12)]
    with StepEngine(pipeline) as engine:
        for _ in range(4):
            check(engine, wanted)
        assert share(engine) > 0.3


def test_a_cancelled_job_leaves_no_processors_behind() -> None:
    pipeline = Guided()
    base = pipeline.denoiser.first.processor
    with StepEngine(pipeline) as engine:
        job = engine.submit(**arguments({"parts": 3, "seed": 0, "steps": 100_000}))
        while job.progress.step < 3:
            pass
        job.cancel()
        with pytest.raises(RequestCancelledError):
            job.result(SECONDS)
        check(engine, calls())
    assert pipeline.denoiser.first.processor is base


@pytest.mark.parametrize("mode", ["off", "threads"])
def test_other_modes_take_turns_and_leave_nothing_behind(mode: Mode) -> None:
    pipeline = Guided()
    base = pipeline.denoiser.first.processor
    with StepEngine(pipeline, mode=mode) as engine:
        job = engine.submit(**arguments({"parts": 3, "seed": 0, "steps": 100_000}))
        while job.progress.step < 3:
            pass
        job.cancel()
        with pytest.raises(RequestCancelledError):
            job.result(SECONDS)
        check(engine, calls(4))
    assert pipeline.denoiser.first.processor is base


class Made(Guided):
    """Puts in place what it is given a maker of."""

    maker: Any = None

    def _set_pag_attn_processor(self, parts: int, strength: float) -> None:
        set_processor(self.denoiser.first, type(self).maker(parts, strength))


class Module(nn.Module):
    def __init__(self, parts: int, strength: float) -> None:
        super().__init__()
        self.act = Parts(parts, strength)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Slotted:
    __slots__ = ("act",)

    def __init__(self, parts: int, strength: float) -> None:
        self.act = Parts(parts, strength)

    def __call__(self, x: Tensor) -> Tensor:
        return self.act(x)


def function(parts: int, strength: float) -> Any:
    return lambda x: Parts(parts, strength)(x)


def partial(parts: int, strength: float) -> Any:
    return functools.partial(Parts.__call__, Parts(parts, strength))


@pytest.mark.parametrize("maker", [function, partial, Module, Slotted])
def test_processors_of_any_kind_are_told_apart(maker: Any) -> None:
    kind = type("Kind", (Made,), {"maker": staticmethod(maker)})
    pipeline = kind()
    base = pipeline.denoiser.first.processor
    wanted = [{"parts": 3, "seed": i, "strength": 1.0 + i % 2} for i in range(6)]
    with StepEngine(pipeline) as engine:
        for _ in range(2):
            check(engine, wanted)
        assert engine.stats().errors == 0
    assert pipeline.denoiser.first.processor is base


def test_a_module_makes_way_for_a_processor_that_is_none_and_comes_back() -> None:
    pipeline = Guided()
    pipeline.denoiser.first.processor = base = Module(1, 0.0)
    with StepEngine(pipeline) as engine:
        check(engine, calls())
    assert pipeline.denoiser.first.processor is base
    assert dict(pipeline.denoiser.first.named_children()) == {"processor": base}


def test_parts_that_hardly_differ_are_not_mixed_up_in_half_precision() -> None:
    """A proof allows 2 % then, and guidance makes more of it: the order of rows must be right from
    the first."""
    strength, guidance = 0.01, 20.0

    class Half(Guided):
        @torch.no_grad()
        def __call__(self, *, generator: torch.Generator | None = None) -> Tensor:  # type: ignore[override]
            x = torch.randn(1, 3, generator=generator, dtype=torch.bfloat16)
            original = self.denoiser.first.processor
            self._set_pag_attn_processor(2, strength)
            for _ in range(STEPS):
                one, other = self.denoiser(torch.cat([x, x])).chunk(2)
                x = 0.9 * x + 0.1 * (one + guidance * (other - one))
            set_processor(self.denoiser.first, original)
            return x

    expected = [Half()(generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    with StepEngine(Half()) as engine:
        for _ in range(3):
            jobs = [
                engine.submit(generator=torch.Generator().manual_seed(seed)) for seed in range(6)
            ]
            assert all(
                torch.equal(job.result(SECONDS), one)
                for job, one in zip(jobs, expected, strict=True)
            )
        assert share(engine) > 0.3


def test_what_cannot_be_put_in_place_ends_the_job_and_leaves_the_rest_as_it_was() -> None:
    left = []

    class First:
        def enter(self) -> None:
            pass

        def leave(self) -> None:
            left.append(self)

    class Second(First):
        def enter(self) -> None:
            raise ValueError("no room")

    first = First()
    fiber = Fiber(lambda: None, quiet(("cpu",)), [first, Second()])
    with pytest.raises(ValueError, match="no room"):
        fiber.resume()
    assert left == [first]


def test_processors_are_put_on_and_taken_off() -> None:
    denoiser = Denoiser()
    base = denoiser.first.processor
    processors = AttentionProcessors([denoiser])
    processors.install(None)
    assert processors.installed() is None
    denoiser.first.processor = own = Parts(2)
    worn = processors.restore()
    assert denoiser.first.processor is base
    assert worn is not None
    with processors.installing(worn):
        assert denoiser.first.processor is own
        with processors.installing(worn):
            assert denoiser.first.processor is own
        assert denoiser.first.processor is own
    assert denoiser.first.processor is base
