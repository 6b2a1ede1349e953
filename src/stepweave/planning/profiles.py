"""Predicts a job's calls from similar jobs that have run."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable, Iterable
from typing import Literal, NamedTuple

from stepweave.scheduling.task import Demand, Key, Load

KINDS = 256  # shapes that are remembered; the least recently used is dropped
PARTS = 64  # different loads of a job that are counted

Phase = Literal["before", "step", "after"]


class Shape(NamedTuple):
    """The properties of a job that determine its calls."""

    pixels: int = 0  # of an image; 0 for the pipeline's default size
    images: int = 1
    kind: Hashable = None  # equal for jobs whose calls differ only in sizes, steps and adapters
    adapters: int = 0


class Recorder:
    """Counts a job's calls by phase."""

    def __init__(self) -> None:
        self._calls: dict[Phase, Counter[tuple[Key, int]]] = defaultdict(Counter)

    def call(self, phase: Phase, key: Key, rows: int) -> None:
        counts, rows = self._calls[phase], max(1, rows)
        if (key, rows) in counts or len(counts) < PARTS:
            counts[key, rows] += 1

    def demand(self, steps: int) -> Demand:
        """The calls of a job of this many steps."""
        return Demand(
            steps,
            _loads(self._calls["before"], 1),
            _loads(self._calls["step"], max(1, steps)),
            _loads(self._calls["after"], 1),
        )


def _loads(calls: Counter[tuple[Key, int]], times: int) -> tuple[Load, ...]:
    return tuple(Load(key, rows, count / times) for (key, rows), count in calls.items())


class Profiles:
    """Demands by shape; for a new shape, the nearest one's, with rows scaled by images, and sizes
    by pixels.

    Sizes that are equal in two shapes of one kind are not scaled. With one shape, all sizes in and
    after the steps are.
    """

    def __init__(self) -> None:
        self._demands: OrderedDict[Shape, Demand] = OrderedDict()

    def learn(self, shape: Shape, demand: Demand) -> None:
        """Remember the demand of a job of a shape."""
        old = self._demands.pop(shape, None) or self._like(shape)
        if old is not None and not demand.before:  # its prompt's encodings came from the cache
            demand = Demand(demand.steps, old.before, demand.step, demand.after)
        self._demands[shape] = demand
        if len(self._demands) > KINDS:
            self._demands.popitem(last=False)

    def expect(self, shape: Shape, steps: int) -> Demand:
        """Predict the demand of a job of this many steps; without calls if no job has run yet."""
        like = self._demands.get(shape) or self._like(shape) or Demand()
        return Demand(steps, like.before, like.step, like.after)

    def _like(self, shape: Shape) -> Demand | None:
        if not self._demands:
            return None

        def distance(other: Shape) -> tuple[bool, float, int, int]:
            apart = _apart(other.pixels, shape.pixels)
            adapters = abs(other.adapters - shape.adapters)
            return other.kind != shape.kind, apart, other.images, adapters

        near = min(self._demands, key=distance)
        demand = self._demands[near]
        pixels = shape.pixels / near.pixels if shape.pixels and near.pixels else 1.0
        images = shape.images / near.images
        fixed = self._fixed(near)
        return Demand(
            demand.steps,
            demand.before,
            _adapted(_scaled(demand.step, fixed, pixels, images), near.adapters, shape.adapters),
            _scaled(demand.after, fixed, pixels, images),
        )

    def _fixed(self, near: Shape) -> set[Key]:
        """Keys whose size does not depend on the image's size: another size has them, too."""
        keys = _keys(self._demands[near])
        others = (
            demand
            for shape, demand in self._demands.items()
            if shape.kind == near.kind and shape.pixels != near.pixels
        )
        return set().union(*(keys & _keys(demand) for demand in others))


def _keys(demand: Demand) -> set[Key]:
    return {load.key.plain for load in (*demand.before, *demand.step, *demand.after)}


def _adapted(loads: Iterable[Load], had: int, has: int) -> tuple[Load, ...]:
    """Loads of a step of a job that `has` so many adapters, by those of one that `had` others: they
    are for the modules that had some, or for all."""
    return tuple(
        load._replace(key=load.key._replace(adapters=has))
        if had != has and (load.key.adapters or not had)
        else load
        for load in loads
    )


def _apart(a: int, b: int) -> float:
    return abs(math.log((a or 1) / (b or 1)))


def _scaled(
    loads: Iterable[Load], fixed: set[Key], pixels: float, images: float
) -> tuple[Load, ...]:
    return tuple(
        Load(
            load.key
            if load.key.plain in fixed
            else load.key._replace(size=max(1, round(load.key.size * pixels))),
            max(1, round(load.rows * images)),
            load.calls,
        )
        for load in loads
    )
