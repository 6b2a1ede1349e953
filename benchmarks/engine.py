"""Overhead and gains of the engine, with the embedded model on this machine's CPU: `python -m
benchmarks.engine`.

The figures are ratios of contestants that take turns in one run, with their spread, since absolute
times depend on the machine. `wanted` is the project's target for the median; the exit status is 0
even if it is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.calls import FRESH, SECONDS, run, twin
from benchmarks.measure import Part, Report, Row, Timing, alternate, clock, ratio, seconds
from benchmarks.overhead import overhead
from benchmarks.shapes import Shapes
from stepweave import StepEngine
from stepweave.config import Settings
from stepweave.engine import Mode
from stepweave.loading.device import set_cpu_threads

BATCH = 16  # jobs, of two rows each because of guidance
THREADS = 4  # of mode `threads`
LONG_JOBS, SHORT_STEPS = 8, 4
MODES: tuple[Mode, ...] = ("off", "threads", "request", "step")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int
    alone_rounds: int  # more, since they are short
    join_rounds: int
    batch_steps: int
    long_steps: int
    jobs: tuple[int, ...]  # numbers of jobs after which memory is read

    @classmethod
    def full(cls, rounds: int, steps: int) -> Scale:
        return cls(rounds, 3 * rounds, max(3, rounds // 2), steps, 60, (200, 650, 1100, 1550, 2000))

    @classmethod
    def quick(cls) -> Scale:
        return cls(2, 3, 1, 5, 12, (40, 120))


@contextlib.contextmanager
def engines(shapes: Shapes, warm_up: int) -> Iterator[dict[str, StepEngine]]:
    """An engine of each mode, certified with `warm_up` concurrent jobs.

    Their encoder caches are off: with guidance every call of this model also encodes the empty
    prompt, and a bare pipeline does so each time.
    """
    with contextlib.ExitStack() as stack:
        opened: dict[str, StepEngine] = {}
        for mode in MODES:
            pipeline = twin(shapes.pipeline) if mode == "step" else shapes.pipeline
            engine = StepEngine(
                pipeline, mode=mode, max_rows=2 * BATCH, threads=THREADS, cache_bytes=0
            )
            opened[mode] = stack.enter_context(engine)
        for engine in opened.values():
            for again in range(2):
                run(engine, shapes.calls(warm_up * again, warm_up, steps=4))
        yield opened


def alone(shapes: Shapes, scale: Scale) -> Part:
    with engines(shapes, warm_up=2) as opened:

        def bare(number: int) -> Timing:
            call = shapes.call(FRESH + number)
            return clock(lambda: shapes.pipeline(**call))

        def through(engine: StepEngine, number: int) -> Timing:
            calls = shapes.calls(FRESH + number, 1)
            return clock(lambda: run(engine, calls))

        contestants: dict[str, Callable[[int], Timing]] = {
            "bare pipeline": bare,
            "step": functools.partial(through, opened["step"]),
        }
        bare(0)
        timings = alternate(contestants, scale.alone_rounds)
    return Part(
        "One job alone, with a new prompt and seed each time, without encoder cache.",
        (
            seconds(timings),
            [
                ratio(
                    "time: step / bare pipeline",
                    timings["step"],
                    timings["bare pipeline"],
                    "<= 1.03",
                )
            ],
        ),
    )


def batch16(shapes: Shapes, scale: Scale) -> Part:
    with engines(shapes, warm_up=BATCH) as opened:

        def bare(number: int) -> Timing:
            call = shapes.batch(FRESH + BATCH * number, BATCH, scale.batch_steps)
            return clock(lambda: shapes.pipeline(**call))

        def through(engine: StepEngine, number: int) -> Timing:
            calls = shapes.calls(FRESH + BATCH * number, BATCH, scale.batch_steps)
            return clock(lambda: run(engine, calls))

        contestants: dict[str, Callable[[int], Timing]] = {"bare batch": bare}
        contestants |= {name: functools.partial(through, engine) for name, engine in opened.items()}
        bare(0)
        timings = alternate(contestants, scale.rounds)
    step = timings["step"]
    return Part(
        f"{BATCH} jobs of {scale.batch_steps} steps that differ in prompt and seed, submitted at "
        "once, against one call of the bare pipeline with all prompts and generators as a batch "
        "(requests do not arrive in batches).",
        (
            seconds(timings),
            [
                ratio("time: step / bare batch", step, timings["bare batch"], "<= 1.05"),
                ratio("throughput: step / off", timings["off"], step, ">= 1.6"),
                ratio("throughput: step / threads", timings["threads"], step, ">= 2.5"),
                ratio("throughput: step / request", timings["request"], step),
            ],
        ),
    )


def join(shapes: Shapes, scale: Scale) -> Part:
    with engines(shapes, warm_up=LONG_JOBS + 1) as opened:
        contestants: dict[str, Callable[[int], Timing]] = {
            name: functools.partial(_latency_of_a_short_job, shapes, engine, scale.long_steps)
            for name, engine in opened.items()
        }
        timings = alternate(contestants, scale.join_rounds)
    return Part(
        f"The latency of a job of {SHORT_STEPS} steps that arrives among {LONG_JOBS} of "
        f"{scale.long_steps}. CPU is what the process spends meanwhile. In `request` the first "
        "long job runs alone and the others in a second call.",
        (
            seconds(timings),
            [
                ratio(f"latency: step / {name}", timings["step"], timings[name])
                for name in ("off", "threads", "request")
            ],
        ),
    )


def _latency_of_a_short_job(
    shapes: Shapes, engine: StepEngine, long_steps: int, number: int
) -> Timing:
    first = FRESH + (LONG_JOBS + 1) * number
    long = [engine.submit(**call) for call in shapes.calls(first, LONG_JOBS, long_steps)]
    at_once = {"off": 1, "threads": THREADS, "request": 1, "step": LONG_JOBS}[engine.mode]
    deadline = time.monotonic() + SECONDS
    while sum(job.progress.step >= 2 for job in long) < at_once and time.monotonic() < deadline:
        time.sleep(0.001)
    call = shapes.call(first + LONG_JOBS, SHORT_STEPS)
    timing = clock(lambda: run(engine, [call]))
    for job in long:
        job.cancel()
    for job in long:
        job.exception(SECONDS)
    return timing


def memory(shapes: Shapes, scale: Scale) -> Part:
    """Runs first, since memory freed by other parts would hide growth."""
    process = psutil.Process()
    rows: list[Row] = []
    first = 0.0
    with StepEngine(shapes.pipeline, cache_bytes=4 * MEBIBYTE) as engine:
        done = 0
        for target in scale.jobs:
            while done < target:
                count = min(BATCH, target - done)
                run(engine, shapes.calls(done, count, steps=2))
                done += count
            gc.collect()
            resident = process.memory_info().rss / MEBIBYTE
            first = first or resident
            rows.append(
                {
                    "jobs": done,
                    "resident MiB": round(resident, 1),
                    "of the first": f"{resident / first:.1%}",
                }
            )
        cache = engine.stats().cache_bytes / MEBIBYTE
    return Part(
        f"Resident memory by number of finished jobs of 2 steps in mode `step`, {BATCH} at a time, "
        "with different prompts and seeds. The encoder cache is limited to 4 MiB and full before "
        f"the first figure ({cache:.1f} MiB at the end). Wanted: no growth.",
        (rows,),
    )


PARTS: dict[str, Callable[[Shapes, Scale], Part]] = {
    "memory": memory,
    "alone": alone,
    "batch16": batch16,
    "overhead": lambda shapes, scale: overhead(shapes, scale.rounds),
    "join": join,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="comma-separated parts to run (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds of each part (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of one minute")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/engine.json"),
        help="report file (default: %(default)s)",
    )
    arguments = parser.parse_args()
    wanted = set(arguments.parts.split(","))
    if unknown := wanted - PARTS.keys():
        parser.error(f"--parts has {', '.join(sorted(unknown))}; allowed are {', '.join(PARTS)}")
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; it must be at least 1")
    set_cpu_threads(Settings())
    torch.set_grad_enabled(False)
    shapes = Shapes()
    scale = Scale.quick() if arguments.quick else Scale.full(arguments.repeats, shapes.steps)
    report = Report(arguments.json, repeats=arguments.repeats, quick=arguments.quick)
    for name, part in PARTS.items():
        if name in wanted:
            report.add(name, part(shapes, scale))
    report.close()


if __name__ == "__main__":
    main()
