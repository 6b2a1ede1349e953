"""Finds modules that keep state between forwards: counters, residuals for the next call, hooks.

The 1st, 2nd, 4th, 8th, ... call of a kind is checked, and every proof. A forward may change a
module without keeping state, by a table that it computes once: then the same call, run again,
changes nothing and gives a bitwise equal result. Anything else is state, which jobs with
alternating calls would share.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stepweave.batching.call import Call, Target
from stepweave.certification.compare import close, equal
from stepweave.certification.random_states import RandomStates
from stepweave.compat.module_state import ModuleState, Place
from stepweave.compat.nested import cloned, copied, tensors
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.snapshot import ArgumentSnapshot
from stepweave.compat.stateful_modules import some
from stepweave.contained import contained
from stepweave.planning.clock import now

KEPT = 1024  # kinds of calls that are counted
SELDOM = 1024  # calls of a kind, after which only each multiple of this number is checked


class Watches:
    """The `StateWatch` of each target of calls."""

    def __init__(self) -> None:
        self._watches: WeakKeyDictionary[Target, StateWatch] = WeakKeyDictionary()

    def of(self, target: Target) -> StateWatch:
        watch = self._watches.get(target)
        if watch is None:
            watch = self._watches[target] = StateWatch(target.name.partition(".")[0])
        return watch


class StateWatch:
    """Checks the forwards of one module, on the engine's thread."""

    def __init__(self, name: str = "module") -> None:
        self.name = name
        self.seconds = 0.0  # duration of the last check
        self.found: str | None = None  # the state that it keeps, in words
        self.users: set[Any] = set()  # ids of jobs that have used it; at most two
        self.initial: ModuleState | None = None  # before its first forward here
        self._fresh = True
        self._begun = False
        self._kinds: OrderedDict[Hashable, int] = OrderedDict()  # number of calls of each kind
        # places that the last forward of a kind wrote to, and marks of their contents
        self._written: dict[Hashable, tuple[frozenset[Place], dict[Place, Hashable]]] = {}

    def due(self, kind: Hashable, user: Any) -> bool:
        """Note a call that runs alone. Returns whether to check it."""
        self.used_by(user)
        if self.found is not None:
            return False
        kind = _kind(kind)
        number = self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KEPT:
            dropped, _ = self._kinds.popitem(last=False)
            self._written.pop(dropped, None)
        return number & (number - 1) == 0 if number < SELDOM else number % SELDOM == 0

    def used_by(self, user: Any) -> None:
        if len(self.users) < 2:
            self.users.add(name_of(user))

    def start(self, module: nn.Module) -> ModuleState:
        """Take a snapshot of the module before a forward."""
        before = self.look(module)
        if self.initial is None:
            self.initial = before
        return before

    def begin(self, module: nn.Module) -> None:
        """Take a snapshot of the module before its first forward here; tried once."""
        if not self._begun:
            self._begun = True
            with contained("take a snapshot of a module"):
                self.start(module)

    def look(self, module: nn.Module) -> ModuleState:
        return ModuleState({self.name: module}, keep=True)

    def run(self, call: Call) -> Any:
        """Run a call and check what it changes in the module. Returns its result, even if the check
        fails."""
        with RandomStates(_device(call.target.module)) as states:
            return self._run(call, states)

    def _run(self, call: Call, states: RandomStates) -> Any:
        module, first = call.target.module, self._fresh
        self._fresh, began = False, now()
        self.seconds = 0.0
        before: ModuleState | None = None
        with contained("prepare the check of a forward"):
            arguments = ArgumentSnapshot(*call.args, *call.kwargs.values())
            twin = dataclasses.replace(call, args=copied(call.args), kwargs=copied(call.kwargs))
            before = self.start(module)
        self.seconds += now() - began
        output = call.run()
        if before is None:
            return output
        began = now()
        with contained("check a forward"):
            after = self.look(module)
            change = before.change(after)
            if change or first:
                drew = states.changed() or arguments.drew()
                self._again(twin, _clone(output), after, compare=not drew)
            if change and self.found is None:
                self._compare_with_the_last(_kind(call.kind), before, after)
        self.seconds += now() - began
        return output

    def _again(self, call: Call, kept: list[Any], after: ModuleState, *, compare: bool) -> None:
        """Run the same call again: without state, it changes nothing and gives the same result."""
        with RandomStates(_device(call.target.module)) as states:
            self._run_again(call, kept, after, states, compare=compare)

    def _run_again(
        self,
        call: Call,
        kept: list[Any],
        after: ModuleState,
        states: RandomStates,
        *,
        compare: bool,
    ) -> None:
        arguments = ArgumentSnapshot(*call.args, *call.kwargs.values())
        try:
            output = call.run()
            change = after.change(self.look(call.target.module))
            if change:
                self.found = f"a forward changes {some(change.paths)}"
                change.undo()
            elif compare and kept and not equal(kept[0], output):
                again = call.run() if on_a_device(output) else None
                if again is None or not close(kept[0], output, again):
                    self.found = "the same call gives another result when it is run again"
        except Exception as error:
            if not ran_out(error):
                self.found = f"it raises {type(error).__name__} when the same call is run again"
        finally:
            # only if the call draws random numbers; otherwise another thread may have drawn them,
            # which must not draw the same again
            if not compare:
                states.put_back()
            arguments.put_back()

    def _compare_with_the_last(
        self, kind: Hashable, before: ModuleState, after: ModuleState
    ) -> None:
        """A kind of call must write the same each time; otherwise that depends on earlier calls."""
        change = before.change(after)
        places, marks = change.places, after.marks(change.places)
        last_places, last_marks = self._written.get(kind, (frozenset(), {}))
        if any(last_marks.get(place) != marks.get(place) for place in places & last_places):
            self.found = f"calls write different values to {some(change.paths)}"
        self._written[kind] = (places, marks)


def same(first: Any, second: Any, again: Any) -> bool:
    """Whether two results of one call are bitwise equal, or on a device that sums in any order,
    within the noise between the first and `again`, the next run."""
    if equal(first, second):
        return True
    return on_a_device(second) and (again is None or close(second, first, again))


def on_a_device(output: Any) -> bool:
    return any(tensor.device.type != "cpu" for tensor in tensors(output))


def _kind(kind: Hashable) -> Hashable:
    """The kind of a call; None for all calls that have a kind of their own."""
    return kind if isinstance(kind, tuple) else None


def name_of(user: Any) -> Any:
    """A key of a job, unique also among ended ones."""
    return getattr(user, "id", id(user))


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _clone(output: Any) -> list[Any]:
    """A copy of a result; nothing if it cannot be copied."""
    try:
        return [cloned(output)]
    except Exception:
        return []
