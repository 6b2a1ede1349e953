"""The scenarios, and their requests: the same seed gives the same requests for every contestant."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.locust.schedule import schedule
from benchmarks.serving.mix import SIZES, Request

STEPS = (6, 20, 50)
SHORT = STEPS[0]  # the steps of the requests whose latency is reported apart
GUIDANCE = (2.0, 1.0)  # with and without
COPIES = 2  # of each kind in a deck
OTHERS, OURS = "others", "ours"
SEED_STRIDE = 1000  # between scenarios, so that no two runs send the same bodies
WARM_UP_SEED = 900_000
FAST = 1000.0  # requests per second, of schedules whose offsets are not used


class Kind(NamedTuple):
    """What determines how long a request takes, and which others it may share a call with."""

    size: str
    steps: int
    guidance: float


EQUAL = (Kind(SIZES[0], 20, 2.0),)
MIXED = tuple(Kind(*kind) for kind in itertools.product(SIZES, STEPS, GUIDANCE))
MIXES = {"equal": EQUAL, "mixed": MIXED}


@dataclass(frozen=True)
class Scenario:
    """A mix of requests, and how they arrive: from clients that wait for answers, or at a share of
    a capacity."""

    mix: str
    capacity_of: str | None = None  # whose capacity sets the rate; None: a closed loop

    @property
    def name(self) -> str:
        return f"{self.mix}-{'closed' if self.capacity_of is None else f'open-{self.capacity_of}'}"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return MIXES[self.mix]


# the most important first
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("equal"),
        Scenario("mixed"),
        Scenario("mixed", OTHERS),
        Scenario("mixed", OURS),
        Scenario("equal", OTHERS),
        Scenario("equal", OURS),
    )
}


def closed(scenario: Scenario, seed: int, count: int) -> list[Request]:
    """The first `count` requests of a scenario, for a closed loop. Their offsets have no
    meaning."""
    return _some(scenario.kinds, _seed(scenario, seed), count)


def poisson(scenario: Scenario, seed: int, rate: float, seconds: float) -> list[Request]:
    """Requests that arrive at `rate` per second. Their bodies do not depend on the rate."""
    return list(_requests(scenario.kinds, _seed(scenario, seed), rate, seconds))


def warm_up(number: int, copies: int) -> list[Request]:
    """Requests with few steps, `copies` of each size with and without guidance, at the same
    time."""
    kinds = [kind for kind in MIXED if kind.steps == SHORT]
    drawn = _some(kinds, WARM_UP_SEED + number, copies * len(kinds))
    return [dataclasses.replace(request, offset=0.0) for request in drawn]


def _seed(scenario: Scenario, seed: int) -> int:
    return seed + SEED_STRIDE * list(SCENARIOS).index(scenario.name)


def _some(kinds: Sequence[Kind], seed: int, count: int) -> list[Request]:
    seconds = 1 + 2 * count / FAST  # more than enough arrivals
    return list(itertools.islice(_requests(kinds, seed, FAST, seconds), count))


def _requests(kinds: Sequence[Kind], seed: int, rate: float, seconds: float) -> Iterator[Request]:
    """Kinds are dealt from shuffled decks: with independent draws, the work of a short run could
    differ much between seeds."""
    (stage,) = schedule([rate], seconds, seed, SIZES, STEPS)
    for arrival, kind in zip(stage.arrivals, _deal(kinds, seed), strict=False):
        body = {
            "prompt": arrival.body["prompt"],
            "seed": arrival.body["seed"],
            "size": kind.size,
            "num_inference_steps": kind.steps,
            "guidance_scale": kind.guidance,
            "response_format": "b64_json",
            "output_format": "png",
        }
        yield Request(arrival.offset, kind, None, json.dumps(body).encode())  # type: ignore[arg-type]


def _deal(kinds: Sequence[Kind], seed: int) -> Iterator[Kind]:
    rng = random.Random(f"kinds {seed}")
    while True:
        deck = list(kinds) * COPIES
        rng.shuffle(deck)
        yield from deck
