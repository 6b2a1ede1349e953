"""The engine runs modular pipelines as they are: shared forwards, progress, latents, cancelling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stepweave import StepEngine
from stepweave.compat.modular import with_declared_call
from stepweave.engine import Job, Latents, Mode
from stepweave.errors import RequestCancelledError
from tests.pipelines.modular import flux_modular
from tests.pipelines.registry import example_image
from tests.support.waiting import SECONDS

CALL: dict[str, Any] = {
    "width": 16, "height": 16, "max_sequence_length": 16, "output_type": "np", "output": "images",
}  # fmt: skip


class Watching:
    """An observer that takes the latents of every step, and cancels after `last` of them."""

    def __init__(self, last: int = 100) -> None:
        self.last = last
        self.steps: list[tuple[int, int]] = []
        self.latents: list[Latents] = []

    def progressed(self, job: Job) -> None:
        self.steps.append((job.progress.step, job.progress.total))
        if job.progress.step == self.last:
            job.cancel()

    def wants(self, step: int, total: int) -> bool:
        return True

    def denoised(self, job: Job, latents: Latents) -> None:
        self.latents.append(latents)


def test_jobs_report_steps_and_latents_and_can_be_cancelled() -> None:
    whole, cancelled = Watching(), Watching(last=2)
    with StepEngine(flux_modular()) as engine:
        first = engine.submit(prompt="a", num_inference_steps=4, observer=whole, **CALL)
        other = engine.submit(prompt="b", num_inference_steps=9, observer=cancelled, **CALL)
        assert np.asarray(first.result(SECONDS)).shape == (1, 16, 16, 3)
        with pytest.raises(RequestCancelledError):
            other.result(SECONDS)
    assert first.progress == (4, 4)
    assert whole.steps[-1] == (4, 4)
    assert [latents.sample.shape for latents in whole.latents] == [(1, 16, 16)] * 4
    assert torch.isfinite(whole.latents[0].clean()).all()
    assert cancelled.steps[-1] == (2, 9)


def test_texts_and_edits_run_in_one_engine_and_repeat() -> None:
    """An image makes the same pipeline's call an edit. A job without a generator has a seed."""
    calls: list[dict[str, Any]] = [
        {"prompt": "a", "num_inference_steps": 3},
        {"prompt": "b", "num_inference_steps": 6, "image": example_image(1), "strength": 0.5},
        {"prompt": "c", "num_inference_steps": 4},
    ]
    plain = flux_modular()
    pipeline = flux_modular()
    with StepEngine(pipeline) as engine:
        jobs = [engine.submit(**call, **CALL) for call in calls]
        results = [job.result(SECONDS) for job in jobs]
        merged = sum(one.merged_calls for one in engine.stats().forwards.values())
    assert merged > 0
    for call, job, result in zip(calls, jobs, results, strict=True):
        assert job.seed is not None
        generator = torch.Generator().manual_seed(job.seed)
        expected = plain(**call, **CALL, generator=generator)
        assert np.abs(np.asarray(result) - np.asarray(expected)).max() < 1e-5
    assert "progress_bar" not in vars(pipeline._blocks)


@pytest.mark.parametrize("mode", ["off", "threads", "request"])
def test_other_modes_run_them_too(mode: Mode) -> None:
    """With the call that the server makes."""
    arguments = {name: value for name, value in CALL.items() if name != "output"}
    plain, pipeline = flux_modular(), with_declared_call(flux_modular())

    def drawn(prompt: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(len(prompt))
        return {"prompt": prompt, "num_inference_steps": 2, "generator": generator}

    with StepEngine(pipeline, mode) as engine:
        jobs = [engine.submit(**drawn(prompt), **arguments) for prompt in ("a", "bb", "ccc")]
        results = [np.asarray(job.result(SECONDS).images) for job in jobs]
    for prompt, result in zip(("a", "bb", "ccc"), results, strict=True):
        expected = np.asarray(plain(**drawn(prompt), **CALL))
        assert np.abs(result - expected).max() < 1e-5
