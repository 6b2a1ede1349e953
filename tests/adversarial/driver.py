"""Serves the jobs of a random case, and runs them plainly, each on a module of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from stepweave import StepEngine
from tests.adversarial.outsider import Case
from tests.support.toy import SECONDS, Toy, tensor_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest number of the plain result


class Sized(Toy):
    """A toy pipeline whose samples have any shape."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        arguments: Any,
        *,
        rows: int,
        steps: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> torch.Tensor:
        x = torch.randn(rows, *shape, generator=generator).to(dtype)
        with self.progress_bar(total=steps) as bar:
            for step in range(steps):
                x = 0.9 * x + 0.3 * tensor_of(self.denoiser(x, **arguments(step)))
                bar.update()
        return x


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    name: str
    error: float  # the largest of a job, as a share of the tolerance
    merged_share: float
    late_share: float  # after the first round
    certified: bool
    errors: int
    why: str


def run(case: Case, rounds: int = 2) -> Outcome:
    """Serve the case's jobs, all together, `rounds` times, on one engine."""

    def call(job: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(job)
        return {
            "arguments": functools.partial(case.arguments, job),
            "rows": case.rows[job % len(case.rows)],
            "steps": case.steps[job % len(case.steps)],
            "shape": case.shape,
            "dtype": case.dtype,
            "generator": generator,
        }

    jobs = len(case.steps)
    expected = [Sized(case.build())(**call(job)) for job in range(jobs)]
    with StepEngine(Sized(case.build()), knee=False) as engine:
        results, shares = [], []
        for _ in range(rounds):
            with engine._loop._wake:  # type: ignore[union-attr]  # all start at once, so that every run is the same
                submitted = [engine.submit(**call(job)) for job in range(jobs)]
            results.append([job.result(SECONDS) for job in submitted])
            forwards = engine.stats().forwards["denoiser"]
            shares.append((forwards.calls, forwards.merged_calls))
        stats = engine.stats()
    worst = max(
        float(
            (ours.double() - plain.double()).abs().max()
            / (plain.double().abs().max() * TOLERANCE[case.dtype])
        )
        for one in results
        for ours, plain in zip(one, expected, strict=True)
    )
    found = [one for one in stats.certificates if one["call"] == "denoiser"]
    (before, merged), (calls, merged_calls) = shares[0], shares[-1]
    return Outcome(
        case.name,
        worst if worst == worst else float("inf"),
        merged_calls / calls,
        (merged_calls - merged) / (calls - before),
        bool(found) and all(one["state"] == "certified" for one in found),
        stats.errors,
        "; ".join(f"{one['sample']} {one['state']}: {one['reason']}" for one in found)[:300],
    )
