"""What the tests of reported faults share: jobs that start together, held against plain calls of
fresh pipelines.

outcome = run(build, [request(seed) for seed in range(4)])
outcome.check()
assert outcome.merged_share("transformer") > 0.5

A request makes the keyword arguments of one call anew, each time: what it gives may be written to.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepweave import StepEngine

SECONDS = 120
TOLERANCE = 1e-4  # in float32
WIDTH = 8  # of a loop's rows

Request = Callable[[], dict[str, Any]]
Build = Callable[[], Any]
Arguments = Callable[[int], dict[str, Any]]  # of one step, besides the sample


def numbers(output: Any) -> Tensor:
    """A call's output as a tensor of doubles with its own memory."""
    value = output if isinstance(output, Tensor) else output[0]
    return (
        (value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))).double().clone()
    )


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite if shapes or NaNs differ."""
    if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    return float((one - other).nan_to_num(0.0, 0.0, 0.0).abs().max())


class Gate:
    """An observer that blocks the engine when its job starts, until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    def progressed(self, job: Any) -> None:
        assert self._opened.wait(SECONDS)

    def wants(self, step: int, total: int) -> bool:
        return False

    def denoised(self, job: Any, latents: Any) -> None:
        pass


def submit_together(engine: StepEngine, requests: Sequence[Request], **options: Any) -> list[Any]:
    """Submit jobs so that none runs before all are submitted, and their adapters in memory."""
    gate = Gate()
    first, *others = requests
    jobs = [engine.submit(**first(), **options, observer=gate)]
    try:
        until_loaded(jobs)  # and then at the gate, before there are others
        jobs += [engine.submit(**other(), **options) for other in others]
        until_loaded(jobs)
    finally:
        gate.open()
    return jobs


def until_loaded(jobs: Sequence[Any]) -> None:
    """Wait until the adapters of jobs are in memory, or cannot be."""
    until = time.monotonic() + SECONDS
    while any(job.loading and not job.done() for job in jobs):
        assert time.monotonic() < until, "adapters are still being read"
        time.sleep(0.005)


@dataclass
class Outcome:
    """Results of jobs, and those of plain calls."""

    results: list[Tensor]
    expected: list[Tensor]
    stats: Any  # the engine's

    @property
    def differences(self) -> list[float]:
        return [
            difference(one, other) for one, other in zip(self.results, self.expected, strict=True)
        ]

    def merged_share(self, name: str = "denoiser") -> float:
        return self.stats.forwards[name].merged_share

    def check(self, tolerance: float = TOLERANCE) -> None:
        """Assert that all jobs got the results of plain calls, and that the engine had no
        errors."""
        found = [f"{difference:.2g}" for difference in self.differences]
        assert all(difference <= tolerance for difference in self.differences), (
            f"jobs differ from plain calls by {found}"
        )
        assert self.stats.errors == 0, f"the engine made {self.stats.errors} errors"

    def check_alone(self, name: str = "denoiser", tolerance: float = TOLERANCE) -> None:
        """As `check`, and assert that no call of this module shared a forward."""
        self.check(tolerance)
        assert self.merged_share(name) == 0, f"{self.merged_share(name):.0%} of calls were merged"

    def check_merged(
        self, name: str = "denoiser", share: float = 0.6, tolerance: float = TOLERANCE
    ) -> None:
        """As `check`, and assert how many of this module's calls shared a forward."""
        self.check(tolerance)
        found = self.stats.certificates
        assert self.merged_share(name) >= share, (
            f"{self.merged_share(name):.0%} of calls were merged: {found}"
        )


def plain(build: Build, requests: Sequence[Request]) -> list[Tensor]:
    """Results of plain calls, each with a new pipeline."""
    return [numbers(build()(**request())) for request in requests]


def run(build: Build, *rounds: Sequence[Request], **options: Any) -> Outcome:
    """Run plain calls, then jobs of a new pipeline; jobs of a round start together."""
    expected = [one for requests in rounds for one in plain(build, requests)]
    results = []
    with StepEngine(build(), knee=False, **options) as engine:
        for requests in rounds:
            results += [numbers(job.result(SECONDS)) for job in submit_together(engine, requests)]
    return Outcome(results, expected, engine.stats())


def warnings_of(caplog: pytest.LogCaptureFixture, name: str = "") -> list[str]:
    """The project's warnings in the log that contain this name."""
    records = [
        one
        for one in caplog.records
        if one.name.startswith("stepweave") and one.levelno >= logging.WARNING
    ]
    return [line for line in (one.getMessage() for one in records) if name in line]


# A pipeline of a few lines


class Loop(DiffusionPipeline):
    """A loop around a denoiser, whose results may have more channels than its samples. Gives the
    samples of all steps, side by side: what goes wrong at one is not forgotten at later ones.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        arguments: Arguments = lambda step: {},
        *,
        rows: int = 1,
        steps: int = 6,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Tensor:
        x = torch.randn(rows, WIDTH, generator=generator).to(dtype)
        path = []
        with self.progress_bar(total=steps) as bar:
            for step in range(steps):
                prediction = self.denoiser(x, **arguments(step))
                x = 0.9 * x + 0.3 * prediction[:, :WIDTH].to(dtype)
                path.append(x)
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {"latents": x})
                bar.update()
        return torch.cat(path, dim=1)


def honest(x: Tensor) -> Tensor:
    """Every row by itself."""
    return torch.tanh(1.7 * x.flip(-1) + 0.2)


def looped(forward: Callable[..., Any]) -> Build:
    """Builds loops around a module with this forward."""

    def build() -> Loop:
        return Loop(type("Denoiser", (nn.Module,), {"forward": forward})().eval())

    return build


def request(seed: int, make: Callable[[], Arguments] | None = None, **changes: Any) -> Request:
    """A call of a loop; `make` returns the function that gives each step's arguments."""
    return functools.partial(_request, seed, make, changes)


def _request(
    seed: int, make: Callable[[], Arguments] | None, changes: dict[str, Any]
) -> dict[str, Any]:
    arguments = {} if make is None else {"arguments": make()}
    return {"generator": torch.Generator().manual_seed(seed), **arguments, **changes}
