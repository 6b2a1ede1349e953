"""A simulated engine: one forward at a time, with the duration of the curve."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.simulation.arrivals import Arrival
from benchmarks.simulation.curves import Curves, knees
from stepweave.planning.cost import CostModel
from stepweave.planning.row_caps import waiting_rows, with_rest
from stepweave.scheduling.policy import Cap, Policy
from stepweave.scheduling.queues import CallQueues
from stepweave.scheduling.task import Key, Load, Task


@dataclass(eq=False, slots=True)
class Request:
    """A call that waits for a forward; calls of equal module and size may share it."""

    key: Hashable
    rows: int
    cost: Key
    task: Task
    since: float  # when it began to wait


@dataclass(slots=True)
class Outcome:
    """The outcome of a request; times in seconds from the start."""

    arrival: Arrival
    solo: float
    asked: list[float] = field(default_factory=list)  # times of its attempts
    promised: list[float] = field(default_factory=list)  # the Retry-After of each refusal
    finished: float | None = None

    @property
    def latency(self) -> float | None:
        """Seconds from the first attempt; None if it was never accepted."""
        return None if self.finished is None else self.finished - self.asked[0]

    def returns(self) -> list[tuple[float, bool]]:
        """For each retry, its Retry-After, and whether it was accepted."""
        count = len(self.asked) - 1
        return [
            (told, number == len(self.promised))
            for number, told in enumerate(self.promised[:count], 1)
        ]


@dataclass
class Run:
    """The results of a simulation."""

    outcomes: list[Outcome]
    busy: float = 0.0  # seconds of forwards
    forwards: int = 0
    rows: int = 0
    switches: int = 0  # forwards of another key than the one before

    @property
    def end(self) -> float:
        finished = (outcome.finished for outcome in self.outcomes)
        return max((time for time in finished if time is not None), default=0.0)


class Door(Protocol):
    """Admission."""

    def enter(
        self, token: Hashable, task: Task, inside: Sequence[Task], now: float
    ) -> float | None:
        """Accept a task (None), or return the seconds after which to retry with the same token,
        infinite for never."""

    def leave(self) -> None:
        """Record that an accepted task is done."""


class World:
    """A running simulation."""

    def __init__(
        self,
        requests: Sequence[Arrival],
        curves: Curves,
        policy: Policy,
        *,
        cost: CostModel | None = None,
        cap: Cap | None = None,
        door: Door | None = None,
        attempts: int = 1,
    ) -> None:
        self._curves = curves
        self._cost = cost or curves.model()
        self._policy = policy
        self._knee = knees(curves, self._cost)
        self._cap = cap or self._paying
        self._door = door
        self._attempts = attempts
        self._calls: dict[Task, Iterator[Load]] = {}  # of accepted tasks
        self._outcome: dict[Task, Outcome] = {}
        self._queues = CallQueues[Request]()
        outcomes = [
            Outcome(request, request.task(curves, self._cost, 0.0).solo) for request in requests
        ]
        self._due = [
            (outcome.arrival.offset, number, outcome) for number, outcome in enumerate(outcomes)
        ]
        heapq.heapify(self._due)
        self._seconds: dict[tuple[Key, int], float] = {}
        self.run = Run(outcomes)

    def simulate(self) -> Run:
        """Run until all requests are served or have given up. A policy that picks nothing is asked
        again at the next arrival."""
        now, last = 0.0, None
        while self._queues or self._due:
            picked = self._choose(now)
            if not picked:
                if not self._due:
                    raise RuntimeError("the policy never runs the last jobs")
                now = max(now, self._due[0][0])
                self._admit(now)
                continue
            now += self._forward(picked)
            self.run.switches += picked[0].key != last
            last = picked[0].key
            self._admit(now)
            for request in picked:
                self._advance(request.task, now)
        return self.run

    def _choose(self, now: float) -> list[Request]:
        if not self._queues:
            return []
        return self._policy.choose(self._queues, now, self._cap, self._cost)

    def _paying(self, request: Request) -> int:
        """The rows that pay, as the engine's planner counts them."""
        most = self._curves.most_rows(request.cost)
        return with_rest(self._knee(request.cost), most, waiting_rows(request, self._queues))

    def _admit(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            now, number, outcome = heapq.heappop(self._due)
            task = outcome.arrival.task(self._curves, self._cost, now)
            outcome.asked.append(now)
            wait = (
                None
                if self._door is None
                else self._door.enter(number, task, list(self._calls), now)
            )
            if wait is None:
                self._outcome[task] = outcome
                self._calls[task] = _calls(task)
                self._advance(task, now)
            elif math.isfinite(wait):
                outcome.promised.append(wait)
                if len(outcome.asked) < self._attempts:
                    heapq.heappush(self._due, (now + wait, number, outcome))

    def _forward(self, picked: Sequence[Request]) -> float:
        """Run the calls as one forward; returns its seconds."""
        if len({request.key for request in picked}) > 1:
            raise RuntimeError("the policy picked calls of several keys")
        self._queues.take(picked)
        rows = sum(request.rows for request in picked)
        load = (picked[0].cost, rows)
        seconds = self._seconds.get(load)
        if seconds is None:
            seconds = self._seconds[load] = self._cost.seconds(*load)
        for request in picked:
            request.task.begun = True
        self.run.busy += seconds
        self.run.forwards += 1
        self.run.rows += rows
        return seconds

    def _advance(self, task: Task, now: float) -> None:
        """Queue the next call of a task, or end it."""
        load = next(self._calls[task], None)
        if load is None:
            self._outcome.pop(task).finished = now
            del self._calls[task]
            if self._door is not None:
                self._door.leave()
        else:
            self._queues.add(Request(load.key, load.rows, load.key, task, now))


def _calls(task: Task) -> Iterator[Load]:
    """Yield the calls of a task, and update its progress."""
    demand = task.demand
    for load in demand.before:
        for _ in range(round(load.calls)):
            yield load
    task.opened = True
    for _ in range(demand.steps):
        for load in demand.step:
            for _ in range(round(load.calls)):
                yield load
        task.done += 1
    for load in demand.after:
        for _ in range(round(load.calls)):
            yield load


def fixed(rows: int) -> Callable[[Request], int]:
    """A cap of `rows` for all keys."""
    return lambda request: rows
