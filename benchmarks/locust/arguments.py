"""Parses and checks the command line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from benchmarks.locust.report import BEYOND, PERCENTILES, samples_needed
from benchmarks.locust.schedule import MIN_SECONDS, REQUESTS, duration

MAX_ARRIVALS = 100_000  # expected number of a whole test

T = TypeVar("T")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.locust",
        description="Open-loop capacity test: first each kind of request (size and steps) is sent "
        "alone to the idle server, then requests are sent at each rate in turn, whatever the "
        "server answers.",
        epilog="A percentile is given if at least "
        f"{BEYOND} samples are expected beyond it: "
        + ", ".join(f"p{p} from {samples_needed(p)}" for p in PERCENTILES)
        + " samples. A rate is sustained if every request got an image, p95 of latency / time "
        "alone is under the target, and the server kept up: the last answer came no longer after "
        "the end of the stage than the target allows the slowest kind.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", type=_url, default="http://localhost:3000", help="server's base URL")
    add(
        "--rates",
        type=list_of(positive),
        default=[0.5, 1.0, 2.0, 4.0],
        help="requests per second of each stage, comma-separated",
    )
    add(
        "--seconds",
        type=positive,
        # "%(default).0s" prints nothing: the formatter would add "(default: None)"
        help=f"duration of a stage (default: long enough for {REQUESTS} requests at its rate, and "
        f"at least {MIN_SECONDS})%(default).0s",
    )
    add("--seed", type=whole(0), default=1, help="seed of arrivals and mix")
    add(
        "--sizes",
        type=list_of(_size),
        default=["64x64", "128x128"],
        help="sizes of images, comma-separated, chosen at random",
    )
    add(
        "--steps",
        type=list_of(whole(1)),
        default=[4, 12, 20, 30],
        help="denoising steps, comma-separated, chosen at random",
    )
    add(
        "--target",
        type=positive,
        default=5.0,
        help="latency that a good answer must meet, as a multiple of the time that its kind takes "
        "alone",
    )
    add(
        "--alone",
        type=whole(1),
        default=3,
        help="how often each kind is sent alone, after once for warm-up; the median counts",
    )
    add(
        "--max-in-flight",
        type=whole(1),
        default=1000,
        help="limit of open requests; further arrivals are dropped and counted",
    )
    add(
        "--drain",
        type=positive,
        default=60.0,
        help="seconds to wait for the last answers of a stage; at least as long as the target "
        "allows the slowest kind",
    )
    add(
        "--out",
        type=Path,
        default=Path("build/locust"),
        help="directory for report.html, report.json and report.png",
    )
    arguments = parser.parse_args(argv)
    expected = sum(rate * duration(rate, arguments.seconds) for rate in arguments.rates)
    if expected > MAX_ARRIVALS:
        parser.error(
            f"--rates and --seconds make {expected:g} requests; the limit is {MAX_ARRIVALS}"
        )
    return arguments


def _url(text: str) -> str:
    try:
        url = urlsplit(text)
        _ = url.port  # raises if it is invalid
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a base URL such as http://localhost:3000"
        )
    return text.rstrip("/")


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64x64")
    return text


def some_of(names: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Parses comma-separated names, each of them one of `names`."""

    def some(text: str) -> tuple[str, ...]:
        wanted = tuple(part.strip() for part in text.split(","))
        if unknown := set(wanted) - set(names):
            raise argparse.ArgumentTypeError(
                f"has {', '.join(sorted(unknown))}; allowed are {', '.join(names)}"
            )
        return wanted

    return some


def list_of(item: Callable[[str], T]) -> Callable[[str], list[T]]:
    def comma_separated(text: str) -> list[T]:
        return [item(part.strip()) for part in text.split(",")]

    return comma_separated
