"""How many rows fit into memory, learnt from the forwards that did not fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

RECOVERY = 200  # forwards that fit, before a cap rises
KEPT = 1024  # kinds of calls; the least recently used goes first


class RowCaps:
    """A cap for each kind of call that ran out of memory: half of what was tried, rising by an eighth now and then."""

    def __init__(self) -> None:
        self._caps: OrderedDict[Hashable, list[int]] = OrderedDict()  # rows, forwards since it changed

    def limit(self, kind: Hashable, rows: int) -> int:
        """As many of `rows` as are known to fit."""
        known = self._caps.get(kind)
        return rows if known is None else min(rows, known[0])

    def failed(self, kind: Hashable, rows: int) -> None:
        """A forward of so many rows did not fit."""
        self._caps[kind] = [max(1, min(rows, self.limit(kind, rows)) // 2), 0]
        self._caps.move_to_end(kind)
        if len(self._caps) > KEPT:
            self._caps.popitem(last=False)

    def fitted(self, kind: Hashable) -> None:
        """A forward did fit, of however many rows: calls that have many each may never get to the cap itself."""
        known = self._caps.get(kind)
        if known is None:
            return
        known[1] += 1
        if known[1] >= RECOVERY:
            known[:] = [known[0] + max(1, known[0] // 8), 0]
