"""Requests and their times: the same arguments give the same requests for every contestant."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.locust.schedule import Arrival, Kind, schedule

# of the embedded model: its native size, and one whose steps take about twice as long
SIZES = ("64x64", "128x128")
STEPS = (4, 12, 30)
DEADLINE = 4  # multiple of a request's seconds alone
COPIES = 4  # of each kind in a deck
IMAGE = b"/9j/"  # the first bytes of every JPEG file, in base64
ENDLESS_RATE = 1000


KINDS = tuple(Kind(size, steps) for size in SIZES for steps in STEPS)


@dataclass(frozen=True)
class Request:
    """One request: `offset` in seconds from the start of its run, `deadline` in seconds from its
    arrival."""

    offset: float
    kind: Kind
    deadline: float | None
    body: bytes


def poisson(
    rate: float, seconds: float, seed: int, solo: Mapping[Kind, float], share: float
) -> list[Request]:
    """Requests that arrive at `rate` per second; a `share` of them has a deadline.

    Kinds are dealt from shuffled decks with equal numbers of each kind: with independent draws, the
    work of a short run could differ much from its rate.
    """
    (stage,) = schedule([rate], seconds, seed, SIZES, STEPS)
    rng = random.Random(f"deadlines {seed}")
    return [
        _request(arrival, kind, DEADLINE * solo[kind] if rng.random() < share else None)
        for arrival, kind in zip(stage.arrivals, _deal(seed), strict=False)
    ]


def endless(seed: int) -> Iterator[Request]:
    """Requests of the mix without deadlines, for the closed loop."""
    for number in itertools.count(seed):
        yield from poisson(ENDLESS_RATE, 1, number, {}, 0)


def of_kind(kind: Kind, seed: int) -> Iterator[Request]:
    return (request for request in endless(seed) if request.kind == kind)


def _deal(seed: int) -> Iterator[Kind]:
    rng = random.Random(f"kinds {seed}")
    while True:
        deck = list(KINDS) * COPIES
        rng.shuffle(deck)
        yield from deck


def _request(arrival: Arrival, kind: Kind, deadline: float | None) -> Request:
    body = {
        **arrival.body,
        "size": kind.size,
        "num_inference_steps": kind.steps,
        "output_format": "jpeg",  # small: the client shares the server's cores
    }
    if deadline is not None:
        milliseconds = math.ceil(1000 * deadline)
        body["deadline_ms"] = milliseconds
        deadline = milliseconds / 1000
    return Request(arrival.offset, kind, deadline, json.dumps(body).encode())
