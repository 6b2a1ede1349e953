"""The cost model: seconds of a forward by key and rows, learnt from earlier forwards."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from statistics import median

from stepweave.scheduling.task import Key, Load

# latest forwards of a key and rows whose median is used, to ignore compilations and page faults
RECENT = 9
KEYS = 512  # the least recently used is dropped
TRIED = 3  # forwards of a number of rows before it is trusted
HOPE = 0.5  # assumed cost of each row beyond those tried, in rows: low, so that they are tried
GAIN = 0.05  # the knee: more rows bring less than this share of rows per second
ERRORS = 64  # forwards of which the model's error is calculated

Point = tuple[int, float]  # rows, seconds
Cell = tuple[int, float, int]  # rows, seconds, forwards


class CostModel:
    """Seconds of a forward by (key, rows), never less for more rows.

    It interpolates between observed row counts. For others, and for new sizes, it uses the module's
    nearest size, at the row count with as many elements in total: a batch's cost depends on its
    number of tokens. Of one size with other adapters, it uses the nearest number of these.
    """

    def __init__(self) -> None:
        self._curves: OrderedDict[Key, _Curve] = OrderedDict()
        self._modules: dict[str, dict[Key, _Curve]] = {}
        self._errors: deque[float] = deque(maxlen=ERRORS)

    @classmethod
    def of(cls, curves: Mapping[Key, Mapping[int, float]]) -> CostModel:
        """A model with these seconds, by key and rows."""
        model = cls()
        for key, points in curves.items():
            for rows, seconds in points.items():
                for _ in range(TRIED):
                    model.observe(key, rows, seconds)
        model._errors.clear()
        return model

    def observe(self, key: Key, rows: int, seconds: float) -> None:
        """Learn the duration of a forward."""
        rows = max(1, rows)
        if not (seconds > 0 and math.isfinite(seconds)):
            return
        curve = self._curves.get(key)
        if curve is None:
            curve = _Curve()
            curve.add(rows, seconds)  # first, since other threads read curves
            self._curves[key] = self._modules.setdefault(key.module, {})[key] = curve
            if len(self._curves) > KEYS:
                old, _ = self._curves.popitem(last=False)
                del self._modules[old.module][old]
        else:
            self._curves.move_to_end(key)
            self._errors.append(seconds / self.seconds(key, rows) - 1)
            curve.add(rows, seconds)

    def seconds(self, key: Key, rows: float) -> float:
        """Seconds of a forward; 0 for a module that never ran."""
        curve = self._curves.get(key)
        if curve is not None and curve.covers(rows):
            return curve.at(rows)
        curves = self._modules.get(key.module)
        if not curves:
            return 0.0
        others = [other for other in list(curves) if other != key]
        if not key.adapters:  # few numbers of rows may have run with adapters
            others = [other for other in others if not other.adapters] or others
        if not others or not key.size:
            return (curve or next(iter(curves.values()))).at(rows)
        nearest = min(others, key=lambda other: _distance(other, key))
        like = curves[nearest]
        scale = key.size / (nearest.size or 1)
        if curve is None:
            return (
                self.seconds(nearest, rows * scale) if nearest.adapters else like.at(rows * scale)
            )
        seen = curve.nearest(rows)
        ratio = curve.at(seen) / like.at(seen * scale)  # to the other size, where both are known
        return curve.between(rows, like.at(rows * scale) * ratio)

    def alone(self, loads: Iterable[Load]) -> float:
        """Seconds of calls that share no forward."""
        return sum(load.calls * self.seconds(load.key, load.rows) for load in loads)

    def knee(self, key: Key, most: int) -> int:
        """The smallest number of rows, up to `most`, beyond which none brings GAIN more rows per
        second. So that more rows are tried, the bound doubles until the knee is passed."""
        curves = self._modules.get(key.module)
        if not curves:
            return most
        tried, least, bound = most, 1, most
        # rows that were tried with other adapters are tried: these do not change which rows pay
        alike = [curve for one, curve in list(curves.items()) if one.size == key.size]
        if alike:
            tried = max(curve.tried for curve in alike)
            least = min(curve.least for curve in alike)
            bound = min(most, 2 * max(curve.most for curve in alike))
        every = range(min(least, bound), bound + 1)
        counts = [rows for rows in every if rows <= 4 or rows % 2 == 0 or rows == bound]
        rates = {rows: rows / max(self.seconds(key, rows), 1e-9) for rows in counts}
        best = max(rates.values())
        knee = next(rows for rows, rate in rates.items() if best < (1 + GAIN) * rate)
        return bound if tried <= knee else knee

    @property
    def timed(self) -> bool:
        """Whether any forward has run."""
        return bool(self._curves)

    def known(self, key: Key) -> bool:
        """Whether forwards of the key, or of its module in another size, have run."""
        return bool(self._modules.get(key.module))

    @property
    def error(self) -> float:
        """The median error of the last predictions, as a share of the prediction; 0 without any."""
        errors = list(self._errors)
        return median(map(abs, errors)) if errors else 0.0

    def curves(self) -> dict[Key, dict[int, float]]:
        """Observed seconds by key and rows."""
        return {key: dict(curve.points()) for key, curve in list(self._curves.items())}


def _distance(one: Key, other: Key) -> tuple[float, int]:
    return abs(math.log((one.size or 1) / (other.size or 1))), abs(one.adapters - other.adapters)


class PriceList:
    """Seconds of loads alone, which a list calculates only once, so that equal jobs have equal
    prices although the cost model learns."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._prices: dict[tuple[Load, ...], float] = {}

    def alone(self, loads: tuple[Load, ...]) -> float:
        seconds = self._prices.get(loads)
        # an unknown price may be known by now: with 0 a job would go before all others
        if not seconds:
            seconds = self._prices[loads] = self._cost.alone(loads)
        return seconds


