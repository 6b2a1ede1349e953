"""Figures of a run, medians over seeds, and ratios paired by seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import get_args

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.locust.schedule import Kind
from benchmarks.measure import Interval, Spread
from benchmarks.serving.client import Attempt, Outcome, Status

SLOW = 3  # multiple of a request's seconds alone
PERCENTILES = (50, 95, 99)
IN_FLIGHT = "stepweave_requests_in_flight"
ETA = "stepweave_eta_error_seconds"
ETA_NEAR = 1.0  # seconds
Value = float | None


def summarise(
    outcomes: Sequence[Outcome], solo: Mapping[Kind, float], seconds: float
) -> dict[str, Value]:
    """The figures of a run of `seconds`. Latencies are in seconds from the scheduled arrival, of
    requests answered with an image.

    Shares are of all requests (`deadline hits` of all with a deadline), so refusals count against a
    contestant. Throughput is in answers per second until the last one.
    """
    latencies = [outcome.latency for outcome in outcomes if outcome.latency is not None]
    fast = [o.latency is not None and o.latency <= SLOW * solo[o.request.kind] for o in outcomes]
    on_time = [outcome.on_time for outcome in outcomes if outcome.request.deadline is not None]
    elapsed = max([seconds, *(outcome.finish for outcome in outcomes if outcome.attempts)])
    counts = Counter(outcome.status for outcome in outcomes)
    return {
        "sent": len(outcomes),
        **latency_figures(latencies),
        "within 3x solo": share(fast),
        "deadline hits": share(on_time),
        **{
            status: counts[status] / len(outcomes) if outcomes else None
            for status in get_args(Status)
        },
        "throughput": len(latencies) / elapsed,
        "late sending": max((outcome.lag for outcome in outcomes), default=None),
    }


def latency_figures(latencies: Sequence[float]) -> dict[str, Value]:
    if not latencies:
        return {"mean": None, **{f"p{percentile}": None for percentile in PERCENTILES}}
    values = np.percentile(latencies, PERCENTILES).tolist()
    return {
        "mean": float(np.mean(latencies)),
        **{f"p{percentile}": value for percentile, value in zip(PERCENTILES, values, strict=True)},
    }


def share(flags: Sequence[bool]) -> Value:
    return sum(flags) / len(flags) if flags else None


def over_seeds(runs: Sequence[Mapping[str, Value]], figure: str) -> Spread | None:
    return Spread.known(run[figure] for run in runs)


def ratios(
    above: Sequence[Mapping[str, Value]], below: Sequence[Mapping[str, Value]], figure: str
) -> Spread | None:
    """`above` over `below`, run by run, of runs with the same seeds in the same order, and so with
    the same requests."""
    return Spread.known(_paired(above, below, figure))


def interval(
    above: Sequence[Mapping[str, Value]], below: Sequence[Mapping[str, Value]], figure: str
) -> Interval | None:
    """The mean of these ratios, with its confidence interval."""
    return Interval.of(_paired(above, below, figure))


def _paired(
    above: Sequence[Mapping[str, Value]], below: Sequence[Mapping[str, Value]], figure: str
) -> list[float]:
    pairs = [(upper[figure], lower[figure]) for upper, lower in zip(above, below, strict=True)]
    return [upper / lower for upper, lower in pairs if upper is not None and lower]


# Overload


def over_time(
    outcomes: Sequence[Outcome], seconds: float, width: float, capacity: float
) -> list[dict[str, float | str | None]]:
    """Per `width` seconds: arrivals, goodput (images on time, of capacity) and refusals per
    second, and the longest wait."""
    rows: list[dict[str, float | str | None]] = []
    attempts = [attempt for outcome in outcomes for attempt in outcome.attempts]
    for first in np.arange(0, seconds, width).tolist():
        last = min(first + width, seconds)
        answered = [o for o in outcomes if o.status == "answered" and first <= o.finish < last]
        refused = [
            a for a in attempts if a.status == "refused" and first <= a.began + a.seconds < last
        ]
        waits = [outcome.attempts[-1].seconds for outcome in answered]
        rows.append(
            {
                "seconds": f"{first:.0f} to {last:.0f}",
                "sent / capacity": sum(first <= a.began < last for a in attempts)
                / (last - first)
                / capacity,
                "goodput / capacity": sum(outcome.on_time for outcome in answered)
                / (last - first)
                / capacity,
                "refused / capacity": len(refused) / (last - first) / capacity,
                "longest wait s": max(waits, default=None),
            }
        )
    return rows


def refusals(outcomes: Iterable[Outcome]) -> list[Attempt]:
    return [
        attempt
        for outcome in outcomes
        for attempt in outcome.attempts
        if attempt.status == "refused"
    ]


def returned(
    outcomes: Iterable[Outcome], code: str, returns: int
) -> dict[str, float | str | Spread | None]:
    """Of the clients first refused with `code`: how many got an image when they retried after
    `Retry-After`."""
    clients = [
        o
        for o in outcomes
        if o.attempts and o.attempts[0].status == "refused" and o.attempts[0].code == code
    ]
    succeeded = [outcome for outcome in clients if outcome.status == "answered"]
    return {
        "refused with": code,
        "clients": len(clients),
        "told to wait s": Spread.known(o.attempts[0].retry_after for o in clients),
        **{
            f"succeeded by return {n}": share(
                [o.status == "answered" and len(o.attempts) <= n + 1 for o in clients]
            )
            for n in range(1, returns + 1)
        },
        "seconds in all": Spread.known(outcome.latency for outcome in succeeded),
    }


# From the server's metrics: requests in flight, and errors of its predictions


def in_flight(exposition: str) -> float:
    families = text_string_to_metric_families(exposition)
    return sum(
        sample.value for family in families if family.name == IN_FLIGHT for sample in family.samples
    )


def eta_counts(exposition: str) -> Counter[float]:
    """The histogram of the error so far, by upper bound; empty if there is none."""
    counts: Counter[float] = Counter()
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples if family.name == ETA else ():
            if sample.name == f"{ETA}_bucket":
                counts[float(sample.labels["le"])] += sample.value  # type: ignore[assignment]
    return counts


def eta_figures(counts: Mapping[float, float]) -> dict[str, Value]:
    """Percentiles of the error in seconds, interpolated within buckets; negative if jobs ended
    earlier than predicted."""
    total = counts.get(math.inf, 0)
    if not total:
        return {}
    buckets = sorted(counts.items())
    near = counts[ETA_NEAR] - counts[-ETA_NEAR] if {ETA_NEAR, -ETA_NEAR} <= counts.keys() else None
    return {
        "jobs": total,
        **{
            f"p{percentile} s": _quantile(buckets, percentile / 100 * total)
            for percentile in (5, 50, 95)
        },
        f"within {ETA_NEAR:g} s": None if near is None else near / total,
    }


def _quantile(buckets: Sequence[tuple[float, float]], rank: float) -> float:
    """The value at a rank; in an outermost bucket, its only bound."""
    for (low, below), (high, count) in pairwise([(min(0.0, buckets[0][0]), 0.0), *buckets]):
        if count >= rank:
            return (
                low if math.isinf(high) else low + (high - low) * (rank - below) / (count - below)
            )
    return buckets[-1][0]
