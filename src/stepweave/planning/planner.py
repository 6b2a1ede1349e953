"""Learns the work of an engine's jobs, and chooses which jobs and calls are next."""

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
from stepweave.scheduling.queues import CallT, Queues, WaitingCall, cost_of
from stepweave.scheduling.task import Demand, Key

# module, rows, row limit, seconds
OnStep = Callable[[str, int, int, float], None]

JobT = TypeVar("JobT", bound=PlannedJob)


class Planner:
    """The engine's threads report what runs, and ask which jobs and calls are next; any thread may
    ask for predictions. Errors of planning are logged, and cost a job no more than its turn.

    Args:
        pipeline: the one that jobs call.
        policy: chooses calls.
        max_rows: of a forward.
        merges: whether jobs share forwards.
        whole: whether jobs are only seen as whole calls, without steps.
        knee: whether forwards stop at the knee, if the policy wants it.
        on_step: called with each forward.
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
        # whether a job's calls fit into free memory
        self.fits: Callable[[Demand], bool] = lambda demand: True
        self._moved = 0.0  # time of the last choice or end of a forward

    # Jobs

    def enter(self, job: PlannedJob) -> None:
        """Add a job, and estimate its work."""
        job.task, job.shape = self.work.task_of(
            job.scope.pipeline, job.args, job.kwargs, job.scheduler, job.reproducible,
            adapters=job.adapters_wanted,
            arrived=job.accepted, priority=job.priority, deadline=job.deadline,
        )  # fmt: skip
        self.forecaster.enter(job)

    def next(self, waiting: Mapping[str, JobT]) -> JobT:
        """Choose the job to start: first late ones, which then end; then overdue ones, the oldest
        first; then in the policy's order."""
        now = time.monotonic()

        def order(job: PlannedJob) -> Rank:
            return (-2, job.accepted) if job.late else self.forecaster.turn(job.task, now)

        with contained("choose a job"):
            self.work.refresh(self.forecaster.jobs())
            return min(waiting.values(), key=order)
        return next(iter(waiting.values()))

    def begin(self, job: PlannedJob) -> None:
        """Note that a forward of a job, or its whole call, starts."""
        if job.begun is None:
            self.forecaster.begin(job)
        else:
            job.begin()

    def saw(self, job: PlannedJob, call: WaitingCall) -> None:
        """Note a call of a job, which waits for a forward."""
        self.work.saw(job, call, self.forecaster.jobs)

    def leave(self, job: PlannedJob, *, succeeded: bool) -> None:
        """Remove a job that is done, and learn from it."""
        if self.forecaster.leave(job):
            with contained("learn the work of a job"):
                self.work.ended(job, succeeded=succeeded)

    def jobs(self) -> list[Any]:
        """All jobs that are not done."""
        return list(self.forecaster.jobs())

    def stalled(self) -> float:
        """Seconds since the last choice or end of a forward, the last step, or since the first of
        the jobs could start."""
        jobs = self.forecaster.jobs()
        since = [job.could_start for job in jobs if job.could_start is not None]
        if not since:
            return 0.0
        moved: float = max(self._moved, min(since), *[job.stepped or 0.0 for job in jobs])
        return time.monotonic() - moved

    # Forwards

    def pick(self, queues: Queues[CallT], limit: Callable[[CallT], int]) -> list[CallT]:
        """Choose calls of one key, with at most `limit` rows and no more than the knee."""
        self._moved = now = time.monotonic()
        with contained("choose calls"):
            self.work.refresh(self.forecaster.jobs())
            calls = self._policy.choose(queues, now, self.caps.choosing(limit, queues), self.cost)
            first, rows = calls[0], sum(call.rows for call in calls)
            others = len(calls) < len(queues[first.key])
            self.caps.chosen(cost_of(calls), rows, cut=others and rows < limit(first))
            return calls
        return list(next(iter(queues.values())))[:1]

    def runs_alone(self, call: WaitingCall) -> None:
        """Note that calls like this one are not merged."""
        self.caps.alone(call.cost, call.rows)

    def ran(self, key: Key, rows: int, seconds: float) -> None:
        """Note the duration of a forward, until all its jobs wait again."""
        self._moved = time.monotonic()
        self.caps.ran(key, rows, seconds)
        self.cost.observe(key, rows, seconds)
        with contained("report a step"):
            self._on_step(key.module, rows, max(rows, self.caps.last(key)), seconds)

    def called(self, jobs: Sequence[PlannedJob], seconds: float, beside: int) -> None:
        """Note the duration of a pipeline's call with these jobs, while `beside` calls ran
        concurrently."""
        with contained("learn the duration of a call"):
            demand = jobs[0].task.demand
            steps = max(1, demand.steps)
            rows = sum(load.rows for job in jobs for load in job.task.demand.step)
            for key in {load.key for load in demand.step}:
                self.cost.observe(key, rows, seconds / steps / beside)
                self._on_step(key.module, rows, rows, seconds / steps)
