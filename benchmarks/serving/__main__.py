"""Starts the servers, measures, and writes the report."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from benchmarks.locust.arguments import list_of, positive, some_of
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
        description="Compare policies and modes of the real server under the same open-loop "
        "arrivals.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--parts",
        type=some_of(PARTS),
        default=PARTS,
        help=f"comma-separated parts to run, of {','.join(PARTS)}",
    )
    add(
        "--contestants",
        type=some_of(CONTESTANTS),
        default=tuple(CONTESTANTS),
        help=f"comma-separated contestants, of {','.join(CONTESTANTS)}",
    )
    add(
        "--loads",
        type=list_of(positive),
        default=(0.6, 0.8),
        help="arrival rates as shares of the measured capacity, comma-separated",
    )
    add("--seeds", type=list_of(int), default=(1, 2, 3), help="seeds of arrivals and mix")
    add("--seconds", type=positive, default=18.0, help="duration of arrivals in each run")
    add("--deadlines", type=_share, default=0.3, help="share of requests with a deadline")
    add(
        "--quick",
        action="store_true",
        help="a smoke test: one seed, one load and short runs",
    )
    add("--json", type=Path, default=Path("build/serving.json"), help="report file")
    add(
        "--trace",
        type=Path,
        default=Path("build/serving-trace.json"),
        help="file for the recorded trace",
    )
    arguments = parser.parse_args(argv)
    if DEFAULT not in arguments.contestants:
        parser.error(f"--contestants must include {DEFAULT}, which the others are compared with")
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
        first = await measure_first(default, scale, report)
        if "policies" in arguments.parts:
            await parts.policies(contestants, scale, first, report)
        if "overload" in arguments.parts:
            await parts.overload(everyone[OVERLOADED], scale, first, report)
        if "trace" in arguments.parts:
            await parts.trace(default, scale, first, report, arguments.trace)


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped
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
            # one after the other: starts of other servers would distort a warm-up's measurements
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
        f"{seconds / 60:.1f} minutes; the client used {(time.process_time() - cpu) / seconds:.1%} "
        f"of a core"
    )
    return 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
