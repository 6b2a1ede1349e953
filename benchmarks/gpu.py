"""Qwen-Image and Stable Diffusion at 512x512 on a GPU: `python -m benchmarks.gpu`; minutes.

The models have random weights in bfloat16, so nothing is downloaded. Without a GPU it runs tiny
models, as a smoke test. Each case writes docs/benchmarks/<device>-<case>.json, or a file in build/
without a GPU, as soon as it has a result. A case takes three to five minutes on an H100.
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

from benchmarks import stable_diffusion
from benchmarks.calls import FRESH, Call, prompt, run, twin
from benchmarks.locust.arguments import some_of
from benchmarks.measure import Part, Report, Row, Spread, Timing, alternate, clock, ratio
from benchmarks.qwen_image import LAYERS, layers_for, qwen_image
from stepweave import StepEngine
from stepweave.engine import Mode
from tests.support.tiny import FAMILIES, SIDE

STABLE_DIFFUSION = {
    "stable_diffusion_xl": ("Stable Diffusion XL", stable_diffusion.stable_diffusion_xl),
    "stable_diffusion": ("Stable Diffusion 1.5", stable_diffusion.stable_diffusion_1_5),
}
CASES = ("qwen_image", *STABLE_DIFFUSION)  # the most important first

MODES: tuple[Mode, ...] = ("off", "request", "step")
JOBS = 8
CLIENTS = (1, 2, 4, 8)
WARM_UPS = 4  # at most
ROWS = (1, 2, 4, 8, 16)
GIBIBYTE = 2**30


class Subject:
    """A model and how to call it; each call's number gives a different prompt and seed."""

    def __init__(
        self,
        name: str,
        build: Callable[[], Any],
        steps: int,
        side: int,
        guidance: Call,
    ) -> None:
        self.name = name
        self.build = build
        self.steps = steps
        self.side = side  # pixels
        self._guidance = guidance

    def calls(self, first: int, count: int = JOBS, steps: int | None = None) -> list[Call]:
        return [
            {
                "prompt": prompt(number),
                "generator": torch.Generator().manual_seed(number),
                "num_inference_steps": steps or self.steps,
                "height": self.side,
                "width": self.side,
                **self._guidance,
            }
            for number in range(first, first + count)
        ]


def subject_of(case: str, device: torch.device) -> Subject:
    full = device.type == "cuda"
    steps, side = (20, 512) if full else (6, SIDE)
    if case == "qwen_image":
        layers = layers_for(torch.cuda.mem_get_info(device)[0]) if full else LAYERS
        name = "Qwen-Image" + (f" with {layers} of {LAYERS} layers" if layers < LAYERS else "")
        guidance: Call = {"negative_prompt": " ", "true_cfg_scale": 4.0}
        build = functools.partial(qwen_image, device, torch.bfloat16, layers)
    else:
        name, make = STABLE_DIFFUSION[case]
        guidance = {"guidance_scale": 5.0}
        build = functools.partial(make, device, torch.bfloat16)
    if full:
        return Subject(name, build, steps, side, guidance)
    return Subject(f"tiny {name}", functools.partial(_tiny, case), steps, side, guidance)


def _tiny(family: str) -> Any:
    pipeline = FAMILIES[family].build().to(torch.bfloat16)
    if family in STABLE_DIFFUSION:
        pipeline.vae.register_to_config(force_upcast=False)  # as in the full size
    return pipeline


class Contestant:
    """An engine of one mode that runs so many of the subject's jobs, all submitted at once."""

    def __init__(self, subject: Subject, engine: StepEngine, jobs: int = JOBS) -> None:
        self._subject = subject
        self._jobs = jobs
        self.engine = engine
        self.latencies: list[float] = []
        self.peak = 0  # bytes

    def warm_up(self) -> None:
        """Run jobs until they need no proof any more, so that the device's first calls are done,
        too."""
        proved: Any = None
        for again in range(WARM_UPS):
            run(self.engine, self._subject.calls(JOBS * again, self._jobs))
            states = [kind["state"] for kind in self.engine.stats().certificates]
            if states == proved or not states:
                break
            proved = states

    def __call__(self, number: int) -> Timing:
        calls = self._subject.calls(FRESH + JOBS * number, self._jobs)
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
                subject, stack.enter_context(StepEngine(copy, mode=mode))
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
        for mode in ("off", "request")
    ]
    return Part(
        f"{JOBS} jobs of {subject.steps} steps with guidance, {subject.side}x{subject.side}, that "
        f"differ in prompt and seed, submitted at once; `step` has its encoder cache. Uncertified: "
        f"{_uncertified(step.certificates)}.",
        (figures, ratios, forwards),
    )


