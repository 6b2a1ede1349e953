"""Predicts the calls of each job, and how long they take alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from typing import Any

from stepweave.planning.cost import CostModel, PriceList
from stepweave.planning.jobs import PlannedJob
from stepweave.planning.profiles import Phase, Profiles, Shape
from stepweave.planning.workload import shape_of
from stepweave.scheduling.queues import WaitingCall
from stepweave.scheduling.task import Demand, Key, Load, Priority, Task

Jobs = Collection[PlannedJob]

REPRICE_SECONDS = 0.2
WHOLE_CALL = "call"  # the module of a job that is only seen as a whole call


class Work:
    """Demands and prices of jobs; `whole` if they are only seen as whole calls."""

    def __init__(self, *, whole: bool) -> None:
        self.cost = CostModel()
        self._whole = whole
        self._profiles = Profiles()
        self._lock = threading.Lock()  # guards the profiles
        self._prices, self._priced = PriceList(self.cost), 0.0

    def task_of(
        self,
        pipeline: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scheduler: Any,
        reproducible: bool,
        *,
        adapters: int = 0,
        arrived: float,
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
    ) -> tuple[Task, Shape]:
        """Predict the task of a call of the pipeline with a number of adapters; `solo` is 0 if no
        similar one has run."""
        shape, group, steps = shape_of(pipeline, args, kwargs, scheduler, reproducible)
        shape = shape._replace(adapters=adapters)
        demand = self._expected(shape, steps, group)
        if self._whole:
            call = Load(Key(WHOLE_CALL, shape.pixels), shape.images)
            demand = Demand(steps, step=(call,), group=group)
        task = Task(demand, arrived=arrived, priority=priority, deadline=deadline)
        task.price(self._prices)
        return task, shape

    def progressed(self, job: PlannedJob) -> Task:
        """A job's task, with its steps done; for a whole call, by the job's progress."""
        task = job.task
        if self._whole:
            step, total = job.progress
            task.done = task.demand.steps * step // total if total else 0
        return task

    def refresh(self, jobs: Jobs) -> None:
        """Update the jobs' prices, if they are old, or one is missing that may be known now."""
        now = time.monotonic()
        unpriced = any(job.task.demand.step and not job.task.step for job in jobs)
        if unpriced or now - self._priced > REPRICE_SECONDS:
            self._priced, self._prices = now, PriceList(self.cost)
            for job in jobs:
                job.task.price(self._prices)

    def saw(self, job: PlannedJob, call: WaitingCall, jobs: Callable[[], Jobs]) -> None:
        """Note a call that a job makes, and its progress. After its first step, the demand of its
        steps is known."""
        task, (step, total) = job.task, job.progress
        first = step and not task.done
        task.opened, task.done = job.opened is not None, step
        if total and total != task.demand.steps:
            task.demand = replace(task.demand, steps=total)
            task.price(self._prices)
        if first:
            seen = job.recorder.demand(step)
            if not task.demand.step:
                self._learn(job, Demand(total, seen.before, seen.step))
                self._expect_again(jobs())
            task.demand = replace(task.demand, step=seen.step)
            task.price(self._prices)
        phase: Phase = "before" if not task.opened else "step" if step < total else "after"
        job.recorder.call(phase, call.cost, call.rows)

    def ended(self, job: PlannedJob, *, succeeded: bool) -> None:
        """Learn the demand of a job that succeeded; of another, only its steps, and only if no
        similar job's are known."""
        step, total = job.progress
        if succeeded:
            self._learn(job, job.recorder.demand(total))
        elif step and not job.task.demand.step:
            seen = job.recorder.demand(step)
            if seen.step:
                self._learn(job, Demand(total, seen.before, seen.step))

    def _learn(self, job: PlannedJob, demand: Demand) -> None:
        if demand.before or demand.step:
            with self._lock:
                self._profiles.learn(job.shape, demand)

    def _expect_again(self, jobs: Jobs) -> None:
        """Predict jobs again whose demand was unknown at arrival: they must not seem short."""
        for job in jobs:
            demand = job.task.demand
            if not demand.step:
                job.task.demand = self._expected(job.shape, demand.steps, demand.group)
                job.task.price(self._prices)

    def _expected(self, shape: Shape, steps: int, group: Hashable) -> Demand:
        with self._lock:
            return replace(self._profiles.expect(shape, steps), group=group)
