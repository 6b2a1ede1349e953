"""Jobs that wait for their first forward, in the order in which they would have it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from stepweave.scheduling.policy import Rank

Entry = tuple[Rank, int, str]  # the number tells equals apart, the first to come first


class Line:
    """No two jobs have the same place: 1 for the first, one less once one before it has left.

    Ranks are those of when a job joined, or of the last `arrange`. To join, to leave and to ask
    takes microseconds, also among thousands. For one thread at a time.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._of: dict[str, Entry] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def join(self, id: str, rank: Rank) -> None:
        """A job begins to wait."""
        self._number += 1
        entry = self._of[id] = (rank, self._number, id)
        insort(self._entries, entry)

    def leave(self, id: str) -> None:
        """It waits no longer; no effect if it did not."""
        entry = self._of.pop(id, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry)]

    def place(self, id: str) -> int:
        """1 for the first, 0 for a job that does not wait."""
        entry = self._of.get(id)
        return 0 if entry is None else 1 + bisect_left(self._entries, entry)

    def places(self) -> dict[str, int]:
        """Of all that wait, in order."""
        return {id: place for place, (_, _, id) in enumerate(self._entries, 1)}

    def arrange(self, ranks: Iterable[tuple[str, Rank]]) -> None:
        """Give jobs new ranks, in order if it is to be quick; those that wait no more are skipped,
        others keep theirs."""
        new = {id: (rank, self._of[id][1], id) for id, rank in ranks if id in self._of}
        others = [entry for id, entry in self._of.items() if id not in new]
        self._of |= new
        # what is in order already takes no sorting
        self._entries = sorted([*new.values(), *others])
