"""Starts the servers, measures, and writes the report."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from benchmarks.locust.arguments import list_of, positive
from benchmarks.serving import parts
from benchmarks.serving.client import BenchmarkError, connect
from benchmarks.serving.contestants import COMMON, CONTESTANTS, DEFAULT, Served, serve
from benchmarks.serving.first import CLIENTS, Contestant, Scale, measure_first, warm_up
from benchmarks.serving.report import Recorder, progress

PARTS = ("policies", "overload", "trace")
OVERLOADED = "overload"
OVERLOADED_SETTINGS = {**CONTESTANTS[DEFAULT], "STEPWEAVE_MAX_QUEUE": str(CLIENTS)}
ANSWER_SECONDS = 600  # after which a client gives up

T = TypeVar("T")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Policies and modes of the real server side by side, under the same open-loop "
        "arrivals.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--parts", type=_some_of(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    add(
        "--contestants",
        type=_some_of(CONTESTANTS),
        default=tuple(CONTESTANTS),
        help=f"some of {','.join(CONTESTANTS)}",
    )
    add("--loads", type=list_of(positive), default=(0.6, 0.8), help="of the measured capacity")
    add("--seeds", type=list_of(int), default=(1, 2, 3), help="of arrivals and mix")
    add("--seconds", type=positive, default=18.0, help="of arrivals in each run")
    add("--deadlines", type=_share, default=0.3, help="share of requests that have a deadline")
    add(
        "--quick",
        action="store_true",
        help="one seed, one load and short runs, to see that it works",
    )
    add("--json", type=Path, default=Path("build/serving.json"), help="the report")
    add("--trace", type=Path, default=Path("build/serving-trace.json"), help="the recorded trace")
    arguments = parser.parse_args(argv)
    if DEFAULT not in arguments.contestants:
        parser.error(f"--contestants lacks {DEFAULT}, which the others are compared with")
    return arguments


def scale_of(arguments: argparse.Namespace) -> Scale:
    if arguments.quick:
        return Scale(
            (arguments.loads[-1],),
            (arguments.seeds[0],),
            10,
            arguments.deadlines,
            overload_seconds=24,
            trace_seconds=10,
            ramp=5,
            capacity_seconds=15,
            solo_repeats=2,
            drain=30,
        )
    return Scale(
        tuple(arguments.loads), tuple(arguments.seeds), arguments.seconds, arguments.deadlines
    )


async def measure(
    servers: dict[str, Served], arguments: argparse.Namespace, report: Recorder
) -> None:
    scale = scale_of(arguments)
    async with contextlib.AsyncExitStack() as stack:
        everyone = {
            name: Contestant(
                name,
                await stack.enter_async_context(connect(server.url, ANSWER_SECONDS)),
                server.check,
            )
            for name, server in servers.items()
        }
        for contestant in everyone.values():
            await warm_up(contestant)
        # the default is first
        contestants = [everyone[name] for name in CONTESTANTS if name in everyone]
        default = everyone[DEFAULT]
        progress("measuring the capacity")
        known = await measure_first(default, scale, report)
        if "policies" in arguments.parts:
            await parts.policies(contestants, scale, known, report)
        if "overload" in arguments.parts:
            await parts.overload(everyone[OVERLOADED], scale, known, report)
        if "trace" in arguments.parts:
            await parts.trace(default, scale, known, report, arguments.trace)


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end with this process
    settings = {
        name: CONTESTANTS[name] for name in arguments.contestants if "policies" in arguments.parts
    }
    settings[DEFAULT] = CONTESTANTS[DEFAULT]
    if "overload" in arguments.parts:
        settings[OVERLOADED] = OVERLOADED_SETTINGS
    began, cpu = time.monotonic(), time.process_time()
    shown = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    report = Recorder(
        arguments.json,
        **shown,
        scale=asdict(scale_of(arguments)),
        settings=settings,
        common_settings=COMMON,
    )
    try:
        with contextlib.ExitStack() as stack:
            servers = {}
            # one after the other: what a server times as it warms up must not be another's start
            for name, changes in settings.items():
                progress(f"starting {name}")
                servers[name] = stack.enter_context(
                    serve(name, changes, arguments.json.with_suffix(".logs"))
                )
            asyncio.run(measure(servers, arguments, report))
    except BenchmarkError as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.serving: interrupted", file=sys.stderr)
        return 130
    report.close()
    seconds = time.monotonic() - began
    progress(
        f"{seconds / 60:.1f} minutes; the client took {(time.process_time() - cpu) / seconds:.1%} "
        f"of a core"
    )
    return 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def _some_of(names: Sequence[str] | dict[str, dict[str, str]]) -> Callable[[str], tuple[str, ...]]:
    def some(text: str) -> tuple[str, ...]:
        wanted = tuple(part.strip() for part in text.split(","))
        if unknown := set(wanted) - set(names):
            raise argparse.ArgumentTypeError(
                f"has {', '.join(sorted(unknown))}; there are {', '.join(names)}"
            )
        return wanted

    return some


if __name__ == "__main__":
    sys.exit(main())
