"""Runs an entry's calls alone and in company, and tells how they compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepweave import StepEngine
from stepweave.engine.merge import tensors
from tests.pipelines.registry import CALLS, Entry

TOLERANCE = 1e-4  # of what the pipeline puts out: pixels in [0, 1], or samples of sound


@dataclass(frozen=True)
class Report:
    """What came of one entry. `alone` says what had to run alone, and why."""

    name: str
    pipeline: str
    merged_share: float  # of the denoisers' calls
    largest_error: float
    alone: dict[str, str]
    errors: int

    @property
    def right(self) -> bool:
        return self.largest_error <= TOLERANCE and self.errors == 0


def check(entry: Entry) -> Report:
    """Compare six different calls in company with the same calls made alone, on a pipeline of its own."""
    plain = entry.build()
    expected = [_numbers(plain(**entry.arguments(i))) for i in range(CALLS)]
    pipeline = entry.build()
    with StepEngine(pipeline) as engine:
        jobs = [engine.submit(**entry.arguments(i)) for i in range(CALLS)]
        results = [_numbers(job.result(300)) for job in jobs]
        stats = engine.stats()
    worst = 0.0
    for one, other in zip(results, expected, strict=True):
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert np.isfinite(b).all(), "the plain call gives no finite numbers"
            worst = max(worst, float(np.abs(a - b).max()))
    # the denoisers are what is called most
    most = max(forwards.calls for forwards in stats.forwards.values())
    denoisers = [name for name, forwards in stats.forwards.items() if forwards.calls >= most / 2]
    calls = sum(stats.forwards[name].calls for name in denoisers)
    merged = sum(stats.forwards[name].merged_calls for name in denoisers)
    alone = {f"{one['call']} {one['sample']}": one["reason"] for one in stats.certificates if one["state"] == "failed"}
    return Report(entry.name, type(plain).__name__, merged / calls, worst, alone, stats.errors)


def _numbers(output: Any) -> list[np.ndarray]:
    """All arrays of an output."""
    if isinstance(output, np.ndarray):
        return [output] if output.dtype.kind == "f" else []
    if isinstance(output, torch.Tensor):
        return [output.float().numpy()]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [array for item in output for array in _numbers(item)]
    return [tensor.float().numpy() for tensor in tensors(output)]
