"""Step-time curves from JSON, and the least cost of jobs.

A file has `name`, `source` and `curves`: a list of `module`, `size` ("WIDTHxHEIGHT", or elements)
and `seconds` by rows. The optional `jobs` has the calls of jobs by image size: lists of `module`,
`size`, `rows` (1) and `calls` (1) `before` the first step, in each `step` and `after` the last.
Without it, a job has one row of `transformer` in each step.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepweave.planning.cost import CostModel
from stepweave.scheduling.task import Demand, Key, Load

DENOISER = "transformer"


def elements(size: str | int) -> int:
    """A number proportional to the tokens of an image. Raises ValueError if it is not a size."""
    if isinstance(size, int):
        return size
    width, _, height = size.partition("x")
    return int(width) * int(height)


@dataclass(frozen=True)
class Curves:
    """Seconds of a forward by rows, for each key, and the calls of a job by image size."""

    name: str
    source: str
    seconds: Mapping[Key, Mapping[int, float]]
    jobs: Mapping[str, Demand]

    @classmethod
    def read(cls, path: Path) -> Curves:
        content = json.loads(path.read_text())
        seconds = {
            Key(curve["module"], elements(curve["size"])): {
                int(rows): time for rows, time in curve["seconds"].items()
            }
            for curve in content["curves"]
        }
        jobs = {
            size: Demand(1, *(_loads(parts.get(part, ())) for part in ("before", "step", "after")))
            for size, parts in content.get("jobs", {}).items()
        }
        return cls(content["name"], content["source"], seconds, jobs)

    def model(self) -> CostModel:
        return CostModel.of(self.seconds)

    def demand(self, size: str, steps: int) -> Demand:
        """The calls of a job."""
        if size in self.jobs:
            of_size = self.jobs[size]
            return Demand(steps, of_size.before, of_size.step, of_size.after)
        return Demand(steps, step=(Load(Key(DENOISER, elements(size)), 1),))

    def most_rows(self, key: Key) -> int:
        """The most rows in the key's curve; for a key without one, the most rows in any."""
        return max(
            self.seconds.get(key)
            or {rows: 0.0 for curve in self.seconds.values() for rows in curve}
        )


def _loads(parts: Sequence[Mapping[str, Any]]) -> tuple[Load, ...]:
    return tuple(
        Load(Key(part["module"], elements(part["size"])), part.get("rows", 1), part.get("calls", 1))
        for part in parts
    )


def knees(curves: Curves, cost: CostModel) -> Callable[[Key], int]:
    """The knee of each key, within the range of its curve."""
    return functools.cache(lambda key: cost.knee(key, curves.most_rows(key)))


def best_seconds(curves: Curves, cost: CostModel, key: Key) -> float:
    """Seconds per row in the batch with the highest throughput."""
    return min(cost.seconds(key, rows) / rows for rows in range(1, curves.most_rows(key) + 1))


def least_work(curves: Curves, cost: CostModel, demand: Demand) -> float:
    """The least seconds of the engine for a job, with each row in the best batch."""

    def seconds(loads: Sequence[Load]) -> float:
        return sum(load.calls * load.rows * best_seconds(curves, cost, load.key) for load in loads)

    return seconds(demand.before) + demand.steps * seconds(demand.step) + seconds(demand.after)
