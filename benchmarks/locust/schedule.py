"""Requests and their times, drawn before the test from a seeded generator: the same arguments give
the same requests."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from tools.shapes.scenes import COLOURS, SHAPES, SIZES

MAX_SEED = 2**31 - 1  # of a request
REQUESTS = 150  # expected in a stage by default: hardly ever fewer than the 100 that p95 takes
MIN_SECONDS = 30  # of a stage by default


class Kind(NamedTuple):
    """Size and steps, which determine how long a request takes."""

    size: str
    steps: int

    def __str__(self) -> str:
        return f"{self.size}, {self.steps} steps"


@dataclass(frozen=True)
class Arrival:
    """A request: `offset` in seconds from the start of its stage, and the body to post."""

    offset: float
    body: dict[str, str | int]

    @property
    def kind(self) -> Kind:
        return Kind(str(self.body["size"]), int(self.body["num_inference_steps"]))


@dataclass(frozen=True)
class Stage:
    """The arrivals of `seconds` at `rate` requests per second."""

    rate: float
    seconds: float
    arrivals: tuple[Arrival, ...]


def schedule(
    rates: Sequence[float],
    seconds: float | None,
    seed: int,
    sizes: Sequence[str],
    steps: Sequence[int],
) -> list[Stage]:
    """One stage per rate, of `duration(rate, seconds)`; sizes and steps are chosen at random.
    Adding a rate at the end does not change the stages before it."""
    rng = random.Random(seed)
    durations = [duration(rate, seconds) for rate in rates]
    return [
        Stage(rate, length, tuple(_arrivals(rng, rate, length, sizes, steps)))
        for rate, length in zip(rates, durations, strict=True)
    ]


def duration(rate: float, seconds: float | None) -> float:
    """Seconds of a stage: if None, long enough for percentiles."""
    return max(float(MIN_SECONDS), REQUESTS / rate) if seconds is None else seconds


def alone(
    seed: int, sizes: Sequence[str], steps: Sequence[int], rounds: int
) -> list[list[Arrival]]:
    """Requests to send one at a time: in each round one of each kind of the mix."""
    rng = random.Random(f"alone {seed}")
    kinds = dict.fromkeys(itertools.product(sizes, steps))
    return [
        [Arrival(0.0, _body(rng, [size], [count])) for size, count in kinds] for _ in range(rounds)
    ]


def digest(stages: Sequence[Stage]) -> str:
    """SHA-256 of a schedule, to compare reports: equal digests mean the same requests at the same
    offsets."""
    arrivals = [[asdict(arrival) for arrival in stage.arrivals] for stage in stages]
    return hashlib.sha256(json.dumps(arrivals).encode()).hexdigest()


def _arrivals(
    rng: random.Random, rate: float, seconds: float, sizes: Sequence[str], steps: Sequence[int]
) -> list[Arrival]:
    """A Poisson process: independent exponential gaps, as of many independent clients."""
    arrivals: list[Arrival] = []
    offset = rng.expovariate(rate)
    while offset < seconds:
        arrivals.append(Arrival(offset, _body(rng, sizes, steps)))
        offset += rng.expovariate(rate)
    return arrivals


def _body(rng: random.Random, sizes: Sequence[str], steps: Sequence[int]) -> dict[str, str | int]:
    return {
        "prompt": _prompt(rng),
        "size": rng.choice(sizes),
        "num_inference_steps": rng.choice(steps),
        "seed": rng.randint(0, MAX_SEED),
    }


def _prompt(rng: random.Random) -> str:
    """A prompt of the embedded model's grammar."""
    colour, background = rng.sample(list(COLOURS), 2)
    article = "an" if background == "orange" else "a"
    return (
        f"a {rng.choice(SIZES)} {colour} {rng.choice(SHAPES)} on {article} {background} background"
    )
