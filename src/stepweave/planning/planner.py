"""What an engine knows of its jobs' work, and whose turn it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from stepweave.contained import contained
from stepweave.planning.forecaster import Forecaster
from stepweave.planning.jobs import PlannedJob
from stepweave.planning.row_caps import RowCaps
from stepweave.planning.work import Work
from stepweave.scheduling.policy import Policy, Rank, srpt
from stepweave.scheduling.queues import CallT, Queues, WaitingCall
from stepweave.scheduling.task import Demand, Key

# module, rows, the most rows that were allowed, seconds
OnStep = Callable[[str, int, int, float], None]

JobT = TypeVar("JobT", bound=PlannedJob)


class Planner:
    """The engine's threads tell it what runs, and ask which jobs and calls are next; any thread may
    ask for predictions.

    An error of planning is logged, and costs no job more than its turn.

    Args:
        pipeline: whose call the jobs make.
        policy: which calls go next.
        max_rows: of a step.
        merges: whether jobs share forwards.
        whole: whether all that is seen of jobs are their whole calls.
        knee: whether forwards have no more rows than pay, if the policy does.
        on_step: told of each forward.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        policy: Policy = srpt,
        max_rows: int,
        merges: bool = True,
        whole: bool = False,
        knee: bool = True,
        on_step: OnStep = lambda module, rows, cap, seconds: None,
    ) -> None:
        self.pipeline = pipeline
        self._policy = policy
        self._on_step = on_step
        self.work = Work(whole=whole)
        self.cost = cost = self.work.cost
        self.caps = RowCaps(cost, max_rows, merges=merges, knee=knee and policy.cuts_at_knee)
        self.forecaster = Forecaster(self.work, self.caps, policy.rank, whole=whole)
        # whether the memory that is left is enough for a job's calls
        self.fits: Callable[[Demand], bool] = lambda demand: True
        self._moved = 0.0  # when a forward was last chosen, or done

    # Jobs

    def enter(self, job: PlannedJob) -> None:
        """Work out what a job will ask for."""
        job.task, job.shape = self.work.task_of(
            job.scope.pipeline,
            job.args,
            job.kwargs,
            job.scheduler,
            job.reproducible,
            arrived=job.accepted,
            priority=job.priority,
            deadline=job.deadline,
        )
        self.forecaster.enter(job)

    def next(self, waiting: Mapping[str, JobT]) -> JobT:
        """Which job to start: a late one, to be told so; then an overdue one, the oldest first;
        then in the policy's order."""
        now = time.monotonic()

        def order(job: PlannedJob) -> Rank:
            return (-2, job.accepted) if job.late else self.forecaster.turn(job.task, now)

        with contained("choose a job"):
            self.work.refresh(self.forecaster.jobs())
            return min(waiting.values(), key=order)
        return next(iter(waiting.values()))

    def begin(self, job: PlannedJob) -> None:
        """A job is given a forward, or its whole call."""
        if job.begun is None:
            self.forecaster.begin(job)
        else:
            job.begin()

    def saw(self, job: PlannedJob, call: WaitingCall) -> None:
        """A job waits for a forward."""
        self.work.saw(job, call, self.forecaster.jobs)

    def leave(self, job: PlannedJob, *, succeeded: bool) -> None:
        """A job is done."""
        if self.forecaster.leave(job):
            with contained("learn what a job asked for"):
                self.work.ended(job, succeeded=succeeded)

    def jobs(self) -> list[Any]:
        """Those that are not done, as they were entered."""
        return list(self.forecaster.jobs())

    def stalled(self) -> float:
        """Seconds since a forward was chosen or done, a step was counted, or the first of the jobs
        came."""
        jobs = self.forecaster.jobs()
        if not jobs:
            return 0.0
        moved: float = max(self._moved, jobs[0].accepted, *[job.stepped or 0.0 for job in jobs])
        return time.monotonic() - moved

    # Forwards

    def pick(self, queues: Queues[CallT], limit: Callable[[CallT], int]) -> list[CallT]:
        """Calls of one key, of at most `limit` rows and no more than pay."""
        self._moved = now = time.monotonic()
        with contained("choose calls"):
            self.work.refresh(self.forecaster.jobs())
            calls = self._policy.choose(queues, now, self.caps.choosing(limit), self.cost)
            rows = sum(call.rows for call in calls)
            left_some = len(calls) < len(queues[calls[0].key])
            self.caps.chosen(cut=left_some and rows < limit(calls[0]))
            return calls
        return list(next(iter(queues.values())))[:1]

    def runs_alone(self, call: WaitingCall) -> None:
        """Forwards like this one are not shared."""
        self.caps.alone(call.cost, call.rows)

    def ran(self, key: Key, rows: int, seconds: float) -> None:
        """A forward took so long, until all its jobs waited again."""
        self._moved = time.monotonic()
        self.cost.observe(key, rows, seconds)
        with contained("tell of a step"):
            self._on_step(key.module, rows, max(rows, self.caps.last(key)), seconds)

    def called(self, jobs: Sequence[PlannedJob], seconds: float, beside: int) -> None:
        """Jobs ran in one call of the pipeline, while so many calls ran side by side."""
        with contained("learn what a call took"):
            demand = jobs[0].task.demand
            steps = max(1, demand.steps)
            rows = sum(load.rows for job in jobs for load in job.task.demand.step)
            for key in {load.key for load in demand.step}:
                self.cost.observe(key, rows, seconds / steps / beside)
                self._on_step(key.module, rows, rows, seconds / steps)
