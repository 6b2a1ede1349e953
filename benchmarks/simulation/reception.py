"""The server's admission, on the simulation's clock."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from benchmarks.simulation.curves import Curves, knees
from stepweave.errors import AdmissionError, DeadlineTooShortError
from stepweave.planning.forecast import Order, forecast
from stepweave.planning.plan import Estimate
from stepweave.scheduling.task import Demand, Task
from stepweave.serving.admission import Admission


class Reception:
    """The server's `Admission`, with estimates that are forecast for an order of the jobs."""

    def __init__(
        self, curves: Curves, limit: int, order: Order, max_wait: float = float("inf")
    ) -> None:
        self._cost = curves.model()
        self._knee = knees(curves, self._cost)
        self._order = order
        self._inside: Sequence[Task] = ()
        self._now = 0.0
        self._admission = Admission(limit, self._drain, max_wait=max_wait, clock=lambda: self._now)

    def enter(
        self, token: Hashable, task: Task, inside: Sequence[Task], now: float
    ) -> float | None:
        self._now, self._inside = now, inside
        deadline = None if task.deadline is None else task.deadline - now
        try:
            self._admission.enter(token, lambda: self._estimate(task), deadline)
        except DeadlineTooShortError:
            return math.inf
        except AdmissionError as refused:
            return refused.retry_after
        return None

    def leave(self) -> None:
        self._admission.leave()

    def _estimate(self, task: Task) -> Estimate:
        return Estimate(self._forecast([*self._inside, task])[-1], task.solo)

    def _drain(self) -> float:
        return max(self._forecast(self._inside), default=0.0)

    def _forecast(self, tasks: Sequence[Task]) -> list[float]:
        return forecast(tasks, self._now, self._cost, self._cap, self._order)

    def _cap(self, demand: Demand) -> int:
        return self._knee(demand.step[0].key)
