"""The time of a step that is not the forward's."""

from __future__ import annotations

import functools
import itertools
import time
import types
from typing import Any, NamedTuple

from torch import nn

from benchmarks.calls import FRESH, run, twin
from benchmarks.measure import Part, Row, Spread
from benchmarks.shapes import Shapes
from stepweave import StepEngine

JOBS = (1, 2, 4, 8, 16)
STEPS = 30
MICROSECONDS = 1e6


class Forward(NamedTuple):
    """One forward: its rows, and seconds of the clock and of the calling thread's CPU time."""

    rows: int
    began: float
    ended: float
    cpu_began: float
    cpu_ended: float


class Watch(types.ModuleType):
    """Times a module's forwards. Put it on before an engine puts its hook on, which is then outside
    of what is timed.

    The engine does not look into Python's modules; a list in a closure it would take for state that
    the forward keeps.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__("watch")
        self.forwards: list[Forward] = []
        forward = module.forward

        @functools.wraps(forward)  # the engine reads the signature
        def timed(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.thread_time(), time.perf_counter()
            output = forward(*args, **kwargs)
            rows = len(kwargs["hidden_states"])
            self.forwards.append(Forward(rows, wall, time.perf_counter(), cpu, time.thread_time()))
            return output

        module.forward = timed


class _Samples:
    """Of the steps at one number of jobs."""

    def __init__(self) -> None:
        self.forwards: list[float] = []
        self.gaps: list[float] = []
        self.cpu_gaps: list[float] = []

    def add(self, forwards: list[Forward], rows: int) -> None:
        """Take the steps of `rows` rows, and what lies between two that follow each other."""
        self.forwards += [one.ended - one.began for one in forwards if one.rows == rows]
        for one, other in itertools.pairwise(forwards):
            if one.rows == other.rows == rows:
                self.gaps.append((other.began - one.ended) * MICROSECONDS)
                self.cpu_gaps.append((other.cpu_began - one.cpu_ended) * MICROSECONDS)


def overhead(shapes: Shapes, rounds: int) -> Part:
    bare_pipeline, pipeline = twin(shapes.pipeline), twin(shapes.pipeline)
    bare_watch, watch = Watch(bare_pipeline.transformer), Watch(pipeline.transformer)
    bare, samples = _Samples(), {jobs: _Samples() for jobs in JOBS}
    with StepEngine(pipeline, max_rows=2 * max(JOBS)) as engine:
        for again in range(2):
            run(engine, shapes.calls(max(JOBS) * again, max(JOBS), steps=4))
        for number in range(rounds):
            first = FRESH + max(JOBS) * number
            bare_watch.forwards.clear()
            bare_pipeline(**shapes.call(first, STEPS))
            bare.add(bare_watch.forwards, 2)
            for jobs, found in samples.items():
                calls = shapes.calls(first, jobs, STEPS)
                watch.forwards.clear()
                run(engine, calls)
                found.add(watch.forwards, 2 * jobs)
    return Part(
        "Between a forward of the transformer and the next, in microseconds, while all jobs run: "
        "the pipeline's own Python (guidance, scheduler, progress), once for each job, and the "
        "engine's. The pipeline's own is measured on bare calls and taken once for each job; what "
        "is beyond it is the engine's.",
        (
            [
                _row(1, bare, bare, "bare"),
                *(_row(jobs, found, bare, "step") for jobs, found in samples.items()),
            ],
        ),
    )


def _row(jobs: int, found: _Samples, bare: _Samples, name: str) -> Row:
    gap, cpu = Spread.of(found.gaps), Spread.of(found.cpu_gaps)
    own, own_cpu = jobs * Spread.of(bare.gaps).median, jobs * Spread.of(bare.cpu_gaps).median
    forward = Spread.of([1000 * one for one in found.forwards])
    return {
        "": name,
        "jobs": jobs,
        "forward ms": forward,
        "all but the forward": gap,
        "beyond the pipeline's own": round(gap.median - own, 1),
        "a job": round((gap.median - own) / jobs, 1),
        "of the step": f"{(gap.median - own) / (gap.median + 1000 * forward.median):.2%}",
        "all but the forward, CPU": cpu,
        "beyond the pipeline's own, CPU": round(cpu.median - own_cpu, 1),
    }
