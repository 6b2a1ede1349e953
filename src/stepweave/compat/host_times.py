"""Schedulers that look their times up in tables on the CPU, without waiting for the device at every
step.

Their pipelines keep the timesteps on the device, for the model; such a scheduler's `step` takes one
of them to the host, up to a dozen times. Here a step is given the same time on the CPU, from a copy
of the timesteps that is made once a job.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import torch

# those whose step computes with its time on the host only, and gives the same to the last bit with
# a time on the CPU
READERS: frozenset[type] = frozenset(
    getattr(diffusers, name)
    for name in (
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
    )
    if hasattr(diffusers, name)
)


def keep_times_on_the_host(scheduler: Any) -> None:
    """Have a view's own scheduler, if it is one of `READERS`, step with times on the CPU. Its
    timesteps stay where they are."""
    if type(scheduler) in READERS:
        scheduler.__class__ = _with_times_on_the_host(type(scheduler))  # type: ignore[arg-type]


@functools.cache
def _with_times_on_the_host(kind: type) -> type:
    """A class like `kind`, also by its name."""
    plain: Any = kind.step  # type: ignore[attr-defined]
    takes = [name for name in inspect.signature(plain).parameters if name.startswith("timestep")]

    @functools.wraps(plain)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(plain).bind(self, *args, **kwargs)
        there = self.timesteps
        here = _on_the_host(self, there)
        if here is None:
            return plain(self, *args, **kwargs)
        for name in takes:
            given.arguments[name] = _twin(given.arguments.get(name), there, here)
        self.timesteps = here
        try:
            return plain(*given.args, **given.kwargs)
        finally:
            if self.timesteps is here:
                self.timesteps = there

    attributes = {
        "step": step,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), attributes)


def _on_the_host(scheduler: Any, timesteps: Any) -> torch.Tensor | None:
    """A copy of timesteps that are on a device, made once."""
    if (
        not isinstance(timesteps, torch.Tensor)
        or timesteps.device.type == "cpu"
        or timesteps.is_inference()
    ):
        return None
    known = scheduler.__dict__.get("_stepweave_times")
    if known is None or known[0] is not timesteps or known[1] != timesteps._version:
        known = scheduler.__dict__["_stepweave_times"] = (
            timesteps,
            timesteps._version,
            timesteps.cpu(),
        )
    return known[2]  # type: ignore[no-any-return]


def _twin(time: Any, there: torch.Tensor, here: torch.Tensor) -> Any:
    """One of the timesteps on the CPU, found by its place among those on the device; anything else
    as it is."""
    if not isinstance(time, torch.Tensor) or time.ndim or time._base is None:
        return time
    base = there if there._base is None else there._base
    index, rest = divmod(
        int(time.storage_offset()) - int(there.storage_offset()), int(there.stride(0)) or 1
    )
    return here[index] if time._base is base and not rest and 0 <= index < len(here) else time
