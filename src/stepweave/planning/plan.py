"""A forecast that is kept: when each job ends, and where one that comes later fits in, without
playing all through again."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from stepweave.planning.forecast import Order, in_order
from stepweave.scheduling.policy import Rank
from stepweave.scheduling.task import Task


@dataclass(frozen=True)
class Estimate:
    """What a job would meet if it were submitted now, in seconds. It is never done sooner than it
    would be alone."""

    finish: float  # until it is done
    solo: float  # what it takes alone; 0 if unknown
    fits: bool = True  # into the memory that is left

    def __post_init__(self) -> None:
        # the two may come of what was known at two moments
        object.__setattr__(self, "finish", max(self.finish, self.solo))

    @property
    def wait(self) -> float:
        """For others."""
        return self.finish - self.solo


class QueuePosition(NamedTuple):
    """Where a job stands: `position` 0 once it runs, else 1 for the first of those that wait;
    seconds until it will be done, None while nothing is known of what such jobs take."""

    position: int
    eta: float | None


class Plan:
    """What was foreseen of some jobs at a moment, and of those that came since.

    `add` is for one thread at a time; all else for any.

    Args:
        made: when, in seconds of the tasks' clock.
        ids, tasks, ends: of the jobs, and the seconds from then until each will be done, as
        `forecast` tells.
        order: in which they are served.
        took: seconds that the forecast took to make.
    """

    def __init__(
        self,
        made: float,
        ids: Sequence[str],
        tasks: Sequence[Task],
        ends: Sequence[float],
        order: Order,
        *,
        took: float = 0.0,
        breathe: Callable[[], object] = lambda: None,
    ) -> None:
        self.made = made
        self.took = took
        self.size = len(tasks)  # less those that came since
        self._order = order
        ranks = [order(task, made) for task in tasks]
        ordered = in_order(ranks, breathe)
        self._ends = {
            id: end if task.solo else None for id, task, end in zip(ids, tasks, ends, strict=True)
        }
        self._ranks = [ranks[i] for i in ordered]
        # when all up to each in order are done
        self._ended = list(accumulate((ends[i] for i in ordered), max))
        self._kinds: set[Hashable] = {task.kind for task in tasks}
        self._alike: dict[
            Hashable, tuple[list[Rank], list[float]]
        ] = {}  # of a kind and as many rows: ranks in order, and ends
        for i in ordered:
            alike = self._alike.setdefault((tasks[i].kind, tasks[i].demand.rows), ([], []))
            alike[0].append(ranks[i])
            alike[1].append(ends[i])
        work = sum(task.remaining for task in tasks)
        self._sharing = (
            max(ends, default=0.0) / work if work > 0 else 1.0
        )  # seconds for each that a job would take alone
        self._complete = all(task.solo for task in tasks)
        self._later: list[Rank] = []  # of jobs that came since, in order
        self._later_work: list[float] = []  # seconds that each takes, in company

    def __len__(self) -> int:
        return len(self._ends)

    def eta(self, id: str, now: float) -> float | None:
        """Seconds until a job will be done, at least 0; None if the plan does not know it, or
        nothing of what it takes."""
        end = self._ends.get(id)
        return None if end is None else max(0.0, end - (now - self.made))

    @property
    def later(self) -> int:
        """Jobs that came since it was made."""
        return len(self._later)

    def predicts(self) -> bool:
        """Whether something is known of every job's work."""
        return self._complete

    def has_kind(self, kind: Hashable) -> bool:
        """Whether there were jobs whose steps may share forwards with those of this kind."""
        return kind in self._kinds

    def backlog(self, now: float) -> float:
        """Seconds until all will be done."""
        done = self._ended[-1] if self._ended else 0.0
        return max(0.0, done - (now - self.made)) + sum(self._later_work)

    def finish(self, task: Task, own: float, now: float) -> float:
        """Seconds until a job that comes now will be done, which then takes `own` seconds, once it
        runs.

        It takes the place of the next one of its kind and rows, which shares its steps with those
        before it; the last of these is taken to begin once all that go before it are done, which is
        late by at most `own`.
        """
        rank = self._order(task, now)
        age, later = now - self.made, sum(self._later_work[: bisect_right(self._later, rank)])
        place = bisect_right(self._ranks, rank)
        finish = max(0.0, self._ended[place - 1] - age if place else 0.0) + own
        ranks, ends = self._alike.get((task.kind, task.demand.rows), ((), ()))
        place = bisect_right(ranks, rank)
        if place < len(ranks):
            finish = min(finish, max(own, ends[place] - age))
        return finish + later

    def add(self, id: str, task: Task, own: float, now: float) -> None:
        """A job has come, as for `finish`."""
        rank = self._order(task, now)
        later = bisect_right(self._later, rank)
        work = self._sharing * task.solo
        known = task.solo > 0 and math.isfinite(self.made)
        self._ends[id] = self.finish(task, own, now) + now - self.made if known else None
        self._complete = self._complete and task.solo > 0
        self._later_work.insert(later, work)  # first, so that others find none missing
        self._later.insert(later, rank)
