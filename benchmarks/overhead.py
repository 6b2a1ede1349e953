"""The time between forwards: the pipeline's own Python, and the engine's."""

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
    """Times a module's forwards. Create it before an engine hooks the module, so that the hook is
    not timed.

    It is a Python module, which the engine does not inspect: it would take a list in a closure for
    state of the forward.
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
    """Measurements of steps with the same number of jobs."""

    def __init__(self) -> None:
        self.forwards: list[float] = []
        self.gaps: list[float] = []
        self.cpu_gaps: list[float] = []

    def add(self, forwards: list[Forward], rows: int) -> None:
        """Add the forwards of `rows` rows, and the gaps between consecutive ones."""
        self.forwards += [
            forward.ended - forward.began for forward in forwards if forward.rows == rows
        ]
        for forward, following in itertools.pairwise(forwards):
            if forward.rows == following.rows == rows:
                self.gaps.append((following.began - forward.ended) * MICROSECONDS)
                self.cpu_gaps.append((following.cpu_began - forward.cpu_ended) * MICROSECONDS)


def overhead(shapes: Shapes, rounds: int) -> Part:
    bare_pipeline, pipeline = twin(shapes.pipeline), twin(shapes.pipeline)
    bare_watch, watch = Watch(bare_pipeline.transformer), Watch(pipeline.transformer)
    bare, samples = _Samples(), {jobs: _Samples() for jobs in JOBS}
    with StepEngine(pipeline, max_rows=2 * max(JOBS), knee=False) as engine:
        for again in range(2):
            run(engine, shapes.calls(max(JOBS) * again, max(JOBS), steps=4))
        for number in range(rounds):
            first = FRESH + max(JOBS) * number
            bare_watch.forwards.clear()
            bare_pipeline(**shapes.call(first, STEPS))
            bare.add(bare_watch.forwards, 2)
            for jobs, sample in samples.items():
                calls = shapes.calls(first, jobs, STEPS)
                watch.forwards.clear()
                run(engine, calls)
                sample.add(watch.forwards, 2 * jobs)
    return Part(
        "Between a forward of the transformer and the next, in microseconds, while all jobs run: "
        "the pipeline's own Python (guidance, scheduler, progress), once for each job, and the "
        "engine's. The pipeline's share is that of bare calls times the number of jobs; the rest "
        "is the engine's.",
        (
            [
                _row(1, bare, bare, "bare"),
                *(_row(jobs, sample, bare, "step") for jobs, sample in samples.items()),
            ],
        ),
    )


def _row(jobs: int, sample: _Samples, bare: _Samples, name: str) -> Row:
    gap, cpu = Spread.of(sample.gaps), Spread.of(sample.cpu_gaps)
    own, own_cpu = jobs * Spread.of(bare.gaps).median, jobs * Spread.of(bare.cpu_gaps).median
    forward = Spread.of([1000 * seconds for seconds in sample.forwards])
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
