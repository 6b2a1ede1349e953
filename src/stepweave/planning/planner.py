"""What the engine knows of its jobs' work: what each will ask for, what that costs, whose turn it
is, and when all is done."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stepweave.contained import contained
from stepweave.planning.cost import KEYS, CostModel, PriceList
from stepweave.planning.forecast import (
    BREATH,
    ORDERS,
    by_arrival,
    forecast,
    in_order,
    running_first,
    step_seconds,
)
from stepweave.planning.line import Line
from stepweave.planning.plan import Estimate, Plan, QueuePosition
from stepweave.planning.profiles import Profiles, Shape
from stepweave.planning.workload import shape_of
from stepweave.scheduling.policy import POLICIES, Rank, patience
from stepweave.scheduling.task import Demand, Key, Load, Priority, Task
from stepweave.threads import DaemonExecutor

REPRICE_SECONDS = 0.2
FRESH = 0.1  # seconds that a forecast is good for ...
# ... or, of many jobs, so many times what it took to make: it must leave the processor to others
FRESH_TIMES = 10
# jobs that are forecast where that is asked for, in a millisecond or two; of more, on a thread of
# its own
FEW = 128
EXPLORE_EVERY = 64  # groups that were cut off at the knee, before one is let grow to twice that
WHOLE_CALL = "call"  # the module of a job whose steps are not seen one by one

# module, rows, the most rows that were allowed, seconds
OnStep = Callable[[str, int, int, float], None]


class Planner:
    """Shared by the engine's thread, which tells it what runs, and by any that ask.

    Args:
        pipeline: whose call the jobs make.
        policy: one of `POLICIES`.
        max_rows: of a step.
        merges: whether jobs share forwards.
        whole: whether all that is seen of jobs are their whole calls.
        knee: whether forwards have no more rows than pay.
        on_step: told of each forward.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        policy: str = "thrifty",
        max_rows: int,
        merges: bool = True,
        whole: bool = False,
        knee: bool = True,
        on_step: OnStep = lambda module, rows, cap, seconds: None,
    ) -> None:
        self._pipeline = pipeline
        self._policy = POLICIES[policy]
        self._order = (
            running_first(ORDERS.get(policy, by_arrival))
            if whole
            else ORDERS.get(policy, by_arrival)
        )
        self._max_rows = max_rows
        self._on_step = on_step
        self._merges = merges
        self._whole = whole
        self._knee = knee and policy in ORDERS
        # whether the memory that is left is enough for a job's calls
        self.fits: Callable[[Demand], bool] = lambda demand: True
        self.lavish = False  # forwards have as many rows as may be, whether they pay or not
        self.cost = CostModel()
        self._profiles = Profiles()
        self._jobs: dict[str, Any] = {}  # all that are not done
        self._caps: dict[Key, int] = {}  # rows that a step was last allowed
        self._cut = 0
        self._priced, self._prices = 0.0, PriceList(self.cost)
        self._plan = self._no_plan()
        self._planning = False  # on its thread
        # for each plan that is being made, since its jobs were taken down
        self._entered: list[list[Any]] = []
        self._forecaster = DaemonExecutor(1, "stepweave-forecast")
        self._line = Line()
        self._changed = False  # since the last forecast was begun a job has come, begun or left
        self._plan_lock = threading.Lock()  # guards these, and who comes and begins
        self._moved = 0.0  # when a forward was last chosen, or done
        self._lock = threading.Lock()  # guards the profiles

    # Jobs come and go

    def enter(self, job: Any) -> None:
        """Work out what a job will ask for."""
        job.shape, group, steps = shape_of(
            job.scope.pipeline, job.args, job.kwargs, job.scheduler, job.reproducible
        )
        job.task = self._task(job.shape, group, steps, job.accepted, job.priority, job.deadline)
        with self._plan_lock:
            self._jobs[job.id] = job
            self._line.join(job.id, self._turn(job.task, job.accepted))
            self._changed = True
            if self._plan.later > 2 * (FEW + len(self._jobs)):  # nobody asks for another
                self._plan = self._no_plan()
            self._add(job, self._plan, time.monotonic())
            for entered in self._entered:
                entered.append(job)

    def begin(self, job: Any) -> None:
        """A job is given a forward, or its whole call."""
        if job.begun is not None:  # it has begun anew
            job.begin()
            return
        with self._plan_lock:  # from one moment on it runs, and waits no longer
            self._line.leave(job.id)
            self._changed = True
            job.begin()

    def leave(self, job: Any, *, succeeded: bool) -> None:
        """A job is done. What it asked for is known, if it got to its end; else its steps, if those
        of none have been seen."""
        with self._plan_lock:
            known = self._jobs.pop(job.id, None)
            self._line.leave(job.id)
            self._changed = True
        if known is None:
            return
        with contained("learn what a job asked for"):
            step, total = job.progress
            if succeeded:
                self._learn(job, job.recorder.demand(total))
            elif step and not job.task.demand.step:
                seen = job.recorder.demand(step)
                if seen.step:
                    self._learn(job, Demand(total, seen.before, seen.step))

    def jobs(self) -> list[Any]:
        """All that are not done."""
        return list(self._jobs.values())

    def has(self, job: Any) -> bool:
        return job.id in self._jobs

    def saw(self, job: Any, call: Any) -> None:
        """A job waits for a forward."""
        task, (step, total) = job.task, job.progress
        first = step and not task.done
        task.opened, task.done = job.opened is not None, step
        if total and total != task.demand.steps:
            task.demand = replace(task.demand, steps=total)
            task.price(self._prices)
        if first:  # from now on it is known what each step asks for
            seen = job.recorder.demand(step)
            if not task.demand.step:
                self._learn(job, Demand(total, seen.before, seen.step))
                self._expect_anew()
            task.demand = replace(task.demand, step=seen.step)
            task.price(self._prices)
        job.recorder.call(
            "before" if not task.opened else "step" if step < total else "after",
            call.cost,
            call.rows,
        )

    def _learn(self, job: Any, demand: Demand) -> None:
        if job.shape is not None and (demand.before or demand.step):
            with self._lock:
                self._profiles.learn(job.shape, demand)

    def _expect_anew(self) -> None:
        """Jobs of which nothing was known when they came must not be taken for short ones."""
        for job in list(self._jobs.values()):
            task = job.task
            if not task.demand.step and job.shape is not None:
                with self._lock:
                    expected = self._profiles.expect(job.shape, task.demand.steps)
                task.demand = replace(expected, group=task.demand.group)
                task.price(self._prices)

    def next(self, waiting: Mapping[str, Any]) -> Any:
        """Which job to start: a late one, to be told so; then one that lost too much time, the
        oldest first; then in order."""
        now = time.monotonic()

        def order(job: Any) -> Rank:
            return (-2, job.accepted) if job.late else self._turn(job.task, now)

        with contained("choose a job"):
            self._refresh(now)
            return min(waiting.values(), key=order)
        return next(iter(waiting.values()))

    def _turn(self, task: Task, now: float) -> Rank:
        """When it is a job's turn to start: those that lost too much time, the oldest first, then
        all in order."""
        return (
            (-1, task.arrived) if task.lost(now) > patience(task) else (0, *self._order(task, now))
        )

    # Forwards

    def pick(
        self, queues: Mapping[Hashable, Sequence[Any]], limit: Callable[[Any], int]
    ) -> list[Any]:
        """Calls of one key, of at most `limit` rows and no more than pay."""
        self._moved = time.monotonic()
        with contained("choose calls"):
            return self._pick(queues, limit)
        return list(next(iter(queues.values())))[:1]

    def _pick(
        self, queues: Mapping[Hashable, Sequence[Any]], limit: Callable[[Any], int]
    ) -> list[Any]:
        now = time.monotonic()
        self._refresh(now)
        explore = self._cut >= EXPLORE_EVERY
        if len(self._caps) > KEYS:
            self._caps.clear()
        knees: dict[tuple[Key, int], int] = {}

        def cap(call: Any) -> int:
            most = limit(call)
            knee = knees.get((call.cost, most))
            if knee is None:
                knee = self.cost.knee(call.cost, most) if self._knee and not self.lavish else most
                knees[call.cost, most] = knee = min(most, 2 * knee) if explore else knee
            self._caps[call.cost] = knee
            return knee

        calls: list[Any] = self._policy(queues, now, cap, self.cost)
        rows = sum(call.rows for call in calls)
        if explore:
            self._cut = 0
        elif len(calls) < len(queues[calls[0].key]) and rows < limit(calls[0]):
            self._cut += 1
        return calls

    def _refresh(self, now: float) -> None:
        """Price the jobs anew, now and then, and when one has no price yet."""
        jobs = list(self._jobs.values())
        if now - self._priced > REPRICE_SECONDS or any(
            job.task.demand.step and not job.task.step for job in jobs
        ):
            self._priced, self._prices = now, PriceList(self.cost)
            for job in jobs:
                job.task.price(self._prices)

    def ran(self, key: Key, rows: int, seconds: float) -> None:
        """A forward, allowed so many rows, took so long, until all its jobs waited again."""
        self._moved = time.monotonic()
        self.cost.observe(key, rows, seconds)
        with contained("tell of a step"):
            self._on_step(key.module, rows, max(rows, self._caps.get(key, 0)), seconds)

    def called(self, jobs: Sequence[Any], seconds: float, beside: int) -> None:
        """Jobs ran in one call of the pipeline, while so many calls ran side by side."""
        with contained("learn what a call took"):
            steps = max(1, jobs[0].task.demand.steps)
            rows = sum(load.rows for job in jobs for load in job.task.demand.step)
            for key in {load.key for load in jobs[0].task.demand.step}:
                self.cost.observe(key, rows, seconds / steps / beside)
                self._on_step(key.module, rows, rows, seconds / steps)

    def runs_alone(self, call: Any) -> None:
        """Forwards like this one are not shared."""
        self._caps[call.cost] = call.rows

    # What is to be expected

    def estimate(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        pipeline: Any = None,
        scheduler: Any = None,
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        reproducible: bool = False,
    ) -> Estimate | None:
        """What a job would meet if it were submitted now; None if no job like it has run, or the
        first forecast of many is still being made.

        With more than `FEW` others it is fitted into what was last foreseen.
        """
        now = time.monotonic()
        called = self._pipeline if pipeline is None else pipeline
        shape, group, steps = shape_of(called, args, kwargs, scheduler, reproducible)
        few = len(self._jobs) <= FEW
        if few:
            self._refresh(now)
        task = self._task(
            shape, group, steps, now, priority, None if deadline is None else now + deadline
        )
        if not task.solo:
            return None
        if few:
            finish = self._forecast([*self._tasks(list(self._jobs.values())), task], now)[-1]
        else:
            plan = self._latest()
            if not self._tells(plan):
                return None
            finish = plan.finish(task, self._in_company(task, plan), now)
        return Estimate(finish, task.solo, self.fits(task.demand))

    def _in_company(self, task: Task, plan: Plan) -> float:
        """Seconds that a job takes whose steps others share, if there are such."""
        rows = self._cap(task.demand) if plan.has_kind(task.kind) else 0
        if rows <= task.demand.rows:
            return task.solo
        return task.before + task.left * step_seconds(task.demand, rows, self.cost) + task.after

    def alone(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        pipeline: Any,
        scheduler: Any,
        reproducible: bool,
    ) -> float | None:
        """Seconds that a job would take by itself; None if no job like it has run. Hardly any work,
        however many there are."""
        called = self._pipeline if pipeline is None else pipeline
        shape, group, steps = shape_of(called, args, kwargs, scheduler, reproducible)
        task = self._task(shape, group, steps, 0.0, Priority.NORMAL, None)
        # as of now: nobody may have asked for other prices since the last job
        task.price(self.cost)
        return task.solo or None

    def queue_positions(self) -> dict[str, QueuePosition]:
        """Where each job stands, by its id; those that wait in the order in which they would
        start."""
        plan = self._latest()
        with self._plan_lock:
            places = self._line.places()
            jobs = dict(self._jobs)
        now = time.monotonic()
        running = {id: 0 for id in jobs if id not in places}
        return {
            id: QueuePosition(place, self._eta(jobs[id], plan, now))
            for id, place in (running | places).items()
        }

    def queue_position(self, id: str) -> QueuePosition | None:
        """Where a job stands; None if it is done."""
        plan = self._latest()
        with self._plan_lock:
            job, place = self._jobs.get(id), self._line.place(id)
        return None if job is None else QueuePosition(place, self._eta(job, plan, time.monotonic()))

    def _tasks(self, jobs: Sequence[Any]) -> list[Task]:
        """The jobs' tasks; how far whole calls are is told by nothing but their jobs."""
        for job in jobs if self._whole else ():
            step, total = job.progress
            job.task.done = job.task.demand.steps * step // total if total else 0
        return [job.task for job in jobs]

    def _eta(self, job: Any, plan: Plan, now: float) -> float | None:
        """No less than what is left of it would take alone."""
        (task,) = self._tasks([job])
        eta = plan.eta(job.id, now)
        return None if eta is None else max(eta, task.remaining)

    def backlog(self) -> float:
        """Seconds until all that are not done would be."""
        return self._latest().backlog(time.monotonic())

    def _no_plan(self) -> Plan:
        return Plan(-math.inf, (), (), (), self._order)

    def _latest(self) -> Plan:
        """The forecast of all jobs. Where they are few it is a fresh one, else the last, and
        another is begun if that is old."""
        plan, now = self._plan, time.monotonic()
        jobs = len(self._jobs)
        if now - plan.made < FRESH and not (self._changed and jobs <= FEW):
            return plan
        if jobs <= FEW or (jobs <= 2 * FEW and not self._tells(plan)):
            return self._make_plan()
        if now - plan.made >= FRESH_TIMES * plan.took:
            with self._plan_lock:
                begin, self._planning = not self._planning, True
            if begin:
                self._forecaster.submit(self._make_plan_apart)
        return self._plan

    def _add(self, job: Any, plan: Plan, now: float) -> None:
        with contained("fit a job into the forecast"):
            plan.add(job.id, job.task, self._in_company(job.task, plan), now)

    def _tells(self, plan: Plan) -> bool:
        """Whether a plan is of enough jobs to tell what others do in their company."""
        return plan.size >= FEW // 2

    def _make_plan_apart(self) -> None:
        try:
            with contained("foresee when jobs will be done"):
                self._refresh(time.monotonic())
                # each time it lets other threads run, which else wait for 5 ms whenever they have
                # waited for anything
                self._make_plan(lambda: time.sleep(0))
        finally:
            self._planning = False

    def _make_plan(self, breathe: Callable[[], object] = lambda: None) -> Plan:
        now = time.monotonic()
        entered: list[Any] = []
        with self._plan_lock:
            self._entered.append(entered)
            jobs = list(self._jobs.values())
            self._changed = False
        try:
            tasks = self._tasks(jobs)
            ends = self._forecast(tasks, now, breathe)
            took = time.monotonic() - now
            plan = Plan(
                now, [job.id for job in jobs], tasks, ends, self._order, took=took, breathe=breathe
            )
            turns = self._turns(jobs, now, breathe)
            added = 0
            while len(entered) - added > FEW:  # most of them without holding up those that come
                self._add(entered[added], plan, now)
                added += 1
            with self._plan_lock:
                for job in entered[added:]:
                    self._add(job, plan, now)
                if plan.made >= self._plan.made:
                    self._plan = plan
                    self._line.arrange(turns)
        finally:
            with self._plan_lock:
                self._entered = [one for one in self._entered if one is not entered]
        return plan

    def _turns(
        self, jobs: Sequence[Any], now: float, breathe: Callable[[], object]
    ) -> list[tuple[str, Rank]]:
        """The jobs that wait, in the order in which they would start."""
        waiting = [job for job in jobs if job.begun is None]
        ranks: list[Rank] = []
        for number, job in enumerate(waiting):
            if number % BREATH == 0:
                breathe()
            ranks.append(self._turn(job.task, now))
        return [(waiting[i].id, ranks[i]) for i in in_order(ranks, breathe)]

    def stalled(self) -> float:
        """Seconds since a forward was chosen or done, a step was counted, or the first of the jobs
        came."""
        jobs = list(self._jobs.values())
        if not jobs:
            return 0.0
        moved: float = max(self._moved, jobs[0].accepted, *[job.stepped or 0.0 for job in jobs])
        return time.monotonic() - moved

    def predicts(self) -> bool:
        """Whether something is known of every job's work."""
        if len(self._jobs) > FEW:
            return self._latest().predicts()
        return all(job.task.solo for job in list(self._jobs.values()))

    def _forecast(
        self, tasks: Sequence[Task], now: float, breathe: Callable[[], object] = lambda: None
    ) -> list[float]:
        return forecast(tasks, now, self.cost, self._cap, self._order, breathe)

    def _cap(self, demand: Demand) -> int:
        """The most rows of a step that such jobs share, by the rows of its first module."""
        if not self._merges or not demand.step:
            return 0
        own = demand.step[0].rows
        caps = (
            (self._caps.get(load.key) or self.cost.knee(load.key, self._max_rows))
            * own
            // load.rows
            for load in demand.step
        )
        return min(caps)

    def _task(
        self,
        shape: Shape,
        group: Hashable,
        steps: int,
        arrived: float,
        priority: Priority,
        deadline: float | None,
    ) -> Task:
        with self._lock:
            demand = replace(self._profiles.expect(shape, steps), group=group)
        if self._whole:
            demand = Demand(
                steps, step=(Load(Key(WHOLE_CALL, shape.pixels), shape.images),), group=group
            )
        task = Task(demand, arrived=arrived, priority=priority, deadline=deadline)
        task.price(self._prices)
        return task
