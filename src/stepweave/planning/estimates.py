"""An engine's predictions of when jobs will be done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from stepweave.parameters import PriorityName, applied
from stepweave.planning.forecaster import FEW
from stepweave.planning.plan import Estimate, QueuePosition
from stepweave.planning.planner import Planner
from stepweave.scheduling.task import Key, Priority


class Estimates:
    """The methods of `StepEngine` that only predict, for any thread. Times are in seconds. The
    engine inherits this class, and sets `_planner`."""

    _planner: Planner

    def estimate(
        self,
        *args: Any,
        scheduler: Any = None,
        deadline: float | None = None,
        priority: PriorityName = "normal",
        reproducible: bool = False,
        pipeline: Any = None,
        lora: Sequence[tuple[str, float]] = (),
        **kwargs: Any,
    ) -> Estimate | None:
        """Predict a job with these arguments of `submit`, submitted now; None if no similar job has
        run."""
        planner, now = self._planner, time.monotonic()
        if len(planner.forecaster) <= FEW:
            planner.work.refresh(planner.forecaster.jobs())
        called = planner.pipeline if pipeline is None else pipeline
        task, _ = planner.work.task_of(
            called, args, kwargs, scheduler, reproducible, adapters=applied(lora),
            arrived=now, priority=Priority[priority.upper()],
            deadline=None if deadline is None else now + deadline,
        )  # fmt: skip
        finish = planner.forecaster.finish(task) if task.solo else None
        return None if finish is None else Estimate(finish, task.solo, planner.fits(task.demand))

    def alone(
        self,
        *args: Any,
        scheduler: Any = None,
        reproducible: bool = False,
        pipeline: Any = None,
        lora: Sequence[tuple[str, float]] = (),
        **kwargs: Any,
    ) -> float | None:
        """Seconds of a job with these arguments of `submit` on an idle engine; None if no similar
        job has run."""
        planner = self._planner
        called = planner.pipeline if pipeline is None else pipeline
        task, _ = planner.work.task_of(
            called, args, kwargs, scheduler, reproducible, adapters=applied(lora), arrived=0.0
        )
        task.price(planner.cost)  # the price list may be from before the last job
        return task.solo or None

    @property
    def timed(self) -> bool:
        """Whether any forward has been timed, without which nothing can be predicted."""
        return self._planner.cost.timed

    def holds(self, job: Any) -> bool:
        """Whether a job is waiting or running."""
        return self._planner.forecaster.has(job.id)

    def queue_positions(self) -> dict[str, QueuePosition]:
        """Position and remaining seconds of each job that is not done, by its id."""
        return self._planner.forecaster.queue_positions()

    def queue_position(self, id: str) -> QueuePosition | None:
        """Position and remaining seconds of one job; None once it is done."""
        return self._planner.forecaster.queue_position(id)

    def backlog(self) -> float:
        """Predicted seconds of work submitted and not yet done; unknown work counts 0."""
        return self._planner.forecaster.backlog()

    def drain(self) -> float | None:
        """The backlog; None while some job's work is unknown."""
        return self.backlog() if self._planner.forecaster.predicts() else None

    def curves(self) -> dict[Key, dict[int, float]]:
        """Measured seconds of a forward, by module and size, then by rows."""
        return self._planner.cost.curves()
