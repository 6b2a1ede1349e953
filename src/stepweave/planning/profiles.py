"""What a job will ask of the modules, told from jobs like it that have run."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from typing import Literal, NamedTuple

from stepweave.scheduling.task import Demand, Key, Load

KINDS = 256  # shapes that are remembered; the least recently used goes first
PARTS = 64  # different loads of a job that are told apart

Phase = Literal["before", "step", "after"]


class Shape(NamedTuple):
    """What is known of a job before it runs."""

    pixels: int = 0  # of an image; 0 if the pipeline's own size is asked for
    images: int = 1
    kind: Hashable = None  # equal for jobs whose calls differ in nothing but sizes and steps


class Recorder:
    """Counts a job's calls as they come, by phase."""

    def __init__(self) -> None:
        self._calls: dict[Phase, Counter[tuple[Key, int]]] = {
            "before": Counter(),
            "step": Counter(),
            "after": Counter(),
        }

    def call(self, phase: Phase, key: Key, rows: int) -> None:
        counts, rows = self._calls[phase], max(1, rows)
        if (key, rows) in counts or len(counts) < PARTS:
            counts[key, rows] += 1

    def demand(self, steps: int) -> Demand:
        """What a job of so many steps asked for."""
        return Demand(
            steps,
            _loads(self._calls["before"], 1),
            _loads(self._calls["step"], max(1, steps)),
            _loads(self._calls["after"], 1),
        )


def _loads(calls: Counter[tuple[Key, int]], times: int) -> tuple[Load, ...]:
    return tuple(Load(key, rows, count / times) for (key, rows), count in calls.items())


class Profiles:
    """Demands by shape; for a shape that has not run yet, the nearest one's, its rows scaled by
    images, its sizes by pixels.

    Which modules' sizes go by pixels is told from two shapes of one kind where there are two; else
    those of steps, and of what follows them, are taken to.
    """

    def __init__(self) -> None:
        self._demands: OrderedDict[Shape, Demand] = OrderedDict()

    def learn(self, shape: Shape, demand: Demand) -> None:
        """Remember what a job of a shape asked for."""
        old = self._demands.pop(shape, None) or self._like(shape)
        if old is not None and not demand.before:  # its prompt was remembered
            demand = Demand(demand.steps, old.before, demand.step, demand.after)
        self._demands[shape] = demand
        if len(self._demands) > KINDS:
            self._demands.popitem(last=False)

    def expect(self, shape: Shape, steps: int) -> Demand:
        """What a job of so many steps will ask for; nothing but the steps if no job has run yet."""
        like = self._demands.get(shape) or self._like(shape) or Demand()
        return Demand(steps, like.before, like.step, like.after)

    def _like(self, shape: Shape) -> Demand | None:
        if not self._demands:
            return None

        def distance(other: Shape) -> tuple[bool, float, int]:
            return other.kind != shape.kind, _apart(other.pixels, shape.pixels), other.images

        near = min(self._demands, key=distance)
        demand = self._demands[near]
        pixels = shape.pixels / near.pixels if shape.pixels and near.pixels else 1.0
        images = shape.images / near.images
        fixed = self._fixed(near)
        return Demand(
            demand.steps,
            demand.before,
            _scaled(demand.step, fixed, pixels, images),
            _scaled(demand.after, fixed, pixels, images),
        )

    def _fixed(self, near: Shape) -> set[Key]:
        """Keys that another size has, too."""
        keys = _keys(self._demands[near])
        others = (
            demand
            for shape, demand in self._demands.items()
            if shape.kind == near.kind and shape.pixels != near.pixels
        )
        return set().union(*(keys & _keys(demand) for demand in others))


def _keys(demand: Demand) -> set[Key]:
    return {load.key for load in (*demand.before, *demand.step, *demand.after)}


def _apart(a: int, b: int) -> float:
    return abs(math.log((a or 1) / (b or 1)))


def _scaled(
    loads: Iterable[Load], fixed: set[Key], pixels: float, images: float
) -> tuple[Load, ...]:
    return tuple(
        Load(
            load.key
            if load.key in fixed
            else load.key._replace(size=max(1, round(load.key.size * pixels))),
            max(1, round(load.rows * images)),
            load.calls,
        )
        for load in loads
    )
