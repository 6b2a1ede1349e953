"""Stable Diffusion 1.5 and XL at 512x512 on a GPU, by mode: `python -m benchmarks.gpu`; minutes.

The models have random weights in bfloat16, so nothing is downloaded. Without a GPU it runs tiny
models, as a smoke test. Writes docs/benchmarks/<device>.json, or build/gpu.json without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from benchmarks.calls import FRESH, Call, prompt, run, twin
from benchmarks.measure import Part, Report, Row, Spread, Timing, alternate, clock, ratio
from stepweave import StepEngine
from stepweave.engine import Mode

MODES: tuple[Mode, ...] = ("off", "threads", "request", "step")
JOBS = 8
THREADS = 4  # of mode `threads`
ROWS = (1, 2, 4, 8, 16)
GIBIBYTE = 2**30


class Subject:
    """A model and how to call it; each call's number gives a different prompt and seed."""

    def __init__(self, name: str, build: Callable[[], Any], steps: int, side: int) -> None:
        self.name = name
        self.build = build
        self.steps = steps
        self.side = side

    def calls(self, first: int, count: int = JOBS, steps: int | None = None) -> list[Call]:
        return [
            {
                "prompt": prompt(number),
                "generator": torch.Generator().manual_seed(number),
                "num_inference_steps": steps or self.steps,
                "guidance_scale": 5.0,
                "height": self.side,
                "width": self.side,
            }
            for number in range(first, first + count)
        ]


def subjects(device: torch.device) -> list[Subject]:
    if device.type == "cuda":
        from benchmarks import stable_diffusion as full

        return [
            Subject(
                "Stable Diffusion 1.5",
                lambda: full.stable_diffusion_1_5(device, torch.bfloat16),
                20,
                512,
            ),
            Subject(
                "Stable Diffusion XL",
                lambda: full.stable_diffusion_xl(device, torch.bfloat16),
                20,
                512,
            ),
        ]
    from tests.support.tiny import FAMILIES, SIDE

    def tiny(name: str) -> Any:
        pipeline = FAMILIES[name].build().to(torch.bfloat16)
        pipeline.vae.register_to_config(force_upcast=False)  # as in the full size
        return pipeline

    names = ("stable_diffusion", "stable_diffusion_xl")
    return [Subject(f"tiny {name}", functools.partial(tiny, name), 6, SIDE) for name in names]


class Contestant:
    """An engine of one mode that runs the subject's jobs, all submitted at once."""

    def __init__(self, subject: Subject, engine: StepEngine) -> None:
        self._subject = subject
        self.engine = engine
        self.latencies: list[float] = []
        self.peak = 0  # bytes

    def warm_up(self) -> None:
        """Run jobs, so that calls are certified and the device's first calls are done."""
        for again in range(2):
            run(self.engine, self._subject.calls(JOBS * again, steps=4))

    def __call__(self, number: int) -> Timing:
        calls = self._subject.calls(FRESH + JOBS * number)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        jobs: list[Any] = []
        timing = clock(lambda: jobs.extend(run(self.engine, calls)))
        self.latencies += [job.finished - job.accepted for job in jobs]
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return timing


