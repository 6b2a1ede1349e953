"""State of torch's that belongs to a thread or the process, kept separate for each fiber."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NamedTuple, Protocol

import torch


class Own(Protocol):
    """State of a thread, the process or modules that a fiber has its own version of, installed
    while it runs."""

    def enter(self) -> None: ...
    def leave(self) -> None: ...


class Ambient(NamedTuple):
    """Gradient mode, autocast and default dtype. Part of a group's key; set for its forwards."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # by device type
    autocast_cache: bool
    dtype: torch.dtype


def suspendable() -> bool:
    """Whether the running code may be suspended here: torch's inference mode and modes on its
    stacks cannot be switched."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return not torch.is_inference_mode_enabled() and modes == 0


def device_types(device: torch.device) -> tuple[str, ...]:
    """The device types whose autocast is kept separate for each fiber."""
    return ("cpu",) if device.type == "cpu" else ("cpu", device.type)


def current(device_types: tuple[str, ...]) -> Ambient:
    return Ambient(
        torch.is_grad_enabled(),
        tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in device_types
        ),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
    )


def apply(ambient: Ambient, instead_of: Ambient) -> None:
    """Switch from one to the other; at no cost if they are equal."""
    if ambient == instead_of:
        return
    torch.set_grad_enabled(ambient.grad)
    for kind, enabled, dtype in ambient.autocast:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(ambient.autocast_cache)
    if not any(enabled for _, enabled, _ in ambient.autocast):
        torch.clear_autocast_cache()  # as torch does when the outermost autocast ends
    if ambient.dtype != instead_of.dtype:
        torch.set_default_dtype(ambient.dtype)


def quiet(device_types: tuple[str, ...]) -> Ambient:
    """The state of an engine's thread between fibers: no gradients."""
    return current(device_types)._replace(grad=False)


def use_device(device: torch.device) -> None:
    """Set the calling thread's GPU. A thread starts with the first one, and might create a context
    there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Set the GPU within a block, on a thread that is not the engine's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_swapping = threading.Lock()
_installed: list[DefaultRandom] = []  # those whose states the default generators have now


def draw_seed() -> int:
    """Draw a seed from torch's default generator, or if a fiber's state is installed there, from
    the saved state."""
    with _swapping:
        if not _installed:
            return int(torch.randint(2**62, ()).item())
        generator = torch.Generator()
        generator.set_state(_installed[0]._others[0])
        seed = int(torch.randint(2**62, (), generator=generator).item())
        _installed[0]._others[0] = generator.get_state()
        return seed


class DefaultRandom:
    """One fiber's states of torch's default generators: the CPU's, and a CUDA device's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        devices = [generator.device for generator in self._generators]
        self._own = [torch.Generator(device).manual_seed(seed).get_state() for device in devices]
        self._others: list[torch.Tensor] = []

    def enter(self) -> None:
        with _swapping:
            self._others = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, self._own, strict=True):
                generator.set_state(state)
            _installed.append(self)

    def leave(self) -> None:
        with _swapping:
            _installed.remove(self)
            self._own = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, self._others, strict=True):
                generator.set_state(state)
