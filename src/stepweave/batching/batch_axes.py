"""Readings: what an argument is taken for where its shape leaves a choice.

A tensor of eight rows beside a sample of two may be a constant, or hold four entries for each row;
one of a single row may be the only row's, or a constant; a list of as many tensors as there are
rows, each with as many rows, may hold one for each row, or be a list of constant length. The
likeliest reading comes first. Another is tried when calls part over the argument's values, or when
a proof fails; and a proof tells whether it was right.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

Path = tuple[Hashable, ...]  # an argument's name, then indices and keys down to the tensor
Guess = tuple[Path, str]

# of a list: each of its tensors has all rows, or there is one for each row
ITEMS, PER_ROW = "items", "per row"

SEEN = 256  # values remembered, to notice that an argument varies


class Readings:
    """The readings of one target's arguments that are not the first."""

    def __init__(self) -> None:
        self._chosen: dict[Path, str] = {}
        self._proven: set[Guess] = set()
        self._refuted: set[Guess] = set()
        self._seen: OrderedDict[Hashable, bytes] = OrderedDict()

    def of(self, path: Path) -> str | None:
        """The reading to use in place of the first, if there is one."""
        return self._chosen.get(path)

    def vary(
        self, path: Path, context: Hashable, value: bytes, others: Sequence[str]
    ) -> str | None:
        """Note an argument's value; once it is not what it was in the same context, try the
        `others` in turn."""
        if not self._is_the_same((path, context), value) and path not in self._chosen:
            self._choose(path, others)
        return self.of(path)

    def remains(self, path: Path, context: Hashable, value: bytes) -> bool:
        """Note the value of an argument that is supposed to be shared. With a second one it is so
        no longer."""
        if self._is_the_same((path, context), value):
            return True
        self._proven.discard((path, "shared"))
        self.refute([(path, "shared")])
        return False

    def _is_the_same(self, key: Hashable, value: bytes) -> bool:
        known = self._seen.setdefault(key, value)
        self._seen.move_to_end(key)
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return known == value

    def suppose(self, paths: Iterable[Path], reading: str) -> bool:
        """Try a reading of several arguments at once. False if there is none to try."""
        new = [
            path
            for path in paths
            if path not in self._chosen and (path, reading) not in self._refuted
        ]
        for path in new:
            self._chosen[path] = reading
        return bool(new)

    def prove(self, guesses: Iterable[Guess]) -> None:
        """A proof that made these guesses has succeeded."""
        self._proven.update(guesses)

    def refute(self, guesses: Iterable[Guess]) -> bool:
        """A proof that made these guesses has failed: none that was never proven is made again.
        False if there is none."""
        wrong = set(guesses) - self._proven
        for path, reading in wrong:
            self._refuted.add((path, reading))
            if self._chosen.get(path) == reading:
                del self._chosen[path]
        return bool(wrong)

    def another(self, guesses: Sequence[Guess], equal: Iterable[Path]) -> bool:
        """Whether there is another way to read calls whose first proof failed, and that made these
        guesses; `equal` are the arguments of theirs that had rows, and did not differ."""
        if self.suppose([path for path, reading in guesses if reading == ITEMS], PER_ROW):
            return True
        if others := [(path, reading) for path, reading in guesses if reading != ITEMS]:
            # what is supposed to be shared is so since it failed as rows
            return self.refute(others) and any(reading != "shared" for _, reading in others)
        return self.suppose(equal, "shared")

    def _choose(self, path: Path, others: Sequence[str]) -> None:
        for reading in others:
            if (path, reading) not in self._refuted:
                self._chosen[path] = reading
                return


def made(paths: Iterable[Path], guesses: Iterable[Guess]) -> tuple[tuple[Path, str | None], ...]:
    """How arguments are read, None for the first reading."""
    found: dict[Path, str | None] = dict.fromkeys(paths)
    found |= {path: None if reading == ITEMS else reading for path, reading in guesses}
    return tuple(found.items())
