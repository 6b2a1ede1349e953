"""Prevents schedulers from waiting for the device at every step.

Pipelines keep timesteps on the device, for the model. The `step` of some schedulers looks the
timestep up in tables on the CPU, so it waits for the device, up to a dozen times. Here a step gets
the same timestep on the CPU, from a copy of the timesteps that is made once per job.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import torch

from stepweave.compat.subclasses import like

# schedulers whose step uses its timestep only on the host, so that results are bitwise equal
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
    """Have a view's scheduler, if it is one of `READERS`, step with timesteps on the CPU. Its
    `timesteps` stay on the device."""
    if type(scheduler) in READERS:
        scheduler.__class__ = _with_times_on_the_host(type(scheduler))  # type: ignore[arg-type]


@functools.cache
def _with_times_on_the_host(kind: type) -> type:
    plain: Any = kind.step  # type: ignore[attr-defined]
    takes = [name for name in inspect.signature(plain).parameters if name.startswith("timestep")]

    @functools.wraps(plain)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(plain).bind(self, *args, **kwargs)
        there = self.timesteps
        here = _on_the_host(self, there)
        if here is None:
            return plain(self, *args, **kwargs)
        for name in takes:
            bound.arguments[name] = _twin(bound.arguments.get(name), there, here)
        self.timesteps = here
        try:
            return plain(*bound.args, **bound.kwargs)
        finally:
            if self.timesteps is here:
                self.timesteps = there

    return like(kind, step=step)


def _on_the_host(scheduler: Any, timesteps: Any) -> torch.Tensor | None:
    """A copy of timesteps that are on a device, made once."""
    if not isinstance(timesteps, torch.Tensor) or timesteps.device.type == "cpu":
        return None
    if timesteps.is_inference():  # such tensors have no version
        return None
    entry = scheduler.__dict__.get("_stepweave_times")
    if entry is None or entry[0] is not timesteps or entry[1] != timesteps._version:
        entry = timesteps, timesteps._version, timesteps.cpu()
        scheduler.__dict__["_stepweave_times"] = entry
    return entry[2]  # type: ignore[no-any-return]


def _twin(time: Any, there: torch.Tensor, here: torch.Tensor) -> Any:
    """The CPU copy of a timestep, by its index on the device; other values unchanged."""
    if not isinstance(time, torch.Tensor) or time.ndim or time._base is None:
        return time
    base = there if there._base is None else there._base
    offset = int(time.storage_offset()) - int(there.storage_offset())
    index, rest = divmod(offset, int(there.stride(0)) or 1)
    return here[index] if time._base is base and not rest and 0 <= index < len(here) else time
