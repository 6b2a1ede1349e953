"""All jobs that are not done: which starts next, and when each will be done."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from itertools import takewhile

from stepweave.contained import contained
from stepweave.planning.forecast import (
    BREATH,
    Order,
    forecast,
    in_order,
    running_first,
    step_seconds,
)
from stepweave.planning.jobs import PlannedJob
from stepweave.planning.line import Line
from stepweave.planning.plan import Plan, QueuePosition
from stepweave.planning.row_caps import RowCaps
from stepweave.planning.work import Work
from stepweave.scheduling.policy import Rank
from stepweave.scheduling.task import Task
from stepweave.threads import DaemonExecutor

FRESH = 0.1  # seconds for which a forecast is used ...
FRESH_TIMES = 10  # ... or of many jobs, this many times its duration, to limit its processor time
FEW = 128  # jobs that are forecast on the caller's thread, in 1 or 2 ms


class Forecaster:
    """Predicts on any thread.

    For at most `FEW` jobs, a forecast is made on the caller's thread, unless there is a fresh one.
    For more, it is made on a thread of its own; callers use the last one, to which later jobs have
    been added, and get no predictions before the first.
    """

    def __init__(self, work: Work, caps: RowCaps, order: Order, *, whole: bool) -> None:
        self._work = work
        self._caps = caps
        self._order = running_first(order) if whole else order
        self._jobs: dict[str, PlannedJob] = {}  # in order of arrival
        self._line = Line()  # jobs that have not begun
        self._plan = self._no_plan()
        self._changed = False  # a job has arrived, begun or ended since the last forecast started
        self._making = False  # whether its thread makes a forecast
        self._lock = threading.Lock()  # guards changes of jobs, and the four above
        self._thread = DaemonExecutor(1, "stepweave-forecast")

    # Jobs

    def jobs(self) -> list[PlannedJob]:
        """All jobs that are not done, the oldest first."""
        return list(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def has(self, id: str) -> bool:
        return id in self._jobs

    def enter(self, job: PlannedJob) -> None:
        with self._lock:
            self._jobs[job.id] = job
            self._line.join(job.id, self.turn(job.task, job.accepted))
            self._changed = True
            if self._plan.later > 2 * (FEW + len(self._jobs)):  # no forecast has been asked for
                self._plan = self._no_plan()
            self._fit_in(job, self._plan, time.monotonic())

    def begin(self, job: PlannedJob) -> None:
        """Move a job from waiting to running, at once for other threads."""
        with self._lock:
            self._line.leave(job.id)
            self._changed = True
            job.begin()

    def leave(self, job: PlannedJob) -> bool:
        """Remove a job that is done. Returns False if it was removed before."""
        with self._lock:
            self._line.leave(job.id)
            self._changed = True
            return self._jobs.pop(job.id, None) is not None

    def turn(self, task: Task, now: float) -> Rank:
        """The rank by which jobs start: overdue ones, the oldest first, then the policy's order."""
        return (-1, task.arrived) if task.overdue(now) else (0, *self._order(task, now))

    # Predictions

    def finish(self, task: Task) -> float | None:
        """Seconds until a job that arrives now will be done; None before the first forecast of many
        jobs, to which it is added."""
        now = time.monotonic()
        if len(self._jobs) <= FEW:
            tasks = [*map(self._work.progressed, self.jobs()), task]
            return self._forecast(tasks, now, lambda: None)[-1]
        plan = self._latest()
        return plan.finish(task, self._shared_seconds(task, plan), now) if _usable(plan) else None

    def queue_positions(self) -> dict[str, QueuePosition]:
        """The position of each job by its id: running jobs, then waiting ones in order of start."""
        plan = self._latest()
        with self._lock:
            places = self._line.places()
            jobs = dict(self._jobs)
        now = time.monotonic()
        running = {id: 0 for id in jobs if id not in places}
        return {
            id: QueuePosition(place, self._eta(jobs[id], plan, now))
            for id, place in (running | places).items()
        }

    def queue_position(self, id: str) -> QueuePosition | None:
        """The position of a job; None if it is done."""
        plan = self._latest()
        with self._lock:
            job, place = self._jobs.get(id), self._line.place(id)
        return None if job is None else QueuePosition(place, self._eta(job, plan, time.monotonic()))

    def backlog(self) -> float:
        """Seconds until all jobs will be done."""
        return self._latest().backlog(time.monotonic())

    def predicts(self) -> bool:
        """Whether every job's work is known."""
        if len(self._jobs) > FEW:
            return self._latest().predicts()
        return all(job.task.solo for job in self.jobs())

    def _eta(self, job: PlannedJob, plan: Plan, now: float) -> float | None:
        """Remaining seconds of a job, no less than it would need alone."""
        eta = plan.eta(job.id, now)
        return None if eta is None else max(eta, self._work.progressed(job).remaining)

    def _shared_seconds(self, task: Task, plan: Plan) -> float:
        """Seconds of a job if its steps are full of others' rows, or alone if there are none."""
        rows = self._caps.of(task.demand) if plan.has_kind(task.demand.kind) else 0
        if rows <= task.demand.rows:
            return task.solo
        step = step_seconds(task.demand, rows, self._work.cost)
        return task.before + task.left * step + task.after

    # Plans

    def _no_plan(self) -> Plan:
        return Plan(-math.inf, (), (), (), self._order)

    def _latest(self) -> Plan:
        """The last forecast, after making a new one, or starting to, if it is old."""
        plan, jobs = self._plan, len(self._jobs)
        age = time.monotonic() - plan.made
        if age < FRESH and not (self._changed and jobs <= FEW):
            return plan
        if jobs <= FEW or (jobs <= 2 * FEW and not _usable(plan)):
            return self._make(lambda: None)
        if age >= FRESH_TIMES * plan.took:
            with self._lock:
                begin, self._making = not self._making, True
            if begin:
                self._thread.submit(self._make_apart)
        return self._plan

    def _make_apart(self) -> None:
        try:
            with contained("predict when jobs will be done"):
                self._work.refresh(self.jobs())
                # pauses let other threads run, which would otherwise wait for 5 ms each time
                self._make(lambda: time.sleep(0))
        finally:
            self._making = False

    def _make(self, pause: Callable[[], object]) -> Plan:
        now = time.monotonic()
        with self._lock:
            jobs = self.jobs()
            self._changed = False
        tasks = [self._work.progressed(job) for job in jobs]
        ends = self._forecast(tasks, now, pause)
        took = time.monotonic() - now
        ids = [job.id for job in jobs]
        plan = Plan(now, ids, tasks, ends, self._order, took=took, pause=pause)
        turns = self._turns([job for job in jobs if job.begun is None], now, pause)
        for _ in range(3):  # so that few jobs are added while the lock blocks other threads
            for job in self._later_than(plan):
                self._fit_in(job, plan, now)
        with self._lock:
            for job in self._later_than(plan):
                self._fit_in(job, plan, now)
            if plan.made >= self._plan.made:
                self._plan = plan
                self._line.arrange(turns)
        return plan

    def _forecast(
        self, tasks: Sequence[Task], now: float, pause: Callable[[], object]
    ) -> list[float]:
        return forecast(tasks, now, self._work.cost, self._caps.of, self._order, pause)

    def _turns(
        self, waiting: Sequence[PlannedJob], now: float, pause: Callable[[], object]
    ) -> list[tuple[str, Rank]]:
        """Ids and ranks in the order in which jobs would start."""
        ranks: list[Rank] = []
        for number, job in enumerate(waiting):
            if number % BREATH == 0:
                pause()
            ranks.append(self.turn(job.task, now))
        return [(waiting[i].id, ranks[i]) for i in in_order(ranks, pause)]

    def _later_than(self, plan: Plan) -> list[PlannedJob]:
        """The jobs that arrived after the plan was made, the oldest first."""
        later = list(takewhile(lambda job: not plan.has(job.id), reversed(self.jobs())))
        return later[::-1]

    def _fit_in(self, job: PlannedJob, plan: Plan, now: float) -> None:
        with contained("add a job to the forecast"):
            plan.add(job.id, job.task, self._shared_seconds(job.task, plan), now)


def _usable(plan: Plan) -> bool:
    """Whether a plan has enough jobs to predict others."""
    return plan.size >= FEW // 2