class _Curve:
    """Seconds by rows of one key."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._points: list[Point] | None = None

    @property
    def tried(self) -> int:
        """The largest number of rows that ran TRIED times; 0 if none did."""
        counts = [rows for rows, seen in list(self._seen.items()) if len(seen) >= TRIED]
        return max(counts, default=0)

    @property
    def least(self) -> int:
        return min(self._seen)

    @property
    def most(self) -> int:
        return max(self._seen)

    def add(self, rows: int, seconds: float) -> None:
        seen = self._seen.setdefault(rows, deque(maxlen=RECENT))
        seen.append(seconds)
        self._medians[rows] = median(seen)
        self._points = None

    def points(self) -> list[Point]:
        """Observed row counts and their seconds, made monotone."""
        points = self._points
        if points is None:
            middles = sorted(self._medians.copy().items())
            cells = [(rows, seconds, len(self._seen[rows])) for rows, seconds in middles]
            points = self._points = list(_monotone(_trusted(cells)))
        return points

    def covers(self, rows: float) -> bool:
        points = self.points()
        return points[0][0] <= rows <= points[-1][0]

    def nearest(self, rows: float) -> float:
        points = self.points()
        return min(max(rows, points[0][0]), points[-1][0])

    def between(self, rows: float, seconds: float) -> float:
        """`seconds`, an estimate for unobserved rows, limited to be no less than for fewer rows and
        no more than for more."""
        points = self.points()
        return min(seconds, points[0][1]) if rows < points[0][0] else max(seconds, points[-1][1])

    def at(self, rows: float) -> float:
        """Seconds for these rows: interpolated, or extrapolated by the slope at the end; not less
        than the first point's share, and never falling."""
        points = self.points()
        (low, first), (high, last) = points[0], points[-1]
        if rows <= low:
            # along the line through the first two points
            slope = first / low
            if len(points) > 1:
                slope = (points[1][1] - first) / (points[1][0] - low)
            return max(first - slope * (low - rows), first * rows / low)
        if rows >= high:
            # the slope of the last two points may be noise, so from half of the rows
            middle = next((point for point in reversed(points) if point[0] <= high / 2), None)
            slope = HOPE * last / high
            if middle is not None:
                slope = (last - middle[1]) / (high - middle[0])
            return last + slope * (rows - high)
        i = bisect_left(points, (rows, 0.0))
        (a, before), (b, after) = points[i - 1], points[i]
        return before + (after - before) * (rows - a) / (b - a)


def _trusted(cells: Iterable[Cell]) -> list[Cell]:
    """Limit the seconds of cells with few forwards to those of trusted cells with more rows: one
    slow forward must not make all seem slow."""
    trusted: list[Cell] = []
    least = math.inf
    for rows, seconds, weight in reversed(list(cells)):
        if weight >= TRIED:
            least = min(least, seconds)
        trusted.append((rows, seconds if weight >= TRIED else min(seconds, least), weight))
    return trusted[::-1]


def _monotone(cells: Iterable[Cell]) -> Iterable[Point]:
    """The least-squares fit of seconds that do not fall with rows. Cells are sorted by rows.

    Isotonic regression by pooling adjacent violators; Barlow et al., Statistical Inference under
    Order Restrictions, 1972.
    """
    pools: list[tuple[float, int, list[int]]] = []
    for rows, seconds, weight in cells:
        pool = (seconds, weight, [rows])
        while pools and pools[-1][0] >= pool[0]:
            mean, mass, members = pools.pop()
            total = mass + pool[1]
            pool = ((mean * mass + pool[0] * pool[1]) / total, total, members + pool[2])
        pools.append(pool)
    return [(rows, mean) for mean, _, members in pools for rows in members]
