"""Changes that a job's own code makes to the modules that all jobs share: in place only while that
job runs.

A callback may scale an adapter, switch tiling on, replace an attention processor; a pipeline may
cast its autoencoder to single precision and back. Such a change is taken out of the modules
whenever the job's fiber is left, and put in again when it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from stepweave.compat.module_state import Change, ModuleState
from stepweave.compat.nested import flat
from stepweave.compat.values import comes_with_a_library
from stepweave.contained import contained

SMALL = (bool, int, float, str)  # values that may decide what a pipeline does
LONG = 64  # characters of a value, from which on it is a prompt rather

T = TypeVar("T")


class OwnState:
    """What one job has changed in the modules. Costs a walk through them at each switch, and with
    `weights` through these."""

    def __init__(self, modules: Mapping[str, nn.Module], *, weights: bool = False) -> None:
        self._modules = modules
        self._weights = weights
        self._base: ModuleState | None = None  # of the others, while the fiber runs
        self._change: Change | None = None
        # weights that it has written to in place, and that cannot be put back
        self.lost: list[str] = []

    def __bool__(self) -> bool:
        """Whether the job has changed anything."""
        return self._change is not None or bool(self.lost)

    @property
    def paths(self) -> list[str]:
        return self.lost if self._change is None else self._change.paths

    def enter(self) -> None:
        self._base = None
        with contained("read what modules hold"):
            self._base = self._look()
            if self._change is not None:
                self._change.redo()

    def leave(self) -> None:
        if self._base is None:
            return
        with contained("put back what a job has changed in modules"):
            change = self._base.change(self._look())
            change.undo()
            self._change = change or None
            self.lost += [path for path in change.lost if path not in self.lost]
        self._base = None

    def during(self, forward: Callable[[], T]) -> T:
        """A forward's result. What it writes to the modules is none of the job's doing, unless they
        are the job's own by now."""
        if self._change is not None or self._base is None:
            return forward()
        before: ModuleState | None = None
        with contained("read what modules hold"):
            before = self._look()
        try:
            return forward()
        finally:
            with contained("read what modules hold"):
                if before is not None and self._base is not None:
                    after = self._look()
                    self._base.adopt(after, before.change(after).places)

    def _look(self) -> ModuleState:
        return ModuleState(self._modules, keep=True, weights=self._weights)


class OwnTypes:
    """The floating-point types that one job has cast modules to, until it casts them back."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._base = dict(_types(modules))
        self._own: dict[nn.Module, torch.dtype] = {}

    def __bool__(self) -> bool:
        return bool(self._own)

    def enter(self) -> None:
        _cast(self._own)

    def leave(self) -> None:
        self._own = {module: now for module, now in _types(self._base) if now != self._base[module]}
        _cast({module: self._base[module] for module in self._own})


def _types(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, torch.dtype]]:
    for module in modules:
        found = next((one.dtype for one in module.parameters() if one.is_floating_point()), None)
        if found is not None:
            yield module, found


def _cast(types: Mapping[nn.Module, torch.dtype]) -> None:
    for module, dtype in types.items():
        module.to(dtype)


def has_code(value: Any) -> bool:
    """Whether an argument of a call contains something that could be called: a callback, of one
    kind or another."""
    return any(
        callable(item)
        or not (comes_with_a_library(type(item)) or type(item).__module__.startswith("PIL."))
        for item in flat(value)
        if not isinstance(item, (type, nn.Module))
    )


def signature(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """What calls have in common that run the same code of a pipeline of this class, as far as can
    be told: of one that comes with diffusers the names of the arguments, of any other small values,
    too."""
    names = frozenset(name for name, value in kwargs.items() if value is not None)
    if comes_with_a_library(kind):
        return kind, len(args), names
    values = [*enumerate(args), *kwargs.items()]
    small = frozenset(
        (name, repr(value))
        for name, value in values
        if isinstance(value, SMALL) and len(repr(value)) <= LONG
    )
    return kind, len(args), names, small
