"""Companies of jobs that join and leave at chosen steps, and the results of plain calls."""

from __future__ import annotations

import functools
import inspect
import queue
import threading
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest

from stepweave import StepEngine
from stepweave.jobs.job import Job
from stepweave.jobs.running import RunningJob
from tests.support.tiny import FAMILIES, Family
from tests.support.waiting import SECONDS

TOLERANCE = 1e-4  # of pixels in [0, 1]; measured: 3e-6
JOBS = 6
PROMPTS = [
    "a red circle",
    "two small dogs on a very long road at night",
    "x",
    "a large green square and a blue ring below it",
    "blue",
    "three yellow triangles",
    "a small purple star in the top left corner of an image that is otherwise empty",
    "a ring",
    "one orange cross on black",
    "",
    "white white white white white white",
    "the circle is left of the square",
]
NEGATIVES = ["", "grey", "a blurred image of many small things, badly drawn"]
STEPS = [3, 6, 4, 5]
GUIDANCE = [None, 1.0, 2.5, 7.0]  # None: the family's own; 1: without classifier-free guidance
ALONE = [i for i in range(len(PROMPTS)) if GUIDANCE[i % len(GUIDANCE)] == 1.0]
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@functools.cache
def built(family: Family, engine: bool) -> Any:
    """A pipeline, cached separately for engines and for plain calls."""
    return family.build()


def takes(family: Family, name: str) -> bool:
    return name in inspect.signature(type(built(family, False)).__call__).parameters


def request(family: Family, i: int) -> dict[str, Any]:
    """The i-th request: all differ in prompt and seed, and most in steps, guidance and
    scheduler."""
    changes: dict[str, Any] = {}
    guidance = GUIDANCE[i % len(GUIDANCE)]
    if guidance is not None:
        changes = {
            name: guidance for name in family.call if name.endswith(("guidance_scale", "cfg_scale"))
        }
    if i % 3 == 2 and takes(family, "negative_prompt"):
        changes["negative_prompt"] = NEGATIVES[i // 3 % len(NEGATIVES)]
        if takes(family, "true_cfg_scale"):
            changes["true_cfg_scale"] = guidance or 3.0
    return family.arguments(PROMPTS[i], seed=i, steps=STEPS[i * 3 % 4], **changes)


def scheduler(family: Family, pipeline: Any, i: int) -> Any:
    """The i-th request's scheduler; None for the pipeline's own."""
    choices = [None, *family.schedulers.values()]
    choice = choices[i % len(choices)]
    if choice is None:
        return None
    kind, changes = choice
    return kind.from_config(pipeline.scheduler.config, **changes)


@functools.cache
def expected(family: Family, i: int, swap: bool) -> np.ndarray:
    """The result of a plain call, with `swap` with the scheduler of the i-th request."""
    pipeline = built(family, False)
    own = pipeline.scheduler
    try:
        put(pipeline, scheduler(family, pipeline, i) if swap else None)
        images: np.ndarray = pipeline(**request(family, i))[0]
    finally:
        put(pipeline, own)
    return images


def put(pipeline: Any, scheduler: Any) -> None:
    """Swap a scheduler as users do."""
    if scheduler is None:
        return
    pipeline.scheduler = scheduler
    if hasattr(pipeline, "decoder_pipe"):  # a combined pipeline runs with those of its parts
        pipeline.decoder_pipe.scheduler = scheduler


@dataclass(frozen=True)
class Company:
    """Requests, and when they join and leave."""

    requests: tuple[int, ...]
    # for each but the first: the job and its step at which this one is submitted
    joins: tuple[tuple[int, int], ...]
    leaves: tuple[tuple[int, int], ...] = ()  # jobs that are cancelled, and at which step
    swap: bool = True  # each with a scheduler of its own


class Stage:
    """Runs a company: submits and cancels jobs at its steps."""

    def __init__(self, engine: StepEngine, family: Family, company: Company) -> None:
        self._engine = engine
        self._family = family
        self._company = company
        self._waiting = {i: join for i, join in enumerate(company.joins, start=1)}
        self._leaves = dict(company.leaves)
        self._calls = [request(family, i) for i in company.requests]
        self._numbers = {id(call["generator"]): i for i, call in enumerate(self._calls)}
        self._submitted: queue.Queue[tuple[int, Job]] = queue.Queue()
        self._lock = threading.RLock()

    def play(self) -> list[Job]:
        """The finished jobs, in the company's order."""
        opened, advanced = RunningJob.open, RunningJob.advance
        with (
            mock.patch.object(
                RunningJob, "open", lambda job, total: (opened(job, total), self._heard(job))[0]
            ),
            mock.patch.object(
                RunningJob,
                "advance",
                lambda job, steps: (advanced(job, steps), self._heard(job))[0],
            ),
        ):
            self._submit(0)
            jobs = dict(self._submitted.get(timeout=SECONDS) for _ in self._calls)
            for job in jobs.values():
                job.exception(SECONDS)
        return [jobs[i] for i in range(len(jobs))]

    def _submit(self, i: int) -> None:
        swap = self._company.swap
        own = (
            scheduler(self._family, self._engine.pipeline, self._company.requests[i])
            if swap
            else None
        )
        job = self._engine.submit(scheduler=own, **self._calls[i])
        self._submitted.put((i, job))
        job.add_done_callback(lambda _: self._release(i, None))

    def _release(self, i: int, step: int | None) -> None:
        """Submit the requests that join at this step of a job, or once it is done."""
        with self._lock:
            for late, (other, at) in list(self._waiting.items()):
                if other == i and (step is None or step >= at):
                    del self._waiting[late]
                    self._submit(late)

    def _heard(self, job: RunningJob) -> None:
        i = self._numbers[id(job.kwargs["generator"])]
        self._release(i, job.progress.step)
        if job.progress.step >= self._leaves.get(i, SECONDS):
            job.job.cancel()
