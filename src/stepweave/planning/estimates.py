"""What an engine tells of the time that its jobs will take."""

from __future__ import annotations

from typing import Any

from stepweave.parameters import PriorityName
from stepweave.planning.plan import Estimate, QueuePosition
from stepweave.planning.planner import Planner
from stepweave.scheduling.task import Key, Priority


class Estimates:
    """The questions to a `StepEngine` that only predict. They run nothing, and any thread may ask.

    Times are in seconds. The engine inherits this, and sets `_planner`.
    """

    _planner: Planner

    def estimate(
        self,
        *args: Any,
        scheduler: Any = None,
        deadline: float | None = None,
        priority: PriorityName = "normal",
        reproducible: bool = False,
        pipeline: Any = None,
        **kwargs: Any,
    ) -> Estimate | None:
        """What a job with these arguments of `submit` would meet now; None if none like it has
        run."""
        return self._planner.estimate(
            args,
            kwargs,
            pipeline=pipeline,
            scheduler=scheduler,
            priority=Priority[priority.upper()],
            deadline=deadline,
            reproducible=reproducible,
        )

    def alone(
        self,
        *args: Any,
        scheduler: Any = None,
        reproducible: bool = False,
        pipeline: Any = None,
        **kwargs: Any,
    ) -> float | None:
        """Seconds that a job with these arguments of `submit` would take by itself; None if none
        like it has run."""
        return self._planner.alone(
            args, kwargs, pipeline=pipeline, scheduler=scheduler, reproducible=reproducible
        )

    @property
    def timed(self) -> bool:
        """Whether any forward has been timed: before, nothing can be predicted."""
        return self._planner.cost.timed

    def holds(self, job: Any) -> bool:
        """Whether a job is not done."""
        return self._planner.has(job)

    def queue_positions(self) -> dict[str, QueuePosition]:
        """Position and seconds to go of each job that is not done, by its id."""
        return self._planner.queue_positions()

    def queue_position(self, id: str) -> QueuePosition | None:
        """Position and seconds to go of one job; None once it is done."""
        return self._planner.queue_position(id)

    def backlog(self) -> float:
        """Predicted seconds of work submitted and not yet done; what is unknown counts 0."""
        return self._planner.backlog()

    def drain(self) -> float | None:
        """The same; None while nothing is known of some job's work."""
        return self._planner.backlog() if self._planner.predicts() else None

    def curves(self) -> dict[Key, dict[int, float]]:
        """Seconds of a forward that were measured, by module and size, and by rows."""
        return self._planner.cost.curves()
