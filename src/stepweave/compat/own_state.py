"""Applies changes that a job's own code makes to shared modules only while that job runs.

A callback may scale an adapter, switch tiling on, or replace an attention processor; a pipeline may
cast its autoencoder to single precision and back. Such a change is undone whenever the job's fiber
is suspended, and redone when it continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from stepweave.compat.module_state import Change, ModuleState
from stepweave.compat.nested import flat
from stepweave.compat.values import comes_with_a_library
from stepweave.contained import contained

SMALL = (bool, int, float, str)  # types of values that may select a pipeline's code
LONG = 64  # characters of a value; longer ones are assumed to be prompts

T = TypeVar("T")


class OwnState:
    """The changes of one job in the modules. Reads the modules at each switch of the fiber, and
    with `weights` also these."""

    def __init__(self, modules: Mapping[str, nn.Module], *, weights: bool = False) -> None:
        self._modules = modules
        self._weights = weights
        self._base: ModuleState | None = None  # of the others, while the fiber runs
        self._change: Change | None = None
        self.lost: list[str] = []  # weights that it has overwritten and that cannot be restored
        self.seconds = 0.0  # of reading the modules, in total

    def __bool__(self) -> bool:
        """Whether the job has changed anything."""
        return self._change is not None or bool(self.lost)

    @property
    def paths(self) -> list[str]:
        return self.lost if self._change is None else self._change.paths

    def enter(self) -> None:
        self._base = None
        with contained("take a snapshot of modules"):
            self._base = self._look()
            if self._change is not None:
                self._change.redo()

    def leave(self) -> None:
        if self._base is None:
            return
        with contained("undo a job's changes in modules"):
            change = self._base.change(self._look())
            change.undo()
            self._change = change or None
            self.lost += [path for path in change.lost if path not in self.lost]
        self._base = None

    def during(self, forward: Callable[[], T]) -> T:
        """Run a forward and return its result. Its writes to modules do not count as the job's,
        unless the job has changed modules before."""
        if self._change is not None or self._base is None:
            return forward()
        before: ModuleState | None = None
        with contained("take a snapshot of modules"):
            before = self._look()
        try:
            return forward()
        finally:
            with contained("take a snapshot of modules"):
                if before is not None and self._base is not None:
                    after = self._look()
                    self._base.adopt(after, before.change(after).places)

    def _look(self) -> ModuleState:
        began = time.perf_counter()
        state = ModuleState(self._modules, keep=True, weights=self._weights)
        self.seconds += time.perf_counter() - began
        return state


class Owner(Protocol):
    """A fiber, and the state that it installs whenever it runs."""

    own: Sequence[Any]


class Looks:
    """How long fibers read modules from now on. Few jobs do, so forwards are timed without it."""

    def __init__(self, fibers: Iterable[Owner]) -> None:
        states = [state for fiber in fibers for state in fiber.own]
        self._states = [state for state in states if isinstance(state, OwnState)]
        self._before = self._total()

    @property
    def seconds(self) -> float:
        return self._total() - self._before

    def _total(self) -> float:
        return sum(state.seconds for state in self._states)


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
        dtypes = (item.dtype for item in module.parameters() if item.is_floating_point())
        dtype = next(dtypes, None)
        if dtype is not None:
            yield module, dtype


def _cast(types: Mapping[nn.Module, torch.dtype]) -> None:
    for module, dtype in types.items():
        module.to(dtype)


def has_code(value: Any) -> bool:
    """Whether an argument contains a callback: anything that could be called."""
    return any(
        callable(item)
        or not (comes_with_a_library(type(item)) or type(item).__module__.startswith("PIL."))
        for item in flat(value)
        if not isinstance(item, (type, nn.Module))
    )


def signature(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """A key that is equal for calls that probably run the same code of a pipeline of this class:
    the names of the arguments, and for classes that are not diffusers', small values."""
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