def modes(subject: Subject, pipeline: Any, rounds: int) -> Part:
    with contextlib.ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for mode in MODES:
            copy = twin(pipeline) if mode == "step" else pipeline
            contestants[mode] = Contestant(
                subject, stack.enter_context(StepEngine(copy, mode=mode, threads=THREADS))
            )
        for contestant in contestants.values():
            contestant.warm_up()
        timings = alternate(contestants, rounds)
        step = contestants["step"].engine.stats()
    figures: list[Row] = []
    for name, contestant in contestants.items():
        p50, p95 = np.percentile(contestant.latencies, (50, 95)).tolist()
        figures.append(
            {
                "mode": name,
                "images a second": Spread.of([JOBS / timing.wall for timing in timings[name]]),
                "latency p50 s": p50,
                "latency p95 s": p95,
                "CPU s": Spread.of([timing.cpu for timing in timings[name]]),
                "peak GiB": contestant.peak / GIBIBYTE if contestant.peak else None,
            }
        )
    forwards: list[Row] = [
        {
            "shared in step": name,
            "forwards": sum(counts.by_rows.values()),
            "calls that shared": f"{counts.merged_share:.1%}",
        }
        for name, counts in step.forwards.items()
    ]
    ratios = [
        ratio(f"throughput: step / {mode}", timings[mode], timings["step"])
        for mode in ("off", "threads", "request")
    ]
    return Part(
        f"{JOBS} jobs of {subject.steps} steps with guidance, {subject.side}x{subject.side}, that "
        f"differ in prompt and seed, submitted at once; `threads` has {THREADS}, `step` its "
        f"encoder cache. Uncertified: {_uncertified(step.certificates)}.",
        (figures, ratios, forwards),
    )


def _uncertified(certificates: list[dict[str, Any]]) -> str:
    kinds = [
        f"{kind['call']} {kind['sample']} ({kind['reason']})"
        for kind in certificates
        if kind["state"] != "certified"
    ]
    return ", ".join(kinds) or "no kind of call"


def step_time(subject: Subject, pipeline: Any, repeats: int) -> Part:
    """The denoiser's forward alone, by rows; beyond the knee, more rows gain nothing."""
    args, kwargs = _denoiser_call(subject, pipeline)
    rows: list[Row] = []
    one_row = 0.0
    for count in ROWS:
        many, named = _tiled(args, count), _tiled(kwargs, count)
        try:
            taken = [_forward_ms(pipeline.unet, many, named) for _ in range(repeats + 2)][2:]
        except torch.OutOfMemoryError:
            break
        median = statistics.median(taken)
        one_row = one_row or median
        rows.append(
            {
                "rows": count,
                "forward ms": Spread.of(taken),
                "rows a second": 1000 * count / median,
                "of one row's time": median / one_row,
            }
        )
    return Part(f"The denoiser's forward alone, {subject.side}x{subject.side}, by rows.", (rows,))


@torch.no_grad()
def _forward_ms(module: Any, args: Any, kwargs: Any) -> float:
    _wait()
    start = time.perf_counter()
    module(*args, **kwargs)
    _wait()
    return 1000 * (time.perf_counter() - start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _denoiser_call(subject: Subject, pipeline: Any) -> tuple[Any, Any]:
    """The arguments of the denoiser in a call of one step, of two rows."""
    seen: list[tuple[Any, Any]] = []
    handle = pipeline.unet.register_forward_pre_hook(
        lambda _, *call: seen.append(call), with_kwargs=True
    )
    try:
        pipeline(**subject.calls(0, 1, steps=1)[0])
    finally:
        handle.remove()
    return seen[0]


def _tiled(value: Any, rows: int) -> Any:
    """The first row of everything that has two, `rows` times."""
    if isinstance(value, torch.Tensor):
        return (
            value[:1].repeat(rows, *[1] * (value.ndim - 1))
            if value.ndim and len(value) == 2
            else value
        )
    if isinstance(value, dict):
        return {name: _tiled(item, rows) for name, item in value.items()}
    return tuple(_tiled(item, rows) for item in value) if isinstance(value, tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="report file (default: docs/benchmarks/<device>.json on a GPU, else build/gpu.json)",
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it must be at least 1")
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    path = arguments.json or Path("build/gpu.json")
    if arguments.json is None and device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
        path = Path(f"docs/benchmarks/{name}.json")
    report = Report(path, device, rounds=arguments.rounds)
    for subject in subjects(device):
        pipeline = subject.build()
        report.add(f"{subject.name}, by mode", modes(subject, pipeline, arguments.rounds))
        report.add(f"{subject.name}, by rows", step_time(subject, pipeline, 4 * arguments.rounds))
        del pipeline
        gc.collect()
    report.close()


if __name__ == "__main__":
    main()
