"""How many rows a forward may have: no more than fit, nor than pay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepweave.planning.cost import KEYS, CostModel
from stepweave.scheduling.task import Demand, Key

# groups that were cut off at the knee, before one is let grow to twice that: the knee may have been
# a bad guess
EXPLORE_EVERY = 64


class RowCaps:
    """The caps of forwards by what their seconds depend on.

    Args:
        most: rows of any forward.
        merges: whether jobs share forwards.
        knee: whether forwards have no more rows than pay.
    """

    def __init__(self, cost: CostModel, most: int, *, merges: bool, knee: bool) -> None:
        self._cost = cost
        self._most = most
        self._merges = merges
        self._knee = knee
        self.ignore_knee = False  # while a warm-up wants rows that do not pay, too
        self._last: dict[Key, int] = {}  # rows that forwards had at most, as predictions want
        self._allowed: dict[Key, int] = {}  # rows that they were allowed, shared or not
        self._cut = 0  # groups, since one was let grow

    def choosing(self, limit: Callable[[Any], int]) -> Callable[[Any], int]:
        """The cap of each call while calls are chosen, of at most `limit` rows."""
        explores = self._cut >= EXPLORE_EVERY
        cuts = self._knee and not self.ignore_knee
        knees: dict[tuple[Key, int], int] = {}
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
            return knee

        return cap

    def chosen(self, *, cut: bool) -> None:
        """Note whether a group was cut off below what fits."""
        if self._cut >= EXPLORE_EVERY:
            self._cut = 0
        elif cut:
            self._cut += 1

    def last(self, key: Key) -> int:
        """Rows that a forward was last allowed; 0 before there was any."""
        return self._allowed.get(key, 0)

    def alone(self, key: Key, rows: int) -> None:
        """Forwards like one of so many rows are not shared."""
        self._last[key] = rows

    def of(self, demand: Demand) -> int:
        """The most rows of a step that such jobs share, by the rows of its first module; 0 if they
        share none."""
        if not self._merges or not demand.step:
            return 0
        return min(
            (self._last.get(load.key) or self._cost.knee(load.key, self._most))
            * demand.rows
            // load.rows
            for load in demand.step
        )
