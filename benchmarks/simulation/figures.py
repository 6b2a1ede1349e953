"""The figures of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.simulation.world import Run

WITHIN = 3  # multiple of a job's time alone, for the share of jobs within it


@dataclass(frozen=True)
class Figures:
    """Latencies in seconds, of served jobs, from their first attempt, including jobs that end after
    the last arrival."""

    mean: float
    p50: float
    p95: float
    p99: float
    slowdown: float  # mean of latency / time alone
    within: float  # share of jobs
    hits: float | None  # share of jobs with a deadline that met it; refused ones did not
    throughput: float  # jobs per second, from the first arrival to the last finish
    refused: float  # share of jobs that were never accepted
    inside: float  # mean latency from acceptance
    told: float | None  # median Retry-After, in seconds
    retries: float | None  # share of retries that were accepted
    kept: float | None  # the same, of those with a promised place (Retry-After <= `max_wait`)
    busy: float  # share of the time
    rows: float  # of a forward, mean
    switches: float  # share of forwards of another key than the one before

    @classmethod
    def of(cls, run: Run, max_wait: float = float("inf")) -> Figures:
        served = [outcome for outcome in run.outcomes if outcome.finished is not None]
        latency = np.array([outcome.latency for outcome in served] or [np.nan])
        solo = np.array([outcome.solo for outcome in served] or [np.nan])
        told = [seconds for outcome in run.outcomes for seconds in outcome.promised]
        again = [back for outcome in run.outcomes for back in outcome.returns()]
        due = [outcome for outcome in run.outcomes if outcome.arrival.deadline is not None]
        met = sum(
            outcome.finished <= outcome.asked[-1] + outcome.arrival.deadline
            for outcome in due
            if outcome.finished is not None and outcome.arrival.deadline is not None
        )
        elapsed = max(run.end - min(outcome.arrival.offset for outcome in run.outcomes), 1e-9)
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
                    [
                        outcome.finished - outcome.asked[-1]
                        for outcome in served
                        if outcome.finished is not None
                    ]
                    or [np.nan]
                )
            ),
            told=float(np.median(told)) if told else None,
            retries=_share([accepted for _, accepted in again]),
            kept=_share([accepted for seconds, accepted in again if seconds <= max_wait]),
            busy=run.busy / elapsed,
            rows=run.rows / max(run.forwards, 1),
            switches=run.switches / max(run.forwards, 1),
        )


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
