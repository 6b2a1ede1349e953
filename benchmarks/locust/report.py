"""Outcomes of arrivals, and figures of a stage. Does not import Locust."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.locust.schedule import Stage

PERCENTILES = (50, 95, 99)

Status = Literal["succeeded", "refused", "failed", "unfinished", "dropped"]


@dataclass
class Outcome:
    """The outcome of an arrival. Seconds count from the scheduled arrival; `reason` is that of a
    failure."""

    status: Status = "unfinished"
    lag: float | None = None  # seconds until the request was sent
    latency: float | None = None  # seconds until the answer was read
    reason: str = ""


def summarise(
    stage: Stage, outcomes: Sequence[Outcome], elapsed: float, target: float
) -> dict[str, Any]:
    """The figures of one stage: rates per second, seconds from the scheduled arrival, shares of all
    arrivals.

    Throughput is over `elapsed`, which includes the drain, in which an overloaded server finishes
    its backlog. Latency is that of successful requests; all others are in the counts.
    """
    latencies = [o.latency for o in outcomes if o.status == "succeeded" and o.latency is not None]
    lags = [outcome.lag for outcome in outcomes if outcome.lag is not None]
    counts = {
        status: sum(outcome.status == status for outcome in outcomes) for status in get_args(Status)
    }
    count = len(outcomes)
    return {
        "offered_rate": stage.rate,
        "arrival_rate": count / stage.seconds,
        "count": count,
        "counts": counts,
        "share": {status: n / count if count else 0.0 for status, n in counts.items()},
        "elapsed_seconds": elapsed,
        "throughput": len(latencies) / elapsed,
        "goodput": sum(latency <= target for latency in latencies) / elapsed,
        "latency_seconds": {
            "mean": float(np.mean(latencies)) if latencies else None,
            **_percentiles(latencies),
        },
        "send_lag_seconds": _percentiles(lags),
        "failures": dict(
            Counter(outcome.reason for outcome in outcomes if outcome.reason).most_common(20)
        ),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"p{percentile}": None for percentile in PERCENTILES}
    results = zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    return {f"p{percentile}": float(value) for percentile, value in results}


def line(stage: dict[str, Any]) -> str:
    """A stage as a line for the console."""
    latency = stage["latency_seconds"]
    times = " ".join(
        "     -" if latency[name] is None else f"{latency[name]:6.2f}"
        for name in ("p50", "p95", "p99")
    )
    counts = "".join(f"{n:11d}" for n in stage["counts"].values())
    return (
        f"{stage['offered_rate']:7g} {stage['count']:6d} {stage['throughput']:10.2f} "
        f"{stage['goodput']:8.2f} {times} {counts}"
    )


HEADER = (
    f"{'rate/s':>7} {'count':>6} {'answered/s':>10} {'goodput':>8} {'p50 s':>6} {'p95 s':>6} "
    f"{'p99 s':>6} " + "".join(f"{status:>11}" for status in get_args(Status))
)
