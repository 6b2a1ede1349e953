"""What the loop must not do when something beside the work goes wrong, or comes late."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stepweave import StepEngine
from stepweave.engine import fiber, runner
from tests.support.toy import Toy, call, fresh, honest, module
from tests.support.waiting import SECONDS


def pipeline() -> Toy:
    return Toy(module(lambda self, x: honest(x)))


class LateClock:
    """A GPU's clock that is never asked again, with what it was to tell."""

    def __init__(self) -> None:
        self.pending: list[Callable[[float], None]] = []

    def start(self) -> float:
        return 0.0

    def stop(self, started: Any, took: Callable[[float], None]) -> None:
        self.pending.append(took)


def test_a_clock_that_tells_late_holds_on_to_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LateClock()
    monkeypatch.setattr(runner, "clock_of", lambda device: clock)
    with StepEngine(pipeline()) as engine:
        job = engine.submit(**fresh(call(0)))
        assert job.result(SECONDS) is not None
        done = weakref.ref(job)
        del job
        # the engine's thread may still be on its way out of the callback
        for _ in range(100):
            gc.collect()
            if done() is None:
                break
        assert clock.pending
        assert done() is None


@pytest.mark.parametrize("number", [4, 6, 8, 10])
def test_a_fiber_that_an_error_left_behind_gets_what_it_waits_for(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many switches something fails that has nothing to do with the job."""
    expected = pipeline()(**fresh(call(3)))[0]
    real, count = fiber.apply, 0

    def apply(ambient: Any, instead_of: Any) -> None:
        nonlocal count
        real(ambient, instead_of)
        count += 1
        if count == number:
            raise ZeroDivisionError("a defect of the engine")

    with StepEngine(pipeline()) as engine:
        monkeypatch.setattr(fiber, "apply", apply)
        result = engine.submit(**fresh(call(3))).result(SECONDS)[0]
        assert engine.stats().errors == 1
    assert torch.allclose(torch.as_tensor(result), torch.as_tensor(expected))


@pytest.mark.parametrize("mode", ["step", "threads"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_jobs": None},
        {"max_jobs": "8"},
        {"max_decode_rows": None},
        {"cache_bytes": "1"},
        {"audit_every": 0.5},
        {"threads": True},
    ],
    ids=str,
)
def test_limits_of_another_type_are_refused_by_name(mode: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(TypeError, match=f"{name} is .*; it must be a whole number"):
        StepEngine(pipeline(), mode, **options)


def test_whole_numbers_of_numpy_and_switches_of_any_kind_are_taken() -> None:
    options: dict[str, Any] = {"max_jobs": np.int64(2), "knee": 0}
    with StepEngine(pipeline(), **options) as engine:
        assert engine.submit(**fresh(call(0))).result(SECONDS) is not None
