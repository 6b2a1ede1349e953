"""A lower bound of the mean latency of any schedule, even with knowledge of the future."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from benchmarks.simulation.arrivals import Arrival
from benchmarks.simulation.curves import Curves, least_work
from stepweave.planning.cost import CostModel


def least_mean_latency(requests: Sequence[Arrival], curves: Curves, cost: CostModel) -> float:
    """A lower bound of the mean latency of all requests, in seconds: the largest of three.

    Count a row of a forward as the least seconds per row that its key ever takes. Then a second of
    the engine never yields more than one second of that work, and a job needs a fixed amount of it,
    so any schedule is also one of a single machine of speed 1 that may be shared and interrupted,
    with these amounts as job sizes and the same arrivals. On that machine

    - shortest remaining time first has the least mean latency (Schrage, A proof of the optimality
      of the shortest remaining processing time discipline, 1968);
    - the mean of when a job gets its work, averaged over jobs, is least if the smallest job goes
      first (Goemans, Improved approximation algorithms for scheduling with release dates, 1997),
      and a job that takes `solo` seconds alone can end no sooner than half of that after it;

    and no job takes less than it does alone.
    """
    jobs = [request.task(curves, cost, request.offset) for request in requests]
    work = [least_work(curves, cost, job.demand) for job in jobs]
    offsets = [request.offset for request in requests]
    count = len(jobs)
    solo = sum(job.solo for job in jobs) / count
    ends, _ = _machine(offsets, work, lambda number, left: left)
    _, middles = _machine(offsets, work, lambda number, left: work[number])
    shortest_first = sum(ends) / count - sum(offsets) / count
    halves = sum(middles) / count + solo / 2 - sum(offsets) / count
    return max(solo, shortest_first, halves)


def _machine(
    offsets: Sequence[float], work: Sequence[float], order: Callable[[int, float], float]
) -> tuple[list[float], list[float]]:
    """Simulate one machine that always works on the job with the lowest order; returns each job's
    end, and the mean time of its work."""
    ends, middles = [0.0] * len(work), [0.0] * len(work)
    left = list(work)
    ready: list[tuple[float, int]] = []
    arriving = sorted(range(len(work)), key=lambda number: offsets[number])
    now, i = 0.0, 0
    while i < len(arriving) or ready:
        if not ready:
            now = max(now, offsets[arriving[i]])
        while i < len(arriving) and offsets[arriving[i]] <= now:
            heapq.heappush(ready, (order(arriving[i], left[arriving[i]]), arriving[i]))
            i += 1
        _, number = heapq.heappop(ready)
        until = min(now + left[number], offsets[arriving[i]] if i < len(arriving) else float("inf"))
        middles[number] += (until - now) / work[number] * (now + until) / 2
        if until >= now + left[number]:
            ends[number] = now = until
        else:
            left[number] -= until - now
            now = until
            heapq.heappush(ready, (order(number, left[number]), number))
    return ends, middles
