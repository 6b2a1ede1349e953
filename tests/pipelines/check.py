"""Runs an entry's calls alone and in company, and tells how they compare."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from stepweave import StepEngine
from stepweave.compat.nested import tensors
from stepweave.compat.turn_taking import modules_in
from stepweave.engine.engine import EngineStats
from tests.pipelines.registry import CALLS, Entry
from tests.support.waiting import SECONDS

# of pixels in [0, 1]; where numbers are larger, of the largest that the plain call puts out
TOLERANCE = 1e-4
# Some pipelines magnify last bits, or round numbers to bfloat16 on their way: then an error may be
# twice what last bits change in the plain call, but no more than this.
MOST = 1e-3
NUDGES = 8  # plain calls with other last bits
TAKES_TURNS = "takes turns: a call changes the shared modules"
# what the forwards of denoisers call their time
TIMES = {"timestep", "timesteps", "timestep_ratio", "t", "r"}
# by name: not all take a time
DENOISER = re.compile(r"(prior_)?(transformer|unet|prior|decoder)(_\d+)?")


@dataclass(frozen=True)
class Report:
    """What came of one entry: plain data, as it is kept in a file."""

    name: str
    pipeline: str
    merged_share: float | None = None  # of the denoisers' calls; None: it has no denoiser
    largest_error: float = 0.0  # of a result, as TOLERANCE counts
    alone: tuple[str, ...] = ()  # what had to run alone, and why
    errors: int = 0  # of the engine itself
    failed: str = ""  # why there is no comparison
    noise: float = 0.0  # what last bits change in the plain call, if the error is over TOLERANCE

    @property
    def right(self) -> bool:
        allowed = max(TOLERANCE, min(2 * self.noise, MOST))
        return not self.failed and self.largest_error <= allowed and self.errors == 0

    @property
    def merges(self) -> bool:
        return bool(self.merged_share)


def check(entry: Entry) -> Report:
    """Compare six different calls in company with the same calls made alone, on a pipeline of its
    own."""
    plain = entry.build()
    assert type(plain).__name__ == entry.pipeline
    expected = [_numbers(plain(**entry.arguments(i))) for i in range(CALLS)]
    pipeline = entry.build()
    with StepEngine(pipeline, knee=False) as engine:
        assert engine._loop is not None
        turns = engine._loop.scope_of(None).takes_turns()
        with engine._loop._wake:  # all start at once, so that every run is the same
            jobs = [engine.submit(**entry.arguments(i)) for i in range(CALLS)]
        results = [_numbers(job.result(SECONDS)) for job in jobs]
        stats = engine.stats()
    errors = [_error(one, other) for one, other in zip(results, expected, strict=True)]
    worst = max(errors)
    noise = 0.0
    if worst > TOLERANCE:
        i = errors.index(worst)
        noise = max(_error(_nudged(plain, entry, i, seed), expected[i]) for seed in range(NUDGES))
    return Report(
        name=entry.name,
        pipeline=entry.pipeline,
        merged_share=_merged_share(stats, denoisers(pipeline)),
        largest_error=worst,
        alone=(TAKES_TURNS,) if turns else _alone(stats),
        errors=stats.errors,
        noise=noise,
    )


def _nudged(plain: Any, entry: Entry, i: int, seed: int) -> list[np.ndarray]:
    """The results of call i if the results of all modules change in their last two bits."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in tensors(output):
            if tensor.dtype == torch.float32:
                size = 2 * torch.finfo(tensor.dtype).eps
                tensor.mul_(1 + size * (2 * torch.rand(tensor.shape, generator=generator) - 1))

    parts = [part for _, part in modules_in(plain)]
    parts += [
        inner
        for part in parts
        for name in ("encoder", "decoder")
        if isinstance(inner := getattr(part, name, None), nn.Module)
    ]
    hooks = [part.register_forward_hook(nudge) for part in parts]
    try:
        with torch.no_grad():
            return _numbers(plain(**entry.arguments(i)))
    finally:
        for hook in hooks:
            hook.remove()


def denoisers(pipeline: Any) -> set[str]:
    """The names of the modules that a denoising loop calls, ControlNets among them."""
    return {
        name
        for name, module in modules_in(pipeline)
        if DENOISER.fullmatch(name) or _takes_time(module)
    }


def _takes_time(module: nn.Module) -> bool:
    return not TIMES.isdisjoint(inspect.signature(type(module).forward).parameters)


def _merged_share(stats: EngineStats, names: set[str]) -> float | None:
    forwards = [one for name, one in stats.forwards.items() if name in names]
    calls = sum(one.calls for one in forwards)
    return sum(one.merged_calls for one in forwards) / calls if calls else None


def _alone(stats: EngineStats) -> tuple[str, ...]:
    """Reasons of the certificates, without sizes and numbers, which say nothing of tiny models."""
    found: dict[str, None] = {}
    for one in stats.certificates:
        if one["state"] == "failed":
            found[f"{one['call']}: {one['reason']}"] = None
        elif one["state"] == "certified" and one["reason"] != "merged and alone agree":
            found[f"{one['call']}, some: {one['reason']}"] = None
    return tuple(found)


def _error(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference, as a share of the largest number expected where that is more than
    1."""
    assert len(ours) == len(theirs) > 0
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(b).all(), "the plain call gives no finite numbers"
        error = float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max()))
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


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
