"""A stored forecast: when each job ends, and when a later job would, without a new simulation."""

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
    """The prediction for a job submitted now, in seconds; `finish` is never less than `solo`."""

    finish: float  # until it is done
    solo: float  # its duration on an idle engine; 0 if unknown
    fits: bool = True  # whether it fits into free memory

    def __post_init__(self) -> None:
        # they may be calculated with different prices
        object.__setattr__(self, "finish", max(self.finish, self.solo))

    @property
    def wait(self) -> float:
        """Seconds that it waits for others."""
        return self.finish - self.solo


class QueuePosition(NamedTuple):
    """A job's `position`, 0 once it runs, 1 for the first that waits; and `eta`, seconds until it
    will be done, or None if unknown."""

    position: int
    eta: float | None


class Plan:
    """The predictions for some jobs at one time, and for jobs that arrived since. `add` is for one
    thread at a time; all else for any.

    Args:
        made: time, in seconds of the tasks' clock.
        ids, tasks: the jobs.
        ends: seconds from `made` until each will be done, by `forecast`.
        order: the policy's.
        took: seconds that the forecast took.
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
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        self.made = made
        self.took = took
        self.size = len(tasks)  # without later jobs
        self._order = order
        ranks = [order(task, made) for task in tasks]
        ordered = in_order(ranks, pause)
        self._ends = {
            id: end if task.solo else None for id, task, end in zip(ids, tasks, ends, strict=True)
        }
        self._ranks = [ranks[i] for i in ordered]
        # when each job and all before it are done, in order
        self._ended = list(accumulate((ends[i] for i in ordered), max))
        self._kinds: set[Hashable] = {task.demand.kind for task in tasks}
        # by kind and rows: ranks in order, and ends
        self._alike: dict[Hashable, tuple[list[Rank], list[float]]] = {}
        for i in ordered:
            alike = self._alike.setdefault((tasks[i].demand.kind, tasks[i].demand.rows), ([], []))
            alike[0].append(ranks[i])
            alike[1].append(ends[i])
        work = sum(task.remaining for task in tasks)
        # seconds with shared forwards, for each second of work alone
        self._sharing = max(ends, default=0.0) / work if work > 0 else 1.0
        self._complete = all(task.solo for task in tasks)
        self._later: list[Rank] = []  # of later jobs, in order
        self._later_work: list[float] = []  # seconds of each, with shared forwards

    def __len__(self) -> int:
        return len(self._ends)

    def has(self, id: str) -> bool:
        return id in self._ends

    def eta(self, id: str, now: float) -> float | None:
        """Seconds until a job will be done, at least 0; None if the job or its work is unknown."""
        end = self._ends.get(id)
        return None if end is None else max(0.0, end - (now - self.made))

    @property
    def later(self) -> int:
        """The number of jobs that arrived since the plan was made."""
        return len(self._later)

    def predicts(self) -> bool:
        """Whether every job's work is known."""
        return self._complete

    def has_kind(self, kind: Hashable) -> bool:
        """Whether the plan has jobs of this kind, which may share steps."""
        return kind in self._kinds

    def backlog(self, now: float) -> float:
        """Seconds until all jobs will be done."""
        done = self._ended[-1] if self._ended else 0.0
        return max(0.0, done - (now - self.made)) + sum(self._later_work)

    def finish(self, task: Task, seconds: float, now: float) -> float:
        """Seconds until a job that arrives now will be done, if it takes `seconds` once it runs.

        It gets the end of the next job of its kind and rows, which shares steps with those before
        it. After the last of these, it is assumed to start when all jobs before it are done, which
        is late by at most `seconds`.
        """
        rank = self._order(task, now)
        age, later = now - self.made, sum(self._later_work[: bisect_right(self._later, rank)])
        place = bisect_right(self._ranks, rank)
        finish = max(0.0, self._ended[place - 1] - age if place else 0.0) + seconds
        ranks, ends = self._alike.get((task.demand.kind, task.demand.rows), ((), ()))
        place = bisect_right(ranks, rank)
        if place < len(ranks):
            finish = min(finish, max(seconds, ends[place] - age))
        return finish + later

    def add(self, id: str, task: Task, seconds: float, now: float) -> None:
        """Add a job that has arrived. Arguments as for `finish`."""
        rank = self._order(task, now)
        later = bisect_right(self._later, rank)
        work = self._sharing * task.solo
        predicted = task.solo > 0 and math.isfinite(self.made)
        self._ends[id] = self.finish(task, seconds, now) + now - self.made if predicted else None
        self._complete = self._complete and task.solo > 0
        self._later_work.insert(later, work)  # before the rank, for readers on other threads
        self._later.insert(later, rank)
