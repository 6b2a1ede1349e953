"""Snapshots of a call's arguments, to detect and undo changes before another attempt."""

from __future__ import annotations

from typing import Any

import torch

from stepweave.compat.nested import COLLECTIONS, DEEPEST, contents, is_holder


class ArgumentSnapshot:
    """The versions of tensors, the states of generators, and the contents of lists, dictionaries
    and plain objects."""

    def __init__(self, *values: Any) -> None:
        self._tensors: list[tuple[torch.Tensor, int]] = []
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._held: list[tuple[Any, Any]] = []  # a list or a dictionary, and a copy
        for value in values:
            self._note(value, 0)

    def _note(self, value: Any, depth: int) -> None:
        if value is None or isinstance(value, (bool, int, float, str)):
            return
        if isinstance(value, torch.Tensor):
            if not value.is_inference():  # such tensors do not count writes
                self._tensors.append((value, value._version))
            return
        if isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
            return
        if depth > DEEPEST or not (isinstance(value, COLLECTIONS) or is_holder(value)):
            return
        if isinstance(value, list):
            self._held.append((value, list(value)))
        elif not isinstance(value, tuple):
            inside = value if isinstance(value, dict) else vars(value)
            self._held.append((inside, dict(inside)))
        for item in contents(value):
            self._note(item, depth + 1)

    def overwritten(self) -> bool:
        """Whether a tensor was overwritten, which cannot be undone."""
        return any(tensor._version != version for tensor, version in self._tensors)

    def wrote(self) -> bool:
        """Whether a call changed its arguments. Emptying a list does not count: UNets do that."""
        return self.overwritten() or any(_filled(now, before) for now, before in self._held)

    def drew(self) -> bool:
        """Whether random numbers were drawn from a generator."""
        return any(not torch.equal(item.get_state(), state) for item, state in self._generators)

    def put_back(self) -> None:
        """Undo all changes but writes to tensors."""
        for generator, state in self._generators:
            generator.set_state(state)
        for now, before in self._held:
            if isinstance(now, list):
                now[:] = before
            else:
                now.clear()
                now.update(before)


def _filled(now: Any, before: Any) -> bool:
    if isinstance(now, list):
        old = set(map(id, before))
        return len(now) > len(before) or any(id(item) not in old for item in now)
    return now.keys() != before.keys() or any(
        value is not before[key] for key, value in now.items()
    )
