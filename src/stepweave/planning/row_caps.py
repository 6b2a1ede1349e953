"""How many rows a forward may have: within memory, and not beyond the knee."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from stepweave.planning.cost import GAIN, KEYS, CostModel
from stepweave.scheduling.queues import Queues, WaitingCall
from stepweave.scheduling.task import Demand, Key

# one batch in this many that the knee has cut off may be twice as large, to test the knee
EXPLORE_EVERY = 32


def with_rest(knee: int, most: int, waiting: int) -> int:
    """How many of the waiting rows a forward may have: all, if it would leave less than half as
    many as it takes. So few would wait, or run in a forward that does not pay."""
    return waiting if knee < waiting <= min(most, knee * 3 // 2) else knee


def waiting_rows(call: WaitingCall, queues: Queues[Any]) -> int:
    """The rows that wait for the call's key, and if it is one of a step, those of jobs that will
    join once their calls before the first step are done."""
    rows: int = sum(one.rows for one in queues[call.key])
    demand = call.task.demand
    if call.task.opened and call.task.left:
        others = (one.task for queue in queues.values() for one in queue if not one.task.opened)
        rows += sum(one.demand.rows for one in others if one.demand.kind == demand.kind)
    return rows


class RowCaps:
    """The row limits of forwards by cost key.

    Args:
        most: rows of any forward.
        merges: whether jobs share forwards.
        knee: whether forwards stop at the knee.
    """

    def __init__(self, cost: CostModel, most: int, *, merges: bool, knee: bool) -> None:
        self._cost = cost
        self._most = most
        self._merges = merges
        self._knee = knee
        self.ignore_knee = False  # during a warm-up
        self._last: dict[Key, int] = {}  # limits for predictions: of one call if not merged
        self._allowed: dict[Key, int] = {}  # limits of the last choice
        self._cut = 0  # batches cut off since the last test of the knee
        self._test: tuple[Key, int] | None = None  # key and rows of a test that runs

    def choosing(self, limit: Callable[[Any], int], queues: Queues[Any]) -> Callable[[Any], int]:
        """The row limit of each call for one choice: `limit`, or the knee; or all rows that wait
        for the call's key, or are about to, if few would be left."""
        explores = self._cut >= EXPLORE_EVERY
        cuts = self._knee and not self.ignore_knee
        knees: dict[tuple[Key, int], int] = {}
        waiting: dict[Hashable, int] = {}
        if len(self._last) > KEYS:
            self._last.clear()
            self._allowed.clear()

        def cap(call: Any) -> int:
            most = limit(call)
            knee = knees.get((call.cost, most))
            if knee is None:
                knee = self._cost.knee(call.cost, most) if cuts else most
                knees[call.cost, most] = knee = min(most, 2 * knee) if explores else knee
            self._last[call.cost] = self._allowed[call.cost] = knee
            if call.key not in waiting:
                waiting[call.key] = waiting_rows(call, queues)
            return with_rest(knee, most, waiting[call.key])

        return cap

    def chosen(self, key: Key, rows: int, *, cut: bool) -> None:
        """Note the chosen batch, and whether the knee has cut it off."""
        if self._cut >= EXPLORE_EVERY:
            self._cut = 0
            self._test = key, rows
        elif cut:
            self._cut += 1

    def ran(self, key: Key, rows: int, seconds: float) -> None:
        """Note a forward, before the cost model learns of it. A test of the knee that paid is
        repeated at once: the model may know these rows from a time when the machine was slower."""
        if self._test != (key, rows):
            return
        self._test = None
        knee = self._cost.knee(key, self._most)
        if rows > knee and rows * self._cost.seconds(key, knee) > (1 + GAIN) * knee * seconds:
            self._cut = EXPLORE_EVERY

    def last(self, key: Key) -> int:
        """The last row limit of a forward of this key; 0 before the first."""
        return self._allowed.get(key, 0)

    def alone(self, key: Key, rows: int) -> None:
        """Note that calls of this key, with this many rows, are not merged."""
        self._last[key] = rows

    def of(self, demand: Demand) -> int:
        """The most rows of a step that such jobs share, in rows of its first module; 0 if they
        share none."""
        if not self._merges or not demand.step:
            return 0
        return min(
            (self._last.get(load.key) or self._cost.knee(load.key, self._most))
            * demand.rows
            // load.rows
            for load in demand.step
        )
