"""How many rows fit into memory: measured where the device can tell, and learnt from the forwards
that did not fit."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import NamedTuple, TypeVar

from stepweave.memory.device import DeviceMemory
from stepweave.scheduling.task import Key

# forwards that fit, before a cap rises for the first time; twice as many after each fall
RECOVERY = 200
SLOWEST = 64  # times RECOVERY
KEPT = 1024  # kinds of calls; the least recently used goes first
TIMES = 3  # forwards of as many rows that are measured: the first may try out kernels
T = TypeVar("T")


class RowLimits:
    """How many rows of each kind of call fit.

    Bytes a row are those of the largest forward that was measured, divided by its rows: what is
    needed once is counted for each row, so more rows are never thought to fit than do. A kind that
    ran out nevertheless has a cap, half of what was tried, that rises by an eighth now and then.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._caps: OrderedDict[Hashable, _Cap] = OrderedDict()
        self._sizes: OrderedDict[Hashable, _Size] = OrderedDict()
        # the same, by what admission knows of a call
        self._keys: OrderedDict[Hashable, _Size] = OrderedDict()
        self._available: int | None = None  # bytes, when last looked at: between forwards
        self._measuring = False

    def limit(self, kind: Hashable, rows: int) -> int:
        """As many of `rows` as should fit, at least one."""
        cap, size = self._caps.get(kind), self._sizes.get(kind)
        if cap is not None:
            rows = min(rows, cap.rows)
        if size is not None and size.bytes > 0:
            self._available = available = self.memory.available()
            if available is not None:
                rows = min(rows, available * size.rows // size.bytes)
        return max(1, rows)

    def fits(self, key: Key, rows: int) -> bool:
        """Whether so many rows of the calls of a key should fit now; yes if that is not known. May
        be asked on any thread."""
        size, available = self._keys.get(key), self._available
        return size is None or available is None or available * size.rows >= size.bytes * rows

    @contextlib.contextmanager
    def measured(self, kind: Hashable, rows: int, key: Key | None = None) -> Iterator[None]:
        """Learn what a forward of so many rows takes, unless that is known."""
        known = self._sizes.get(kind)
        # a call that could not be described: no other is of its kind
        nameless = not isinstance(kind, (tuple, str))
        if (
            nameless
            or self._measuring
            or (known is not None and (rows, 0) <= (known.rows, known.times - TIMES))
        ):
            yield
            return
        self._measuring = True
        self.memory.start()
        try:
            yield
        finally:
            undisturbed, self._measuring = self._measuring, False
        taken = self.memory.taken()
        if taken is not None and undisturbed:
            times = known.times + 1 if known is not None and known.rows == rows else 1
            _put(self._sizes, kind, size := _Size(rows, taken, times))
            if key is not None:
                _put(self._keys, key, size)

    def failed(self, kind: Hashable, rows: int) -> None:
        """A forward of so many rows did not fit. What is being measured is not worth knowing
        then."""
        self._measuring = False
        known = self._caps.get(kind)
        if rows == 1 or (known is not None and rows // 2 >= known.rows):
            return  # that says nothing of how many rows may run together
        patience = RECOVERY if known is None else min(2 * known.patience, SLOWEST * RECOVERY)
        _put(self._caps, kind, _Cap(rows // 2, patience))

    def fitted(self, kind: Hashable) -> None:
        """A forward did fit, of however many rows: calls that have many each may never get to the
        cap itself."""
        known = self._caps.get(kind)
        if known is not None:
            known.count()


class _Size(NamedTuple):
    rows: int
    bytes: int
    times: int  # measured


class _Cap:
    def __init__(self, rows: int, patience: int) -> None:
        self.rows = rows
        self.patience = patience
        self._fitted = 0

    def count(self) -> None:
        self._fitted += 1
        if self._fitted >= self.patience:
            self.rows += max(1, self.rows // 8)
            self._fitted = 0


def _put(known: OrderedDict[Hashable, T], kind: Hashable, value: T) -> None:
    known[kind] = value
    known.move_to_end(kind)
    if len(known) > KEPT:
        known.popitem(last=False)
