"""Whether forwards of a module leave anything behind that is no argument: counters, residuals kept
for the next call, hooks.

A forward is looked at when calls of its kind first come, at the 2nd, 4th, 8th, ... of them, and in
every proof. What it changed in the module may be a table made once and for all: then the same call,
run again, changes nothing more and gives the same to the last bit. Anything else is state, and jobs
whose calls alternate in it would share it.
"""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from stepweave.batching.call import Call, Target
from stepweave.certification.compare import close, equal
from stepweave.compat.module_state import ModuleState, Place
from stepweave.compat.nested import cloned, copied, tensors
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.snapshot import ArgumentSnapshot
from stepweave.compat.stateful_modules import some
from stepweave.contained import contained
from stepweave.planning.clock import now

KEPT = 1024  # kinds of calls
SELDOM = 1024  # calls of a kind, after which it is looked at each time that many have come


class RandomStates:
    """The default random generators: torch's, Python's and numpy's."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._generators = [torch.default_generator]
        if device is not None and device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._states = self._now()

    def _now(self) -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state()
        numbers = np.asarray(keys).tobytes()
        return (
            *(one.get_state() for one in self._generators),
            random.getstate(),
            (name, numbers, *rest),
        )

    def changed(self) -> bool:
        return any(
            not torch.equal(now, before) if isinstance(now, torch.Tensor) else now != before
            for now, before in zip(self._now(), self._states, strict=True)
        )

    def put_back(self) -> None:
        for generator, state in zip(self._generators, self._states, strict=False):
            generator.set_state(state)
        *_, python, (name, keys, *rest) = self._states
        random.setstate(python)
        np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))


class Watches:
    """What is known of the modules that calls are of, by their targets."""

    def __init__(self) -> None:
        self._watches: WeakKeyDictionary[Target, StateWatch] = WeakKeyDictionary()

    def of(self, target: Target) -> StateWatch:
        watch = self._watches.get(target)
        if watch is None:
            watch = self._watches[target] = StateWatch(target.name.partition(".")[0])
        return watch


class StateWatch:
    """What is known of one module. Used by the engine's thread."""

    def __init__(self, name: str = "module") -> None:
        self.name = name
        self.seconds = 0.0  # that the last look took
        self.found: str | None = None  # what it keeps, in words
        # jobs that had a forward of it, by their names; not more than two
        self.users: set[Any] = set()
        self.initial: ModuleState | None = None  # before its first forward here
        self._fresh = True
        self._begun = False
        # how many calls of a kind there were
        self._kinds: OrderedDict[Hashable, int] = OrderedDict()
        self._left: dict[
            Hashable, tuple[frozenset[Place], dict[Place, Hashable]]
        ] = {}  # places that forwards of a kind wrote to

    def due(self, kind: Hashable, user: Any) -> bool:
        """Note a call run alone; whether to look at it."""
        self.used_by(user)
        if self.found is not None:
            return False
        kind = _kind(kind)
        number = self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KEPT:
            gone, _ = self._kinds.popitem(last=False)
            self._left.pop(gone, None)
        return number & (number - 1) == 0 if number < SELDOM else number % SELDOM == 0

    def used_by(self, user: Any) -> None:
        """Note a forward for a job."""
        if len(self.users) < 2:
            self.users.add(name_of(user))

    def start(self, module: nn.Module) -> ModuleState:
        """A snapshot before a forward."""
        before = self.look(module)
        if self.initial is None:
            self.initial = before
        return before

    def begin(self, module: nn.Module) -> None:
        """Note what the module holds before its first forward here; tried once."""
        if not self._begun:
            self._begun = True
            with contained("look at a module"):
                self.start(module)

    def look(self, module: nn.Module) -> ModuleState:
        """A snapshot."""
        return ModuleState({self.name: module}, keep=True)

    def run(self, call: Call) -> Any:
        """A call's result, with a look at what it leaves behind in the module. What goes wrong in
        looking costs no result."""
        module, first = call.target.module, self._fresh
        self._fresh, began = False, now()
        self.seconds = 0.0
        before: ModuleState | None = None
        with contained("look at a forward"):
            states = RandomStates(_device(module))
            given = ArgumentSnapshot(*call.args, *call.kwargs.values())
            twin = dataclasses.replace(call, args=copied(call.args), kwargs=copied(call.kwargs))
            before = self.start(module)
        self.seconds += now() - began
        output = call.run()
        if before is None:
            return output
        began = now()
        with contained("look at a forward"):
            after = self.look(module)
            change = before.change(after)
            if change or first:
                drew = states.changed() or given.drew()
                self._again(twin, _Clone(output), after, compare=not drew)
            if change and self.found is None:
                self._compare_with_the_last(_kind(call.kind), before, after)
        self.seconds += now() - began
        return output

    def _again(self, call: Call, kept: _Clone, after: ModuleState, *, compare: bool) -> None:
        """Run the same call once more: a module that keeps nothing changes no more, and gives the
        same."""
        states = RandomStates(_device(call.target.module))
        given = ArgumentSnapshot(*call.args, *call.kwargs.values())
        try:
            output = call.run()
            change = after.change(self.look(call.target.module))
            if change:
                self.found = f"a forward changes {some(change.paths)}"
                change.undo()
            elif compare and kept.there and not equal(kept.value, output):
                again = call.run() if on_a_device(output) else None
                if again is None or not close(kept.value, output, again):
                    self.found = "the same call gives another result when it is run again"
        except Exception as error:
            if not ran_out(error):
                self.found = f"it raises {type(error).__name__} when the same call is run again"
        finally:
            # it draws random numbers; else another thread may have, which must not draw the same
            # again
            if not compare:
                states.put_back()
            given.put_back()

    def _compare_with_the_last(
        self, kind: Hashable, before: ModuleState, after: ModuleState
    ) -> None:
        """What a kind of call writes must be the same each time: else it is of the call before."""
        places = before.change(after).places
        marks = after.marks(places)
        known = self._left.get(kind)
        if known is not None:
            differing = [
                place for place in places & known[0] if known[1].get(place) != marks.get(place)
            ]
            if differing:
                self.found = (
                    f"a forward leaves what differs from call to call in "
                    f"{some(before.change(after).paths)}"
                )
        self._left[kind] = (places, marks)


def same(first: Any, second: Any, again: Any) -> bool:
    """Whether two results of one call are the same: to the last bit, or within the noise of the
    call made `again` right after the first where the device sums in any order."""
    if equal(first, second):
        return True
    return on_a_device(second) and (again is None or close(second, first, again))


def on_a_device(output: Any) -> bool:
    return any(one.device.type != "cpu" for one in tensors(output))


def _kind(kind: Hashable) -> Hashable:
    """The kind of a call; one for all calls that are like no other."""
    return kind if isinstance(kind, tuple) else None


def name_of(user: Any) -> Any:
    """What tells jobs apart, also those that have ended."""
    return getattr(user, "id", id(user))


def _device(module: nn.Module) -> torch.device:
    return next((one.device for one in module.parameters()), torch.device("cpu"))


class _Clone:
    """A copy of a result, if there can be one."""

    def __init__(self, output: Any) -> None:
        try:
            self.value, self.there = cloned(output), True
        except Exception:
            self.value, self.there = None, False
