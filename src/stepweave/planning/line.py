"""The queue of jobs that wait for their first forward, with their positions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from stepweave.scheduling.policy import Rank

Entry = tuple[Rank, int, str]  # rank, order of arrival, id


class Line:
    """Waiting jobs, sorted by rank. The first has place 1.

    A rank is that of joining, or of the last `arrange`. `join`, `leave` and `place` take
    microseconds, even for thousands of jobs. Not thread-safe.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._of: dict[str, Entry] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def join(self, id: str, rank: Rank) -> None:
        self._number += 1
        entry = self._of[id] = (rank, self._number, id)
        insort(self._entries, entry)

    def leave(self, id: str) -> None:
        """Remove a job, if it waits."""
        entry = self._of.pop(id, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry)]

    def place(self, id: str) -> int:
        """The place of a job; 0 if it does not wait."""
        entry = self._of.get(id)
        return 0 if entry is None else 1 + bisect_left(self._entries, entry)

    def places(self) -> dict[str, int]:
        """The places of all jobs, in order."""
        return {id: place for place, (_, _, id) in enumerate(self._entries, 1)}

    def arrange(self, ranks: Iterable[tuple[str, Rank]]) -> None:
        """Give jobs new ranks, best in order; jobs that do not wait are skipped, jobs that are not
        listed keep their ranks."""
        new = {id: (rank, self._of[id][1], id) for id, rank in ranks if id in self._of}
        others = [entry for id, entry in self._of.items() if id not in new]
        self._of |= new
        # fast if they are already in order
        self._entries = sorted([*new.values(), *others])
