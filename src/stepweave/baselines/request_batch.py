"""Batches of whole requests in one call of the pipeline, as most servers do: a baseline."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from stepweave.batching.merge import split
from stepweave.jobs.running import RunningJob
from stepweave.outcome import Ending, Outcome
from stepweave.previews.latents import Latents
from stepweave.scope import RequestScopedPipeline
from stepweave.truncation.prompts import warned
from stepweave.views.finite import FiniteImages
from stepweave.views.pipeline_call import track

_CONSTANTS = (bool, int, float, str, type(None))


def batch_key(job: RunningJob) -> Hashable | None:
    """A key that is equal for jobs whose calls differ only in prompts and generators; None for a
    job that needs its own call."""
    kwargs = job.kwargs
    generator = kwargs.get("generator")
    if job.args or job.reproducible or job.scheduler is not None or job.names_adapters:
        return None
    if generator is None or kwargs.get("callback_on_step_end") is not None:
        return None
    if len(_generators(job)) != job.shape.images or not isinstance(kwargs.get("prompt"), str):
        return None
    key: list[Hashable] = [id(job.scope.pipeline)]
    for name, value in kwargs.items():
        if _is_prompt(name) and isinstance(value, str):
            key.append((name, str))
        elif name != "generator":
            key.append((name, type(value), value if isinstance(value, _CONSTANTS) else id(value)))
    return frozenset(key)


def run_batch(scope: RequestScopedPipeline, jobs: list[RunningJob]) -> list[Outcome]:
    """Run jobs of one key in one call, and return the outcome of each."""
    first = jobs[0].kwargs
    kwargs = {
        name: [job.kwargs[name] for job in jobs]
        if _is_prompt(name) and isinstance(value, str)
        else value
        for name, value in first.items()
    }
    kwargs["generator"] = generators = [item for job in jobs for item in _generators(job)]
    before = [generator.get_state() for generator in generators]
    try:
        with (
            scope.lease() as view,
            warned(view, jobs),
            track(view, _Batch(jobs)),
            FiniteImages(view) as images,
        ):
            outcomes = split(images.checked(view(**kwargs)), [job.shape.images for job in jobs])
    except BaseException:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)  # so that each can still be run alone
        raise
    return [Outcome(outcome, job.why_end()) for job, outcome in zip(jobs, outcomes, strict=True)]


def _is_prompt(name: str) -> bool:
    return name.startswith(("prompt", "negative_prompt"))


def _generators(job: RunningJob) -> list[torch.Generator]:
    generator = job.kwargs["generator"]
    return generator if isinstance(generator, list) else [generator]


class _Batch:
    """Jobs of one call, with common progress. The call ends early only if all of them must end."""

    def __init__(self, jobs: list[RunningJob]) -> None:
        self._jobs = jobs
        self._wanting = [False] * len(jobs)

    @property
    def observed(self) -> bool:
        return any(job.observed for job in self._jobs)

    def wants_latents(self) -> bool:
        self._wanting = [job.wants_latents() for job in self._jobs]
        return any(self._wanting)

    def denoised(self, latents: Latents) -> None:
        counts = [job.shape.images for job in self._jobs]
        if len(latents.sample) != sum(counts):
            return  # rows are not images
        for i, (job, wanting) in enumerate(zip(self._jobs, self._wanting, strict=True)):
            if wanting:
                start = sum(counts[:i])
                job.denoised(latents.rows(start, start + counts[i]))

    def open(self, total: int) -> None:
        for job in self._jobs:
            job.open(total)

    def advance(self, steps: int) -> None:
        for job in self._jobs:
            job.advance(steps)

    def check_step(self) -> None:
        if all(job.why_end() is not None for job in self._jobs):
            raise Ending