def clients(subject: Subject, pipeline: Any, rounds: int) -> Part:
    """As vLLM-Omni's servers are measured: so many clients, each of which has an image made."""
    with contextlib.ExitStack() as stack:
        alone = Contestant(subject, stack.enter_context(StepEngine(pipeline, mode="off")), 1)
        engine = stack.enter_context(StepEngine(twin(pipeline), mode="step"))
        alone.warm_up()
        Contestant(subject, engine).warm_up()
        contestants = {str(count): Contestant(subject, engine, count) for count in CLIENTS}
        timings = alternate({"off": alone, **contestants}, rounds)
        certificates = engine.stats().certificates
    figures: list[Row] = [
        {
            "clients": count,
            "images a second": Spread.of([count / timing.wall for timing in timings[str(count)]]),
            "peak GiB": contestants[str(count)].peak / GIBIBYTE or None,
        }
        for count in CLIENTS
    ]
    ratios = [
        ratio(
            f"throughput: step, {count} clients / off",
            [Timing(count * one.wall, count * one.cpu) for one in timings["off"]],
            timings[str(count)],
        )
        for count in CLIENTS
    ]
    return Part(
        f"Jobs of {subject.steps} steps with guidance, {subject.side}x{subject.side}, that differ "
        f"in prompt and seed, one of each client, submitted at once to `step`; `off` runs one at a "
        f"time, however many there are. Uncertified: {_uncertified(certificates)}.",
        (figures, ratios),
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
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    args, kwargs = _denoiser_call(subject, pipeline, denoiser)
    rows: list[Row] = []
    one_row = 0.0
    for count in ROWS:
        many, named = _tiled(args, count), _tiled(kwargs, count)
        try:
            taken = [_forward_ms(denoiser, many, named) for _ in range(repeats + 2)][2:]
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


def _denoiser_call(subject: Subject, pipeline: Any, denoiser: Any) -> tuple[Any, Any]:
    """The arguments of the denoiser in a call of one step, of one or two rows."""
    seen: list[tuple[Any, Any]] = []
    handle = denoiser.register_forward_pre_hook(
        lambda _, *call: seen.append(call), with_kwargs=True
    )
    try:
        pipeline(**subject.calls(0, 1, steps=1)[0])
    finally:
        handle.remove()
    return seen[0]


def _tiled(value: Any, rows: int) -> Any:
    """The first row of everything that has one or two, `rows` times."""
    if isinstance(value, torch.Tensor):
        return (
            value[:1].repeat(rows, *[1] * (value.ndim - 1))
            if value.ndim and len(value) <= 2
            else value
        )
    if isinstance(value, dict):
        return {name: _tiled(item, rows) for name, item in value.items()}
    if isinstance(value, list):  # Qwen-Image's, of shapes
        return value[:1] * rows
    return tuple(_tiled(item, rows) for item in value) if isinstance(value, tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--cases",
        type=some_of(CASES),
        default=CASES,
        help=f"comma-separated cases, of {','.join(CASES)} (default: all)",
    )
    parser.add_argument(
        "--into",
        type=Path,
        help="folder of the reports, one a case (default: docs/benchmarks on a GPU, else build)",
    )
    arguments = parser.parse_args()
    rounds = arguments.rounds
    if rounds < 1:
        parser.error(f"--rounds is {rounds}; it must be at least 1")
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name, folder = "cpu", arguments.into or Path("build")
    if device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
        folder = arguments.into or Path("docs/benchmarks")
    for case in arguments.cases:
        report = Report(folder / f"{name}-{case.replace('_', '-')}.json", device, rounds=rounds)
        subject = subject_of(case, device)
        pipeline = subject.build()
        if case == "qwen_image":
            report.add(f"{subject.name}, by clients", clients(subject, pipeline, rounds))
        else:
            report.add(f"{subject.name}, by mode", modes(subject, pipeline, rounds))
        report.add(f"{subject.name}, by rows", step_time(subject, pipeline, 4 * rounds))
        report.close()
        del pipeline
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
