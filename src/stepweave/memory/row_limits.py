"""How many rows fit into memory: measured if the device allows it, and learnt from failures."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from stepweave.memory.device import DeviceMemory
from stepweave.scheduling.task import Key

RECOVERY = 200  # forwards that must fit before a cap rises; doubles each time that it falls
SLOWEST = 64  # maximum of that, in units of RECOVERY
KEPT = 1024  # kinds of calls; the least recently used is dropped
TIMES = 3  # measurements of each number of rows: the first forwards may benchmark kernels
T = TypeVar("T")


class RowLimits:
    """How many rows of each kind of call fit.

    Bytes per row are those of the largest measured forward, divided by its rows. That counts fixed
    memory for each row, so the estimate is never too low. Rows with adapters are measured apart,
    and take no less than those with fewer. A kind that ran out nevertheless gets a cap of half the
    rows tried, which rises by an eighth after RECOVERY forwards.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._caps: OrderedDict[Hashable, _Cap] = OrderedDict()
        # by kind, and the same by cost key, which is known at admission; each with the number of
        # adapters
        self._sizes: OrderedDict[Hashable, _Size] = OrderedDict()
        self._keys: OrderedDict[Hashable, _Size] = OrderedDict()
        self._available: int | None = None  # bytes, last measured between forwards
        self._measuring = False

    def limit(self, kind: Hashable, rows: int, adapters: int = 0) -> int:
        """The number of `rows` with so many adapters that should fit, at least one."""
        cap, sizes = self._caps.get(kind), _known(self._sizes, kind, adapters)
        if cap is not None:
            rows = min(rows, cap.rows)
        if any(size.bytes > 0 for size in sizes):
            self._available = available = self.memory.available()
            if available is not None:
                rows = min(rows, *(size.fitting(available) for size in sizes if size.bytes > 0))
        return max(1, rows)

    def fits(self, key: Key, rows: int) -> bool:
        """Whether this many rows of calls of a key should fit now; True if unknown. For any
        thread."""
        available = self._available
        sizes = _known(self._keys, key.plain, key.adapters)
        return available is None or all(
            available * size.rows >= size.bytes * rows for size in sizes
        )

    @contextlib.contextmanager
    def measured(self, kind: Hashable, rows: int, key: Key | None = None) -> Iterator[None]:
        """Measure the memory of a forward within the block, unless it is known."""
        adapters = 0 if key is None else key.adapters
        size = self._sizes.get((kind, adapters))
        unique = not isinstance(kind, (tuple, str))  # no other call is of this kind
        done = size is not None and (rows, 0) <= (size.rows, size.times - TIMES)
        if unique or self._measuring or done:
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
            times = size.times + 1 if size is not None and size.rows == rows else 1
            _put(self._sizes, (kind, adapters), size := _Size(rows, taken, times))
            if key is not None:
                _put(self._keys, (key.plain, adapters), size)

    def failed(self, kind: Hashable, rows: int) -> None:
        """Learn that a forward of this many rows did not fit; a measurement in progress is
        dropped."""
        self._measuring = False
        cap = self._caps.get(kind)
        if rows == 1 or (cap is not None and rows // 2 >= cap.rows):
            return  # no new limit for batches
        patience = RECOVERY if cap is None else min(2 * cap.patience, SLOWEST * RECOVERY)
        _put(self._caps, kind, _Cap(rows // 2, patience))

    def fitted(self, kind: Hashable) -> None:
        """Count a forward that did fit, of any number of rows: calls of many rows each may never
        reach the cap itself."""
        cap = self._caps.get(kind)
        if cap is not None:
            cap.count()


class _Size(NamedTuple):
    rows: int
    bytes: int
    times: int  # measured

    def fitting(self, available: int) -> int:
        """Rows that fit into this many bytes."""
        return available * self.rows // self.bytes


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


def _known(values: Mapping[Hashable, _Size], kind: Hashable, adapters: int) -> list[_Size]:
    """The sizes that are known of rows of a kind with so many adapters, and with fewer."""
    sizes = (values.get((kind, number)) for number in range(adapters + 1))
    return [size for size in sizes if size is not None]


def _put(values: OrderedDict[Hashable, T], kind: Hashable, value: T) -> None:
    values[kind] = value
    values.move_to_end(kind)
    if len(values) > KEPT:
        values.popitem(last=False)
