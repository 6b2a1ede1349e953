"""Arrivals of requests: a Poisson process, bursts, or a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulation.curves import Curves, least_work
from stepweave.planning.cost import CostModel
from stepweave.scheduling.task import Demand, Priority, Task


@dataclass(frozen=True)
class Arrival:
    """A request: `offset` in seconds from the start, `deadline` in seconds from the arrival."""

    offset: float
    size: str
    steps: int
    deadline: float | None = None
    priority: Priority = Priority.NORMAL

    def task(self, curves: Curves, cost: CostModel, now: float) -> Task:
        """The job of a request that is sent now, possibly as a retry."""
        deadline = None if self.deadline is None else now + self.deadline
        task = Task(
            curves.demand(self.size, self.steps),
            arrived=now,
            priority=self.priority,
            deadline=deadline,
        )
        task.price(cost)
        return task


@dataclass(frozen=True)
class Shape:
    """A kind of job, and its share of all jobs."""

    size: str
    steps: int
    share: float


Mix = Sequence[Shape]


def parse_mix(text: str) -> list[Shape]:
    """Parse size, steps and weight, as in `512x512:4:15,1024x1024:50:15`."""
    parts = [part.split(":") for part in text.split(",")]
    total = sum(float(share) for _, _, share in parts)
    return [Shape(size, int(steps), float(share) / total) for size, steps, share in parts]


def capacity(mix: Mix, curves: Curves, cost: CostModel) -> float:
    """Load 1, the upper limit: jobs per second if every forward had the batch with the highest
    throughput."""
    demands: list[tuple[Demand, float]] = [
        (curves.demand(shape.size, shape.steps), shape.share) for shape in mix
    ]
    return 1 / sum(share * least_work(curves, cost, demand) for demand, share in demands)


def arrivals(mix: Mix, rate: float, count: int, seed: int, burst: float = 1) -> list[Arrival]:
    """`count` requests at `rate` per second, in simultaneous bursts of geometric size with the mean
    `burst`; 1 is a Poisson process.

    The same seed gives the same requests at any rate, scaled in time.
    """
    random = np.random.default_rng(seed)
    gaps = random.exponential(1, count)
    heads = random.random(count) < 1 / burst
    offsets = np.cumsum(np.where(heads, gaps * burst, 0.0)) / rate
    kinds = random.choice(len(mix), count, p=[shape.share for shape in mix])
    return [
        Arrival(offset, mix[kind].size, mix[kind].steps)
        for offset, kind in zip(offsets.tolist(), kinds.tolist(), strict=True)
    ]


def with_deadlines(
    requests: Sequence[Arrival],
    curves: Curves,
    cost: CostModel,
    share: float,
    slack: float,
    seed: int,
) -> list[Arrival]:
    """Give a share of the requests a deadline of `slack` times their seconds alone."""
    random = np.random.default_rng((seed, 1))
    chosen = random.random(len(requests)) < share
    return [
        replace(request, deadline=slack * request.task(curves, cost, 0.0).solo) if due else request
        for request, due in zip(requests, chosen, strict=True)
    ]


def read_trace(path: Path) -> list[Arrival]:
    """Read a JSON array, or one object per line, with `offset`, `size`, `steps`, and optionally
    `deadline` (seconds) and `priority` (name)."""
    text = path.read_text()
    objects = (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.splitlines() if line]
    )
    return sorted(map(_arrival, objects), key=lambda arrival: arrival.offset)


def _arrival(fields: dict[str, Any]) -> Arrival:
    priority = fields.get("priority", "normal")
    return Arrival(
        float(fields["offset"]),
        fields["size"],
        int(fields["steps"]),
        fields.get("deadline"),
        Priority[priority.upper()] if isinstance(priority, str) else Priority(priority),
    )
