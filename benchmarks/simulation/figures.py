"""What a simulation comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.simulation.world import Run

WITHIN = 3  # times the solo time, for the share of jobs that took no longer


@dataclass(frozen=True)
class Figures:
    """Latencies in seconds, of the jobs that were served, from the first time they asked. Jobs
    still there when the last one has come are served, too, and count."""

    mean: float
    p50: float
    p95: float
    p99: float
    slowdown: float  # mean of latency / time alone
    within: float  # share of jobs
    # share of the jobs with a deadline that met it; those that were refused did not
    hits: float | None
    throughput: float  # jobs per second, from the first arrival to the last finish
    refused: float  # share of jobs that were refused for good
    inside: float  # mean latency from when they were let in
    told: float | None  # median Retry-After, in seconds
    retries: float | None  # share of those who came again as told and were let in then
    # the same, of those for whom a place was to be kept: they were told no more than `max_wait`
    kept: float | None
    busy: float  # share of the time
    rows: float  # of a forward, mean
    switches: float  # share of forwards of another key than the one before

    @classmethod
    def of(cls, run: Run, max_wait: float = float("inf")) -> Figures:
        served = [one for one in run.outcomes if one.finished is not None]
        latency = np.array([one.latency for one in served] or [np.nan])
        solo = np.array([one.solo for one in served] or [np.nan])
        told = [seconds for one in run.outcomes for seconds in one.promised]
        again = [back for one in run.outcomes for back in one.returns()]
        due = [one for one in run.outcomes if one.arrival.deadline is not None]
        met = sum(
            one.finished <= one.asked[-1] + one.arrival.deadline
            for one in due
            if one.finished is not None and one.arrival.deadline is not None
        )
        elapsed = max(run.end - min(one.arrival.offset for one in run.outcomes), 1e-9)
        p50, p95, p99 = np.percentile(latency, (50, 95, 99)).tolist()
        return cls(
            mean=float(latency.mean()),
            p50=p50,
            p95=p95,
            p99=p99,
            slowdown=float((latency / solo).mean()),
            within=float((latency <= WITHIN * solo).mean()),
            hits=met / len(due) if due else None,
            throughput=len(served) / elapsed,
            refused=1 - len(served) / len(run.outcomes),
            inside=float(
                np.mean(
                    [one.finished - one.asked[-1] for one in served if one.finished is not None]
                    or [np.nan]
                )
            ),
            told=float(np.median(told)) if told else None,
            retries=_share([let_in for _, let_in in again]),
            kept=_share([let_in for seconds, let_in in again if seconds <= max_wait]),
            busy=run.busy / elapsed,
            rows=run.rows / max(run.forwards, 1),
            switches=run.switches / max(run.forwards, 1),
        )


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
