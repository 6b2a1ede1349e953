"""What torch keeps per thread or per process, and one fiber must not change for another."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NamedTuple, Protocol

import torch


class Own(Protocol):
    """Something of the process that a fiber has one of its own of: in place while it runs."""

    def enter(self) -> None: ...
    def leave(self) -> None: ...


class Ambient(NamedTuple):
    """Gradient mode, autocast and default dtype. Part of a group's key: a merged forward runs under
    it."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # by device type
    autocast_cache: bool
    dtype: torch.dtype


def suspendable() -> bool:
    """Whether the running code may be suspended here: what torch has on its stacks cannot be
    carried across."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return not torch.is_inference_mode_enabled() and modes == 0


def device_types(device: torch.device) -> tuple[str, ...]:
    """Those whose autocast is a fiber's own."""
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
    """Switch from one to the other; what is equal costs nothing."""
    if ambient == instead_of:
        return
    torch.set_grad_enabled(ambient.grad)
    for kind, enabled, dtype in ambient.autocast:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(ambient.autocast_cache)
    if not any(enabled for _, enabled, _ in ambient.autocast):
        torch.clear_autocast_cache()  # casts of weights, kept until the outermost autocast ends
    if ambient.dtype != instead_of.dtype:
        torch.set_default_dtype(ambient.dtype)


def quiet(device_types: tuple[str, ...]) -> Ambient:
    """What a thread of the engine runs under between fibers: no gradients."""
    return current(device_types)._replace(grad=False)


def use_device(device: torch.device) -> None:
    """Make a GPU the calling thread's own: a thread begins with the first one, and what it does may
    open a context there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The same within a block, on a thread that is not the engine's own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_swapping = threading.Lock()
_inside: list[DefaultRandom] = []  # whose states stand in the default generators now


def draw_seed() -> int:
    """A seed from torch's default generator, or, while a fiber's own stands in its place, from the
    one that waits to return."""
    with _swapping:
        if not _inside:
            return int(torch.randint(2**62, ()).item())
        generator = torch.Generator()
        generator.set_state(_inside[0]._others[0])
        seed = int(torch.randint(2**62, (), generator=generator).item())
        _inside[0]._others[0] = generator.get_state()
        return seed


class DefaultRandom:
    """Default random generators of one fiber's own: on the CPU and, if that is used, on the CUDA
    device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._own = [
            torch.Generator(one.device).manual_seed(seed).get_state() for one in self._generators
        ]
        self._others: list[torch.Tensor] = []

    def enter(self) -> None:
        with _swapping:
            self._others = [one.get_state() for one in self._generators]
            for generator, state in zip(self._generators, self._own, strict=True):
                generator.set_state(state)
            _inside.append(self)

    def leave(self) -> None:
        with _swapping:
            _inside.remove(self)
            self._own = [one.get_state() for one in self._generators]
            for generator, state in zip(self._generators, self._others, strict=True):
                generator.set_state(state)
