"""Measurements before the parts: warm-up, seconds of each kind alone, capacity."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from benchmarks.locust.schedule import Kind
from benchmarks.measure import Part, Report, Row, Spread
from benchmarks.serving.client import CHECK_SECONDS, BenchmarkError, offer, require, saturate, send
from benchmarks.serving.figures import in_flight
from benchmarks.serving.mix import KINDS, SIZES, endless, of_kind
from benchmarks.serving.report import progress

BURST = 12  # concurrent requests of the warm-up; fewer than the overloaded server's queue
BURSTS = 4  # at most
WARM_UP_SECONDS = 120  # timeout of a burst
IDLE_SECONDS = 60
# of the closed loop: more than the largest batch; also the overloaded server's queue
CLIENTS = 24
WARM_UP_SEED, SOLO_SEED, CAPACITY_SEED = 10_000, 20_000, 30_000


@dataclass(frozen=True)
class Scale:
    """How much is measured; times in seconds."""

    loads: tuple[float, ...]
    seeds: tuple[int, ...]
    seconds: float  # of a run
    deadlines: float  # share of requests with a deadline
    overload_seconds: float = 60
    trace_seconds: float = 45
    ramp: float = 15  # until a closed loop is steady
    capacity_seconds: float = 45
    solo_repeats: int = 3
    drain: float = 60


@dataclass(frozen=True)
class Contestant:
    """A running server: its client, and a check that raises if it has ended."""

    name: str
    client: httpx.AsyncClient
    check: Callable[[], None]


@dataclass(frozen=True)
class Known:
    """Seconds of each kind alone, and the capacity in requests of the mix per second."""

    solo: Mapping[Kind, float]
    capacity: float


async def warm_up(contestant: Contestant) -> None:
    """Send each size alone, then bursts of both, until all calls are certified and timed."""
    requests = endless(WARM_UP_SEED)
    for size in SIZES:
        alone = next(request for request in requests if request.kind.size == size)
        require(await send(contestant.client, alone.body, 0))
    for _ in range(BURSTS):
        sizes = [SIZES[i * len(SIZES) // BURST] for i in range(BURST)]
        drawn = [
            next(request for request in requests if request.kind.size == size) for size in sizes
        ]
        burst = [dataclasses.replace(request, offset=0) for request in drawn]
        for outcome in await offer(
            contestant.client, burst, contestant.check, drain=WARM_UP_SECONDS
        ):
            if not outcome.attempts:
                raise BenchmarkError(f"{contestant.name} did not answer in {WARM_UP_SECONDS} s")
            require(outcome.attempts[-1])
        missing = await unproven(contestant)
        if not missing:
            return
    progress(f"{contestant.name}: not certified after {BURSTS} bursts: {', '.join(missing)}")


async def measure_first(contestant: Contestant, scale: Scale, report: Report) -> Known:
    """Seconds of each kind alone, and the capacity, of the default contestant."""
    solo: dict[Kind, float] = {}
    rows: list[Row] = []
    for kind in KINDS:
        taken = []
        for request in itertools.islice(of_kind(kind, SOLO_SEED), scale.solo_repeats):
            attempt = await send(contestant.client, request.body, 0)
            contestant.check()
            require(attempt)
            taken.append(attempt.seconds)
        spread = Spread.of(taken)
        solo[kind] = spread.median
        rows.append({"kind": str(kind), "seconds alone": spread})
    rate = await saturate(
        contestant.client,
        endless(CAPACITY_SEED),
        contestant.check,
        solo=solo,
        clients=CLIENTS,
        ramp=scale.ramp,
        seconds=scale.capacity_seconds,
    )
    if not rate:
        raise BenchmarkError(
            f"no answer in {scale.capacity_seconds:g} s of the closed loop: measure for longer"
        )
    mean = sum(solo.values()) / len(solo)
    capacity: Row = {
        "requests per second": rate,
        "one at a time (1 / mean seconds alone)": 1 / mean,
        "ratio": rate * mean,
    }
    report.add(
        "first",
        Part(
            f"Each kind alone, `{contestant.name}`: the median of {scale.solo_repeats} (and "
            f"extremes).",
            (rows,),
        ),
        Part(
            f"Capacity for the mix, `{contestant.name}`: {CLIENTS} clients in a closed loop, over "
            f"{scale.capacity_seconds:g} s; answers are weighted with the time of their kind "
            "alone, relative to the mean.",
            ([capacity],),
        ),
    )
    return Known(solo, rate)


async def idle(contestant: Contestant) -> str:
    """Wait until the server has no requests in flight, such as those of aborted clients. Returns
    its metrics."""
    for _ in range(round(IDLE_SECONDS / CHECK_SECONDS)):
        contestant.check()
        response = await contestant.client.get("/metrics")
        exposition = response.raise_for_status().text
        if not in_flight(exposition):
            return exposition
        await asyncio.sleep(CHECK_SECONDS)
    raise BenchmarkError(
        f"{contestant.name} still has requests in flight {IDLE_SECONDS} s after the last answer"
    )


async def unproven(contestant: Contestant) -> list[str]:
    """The kinds of calls that are not certified, by module and sample."""
    response = await contestant.client.get("/v1/models")
    certificates = response.raise_for_status().json()["data"][0]["stepweave"]["certificates"]
    return [
        f"{kind['call']} {kind['sample']} {kind['state']}"
        for kind in certificates
        if kind["state"] != "certified"
    ]
