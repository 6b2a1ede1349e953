"""Outcomes of arrivals, and figures of a stage. Does not import Locust."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.locust.schedule import Kind, Stage

PERCENTILES = (50, 95, 99)
BEYOND = 5  # samples that must be expected beyond a percentile
LATE = 0.1  # seconds; a request that is sent later than that was delayed by the client

Status = Literal["succeeded", "refused", "failed", "unfinished", "dropped"]
Verdict = Literal["sustained", "not sustained", "too few samples"]


@dataclass
class Outcome:
    """The outcome of an arrival. Seconds count from the scheduled arrival; `reason` is that of a
    failure."""

    status: Status = "unfinished"
    lag: float | None = None  # seconds until the request was sent
    latency: float | None = None  # seconds until the answer was read
    reason: str = ""


def samples_needed(percentile: int) -> int:
    """The least number of samples of which this percentile is given."""
    return math.ceil(BEYOND * 100 / (100 - percentile))


def times_alone(samples: Mapping[Kind, Sequence[float]], target: float) -> list[dict[str, Any]]:
    """For each kind: the median of its seconds alone, and the latency that is good at `target`."""
    return [
        {
            "size": kind.size,
            "steps": kind.steps,
            "seconds": float(np.median(seconds)),
            "target_seconds": target * float(np.median(seconds)),
            "samples": list(seconds),
        }
        for kind, seconds in samples.items()
    ]


def summarise(
    stage: Stage,
    outcomes: Sequence[Outcome],
    drained: float,
    alone: Sequence[Mapping[str, Any]],
    target: float,
) -> dict[str, Any]:
    """The figures of one stage, whose last answer came `drained` seconds after its end. `outcomes`
    are those of its arrivals, in order; `alone` is from `times_alone`.

    Rates count arrivals of the stage, by their outcome, and are per second of the stage: the drain
    after it does not change them. The slowdown is the latency as a multiple of the kind's time
    alone. Latency and slowdown are those of successful requests; all others are in the counts.
    """
    seconds = {Kind(entry["size"], entry["steps"]): entry["seconds"] for entry in alone}
    pairs = list(zip(stage.arrivals, outcomes, strict=True))
    answers = [
        (o.latency, o.latency / seconds[arrival.kind])
        for arrival, o in pairs
        if o.status == "succeeded" and o.latency is not None
    ]
    slowdown = _spread([multiple for _, multiple in answers])
    counts = {
        status: sum(outcome.status == status for outcome in outcomes) for status in get_args(Status)
    }
    count = len(outcomes)
    lags = [outcome.lag for outcome in outcomes if outcome.lag is not None]
    verdict, reasons = _judge(
        count, len(answers), drained, target * max(seconds.values()), slowdown["p95"], target
    )
    return {
        "offered_rate": stage.rate,
        "seconds": stage.seconds,
        "arrival_rate": count / stage.seconds,
        "count": count,
        "counts": counts,
        "share": {status: n / count if count else 0.0 for status, n in counts.items()},
        "succeeded_rate": len(answers) / stage.seconds,
        "good_rate": sum(multiple <= target for _, multiple in answers) / stage.seconds,
        "lost_rate": (count - len(answers)) / stage.seconds,
        "backlog_at_end": sum(
            o.status != "dropped"
            and (o.latency is None or arrival.offset + o.latency > stage.seconds)
            for arrival, o in pairs
        ),
        "drain_seconds": drained,
        "latency_seconds": _spread([latency for latency, _ in answers]),
        "slowdown": slowdown,
        "verdict": verdict,
        "reasons": reasons,
        "send_lag_seconds": {"max": max(lags, default=None), "late": sum(s > LATE for s in lags)},
        "failures": dict(
            Counter(outcome.reason for outcome in outcomes if outcome.reason).most_common(20)
        ),
    }


def drain_limit(alone: Sequence[Mapping[str, Any]]) -> float:
    """Seconds within which a server that keeps up answers what is open at a stage's end: the
    latency that is good for the slowest kind."""
    return max(float(entry["target_seconds"]) for entry in alone)


def _judge(
    count: int, answers: int, drained: float, limit: float, p95: float | None, target: float
) -> tuple[Verdict, list[str]]:
    """Whether the rate was sustained, and why not: losses and a long drain need no percentile."""
    reasons = []
    if answers < count:
        reasons.append(f"{count - answers} of {count} requests got no image")
    if drained > limit:
        reasons.append(
            f"the last answer came {drained:.1f} s after the last arrivals (limit {limit:.1f} s)"
        )
    if p95 is not None and p95 >= target:
        reasons.append(f"p95 was {p95:.3g} times the time alone")
    if reasons:
        return "not sustained", reasons
    if p95 is None:
        return "too few samples", [f"{answers} answers, p95 takes {samples_needed(95)}"]
    return "sustained", []


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles; None for those of which there are too few samples."""
    figures: dict[str, float | None] = {"mean": float(np.mean(values)) if values else None}
    for percentile in PERCENTILES:
        enough = len(values) >= samples_needed(percentile)
        figures[f"p{percentile}"] = float(np.percentile(values, percentile)) if enough else None
    return figures
