"""Reads and makes images on other threads than the engine's, so that other jobs continue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import greenlet
import torch

from stepweave.compat.own_state import OwnState, OwnTypes
from stepweave.compat.torch_state import DefaultRandom, apply, current, use_device
from stepweave.outcome import Outcome
from stepweave.threads import DaemonExecutor

THREADS = 2


class ImageJob(Protocol):
    """A job, as far as its work on images is concerned."""

    fiber: Any  # waits for the work
    at_images: bool  # whether the fiber waits for such work


JobT = TypeVar("JobT", bound=ImageJob)


@dataclass(frozen=True)
class ImageWork:
    """A job's request to run `function` on another thread. Its code is `known` if it comes from a
    library. If the work itself is the answer, the job's fiber must do it."""

    function: Callable[[], Any]
    known: bool = True

    def result(self, answer: Any) -> Any:
        return answer.get() if isinstance(answer, Outcome) else self.function()


class ImageThreads(Generic[JobT]):
    """Runs work on images; `returned` is called, on any thread, with the job and its outcome."""

    def __init__(self, returned: Callable[[JobT, Any], None], device: torch.device) -> None:
        self._returned = returned
        self.lockstep = False  # on the engine's own thread
        self._threads = DaemonExecutor(THREADS, "stepweave-images", partial(use_device, device))

    def run(self, job: JobT, work: ImageWork) -> None:
        job.at_images = True
        if self.lockstep or not _may_move(job, work):
            self._returned(job, work)
        else:
            self._threads.submit(_run, [job], work.function, self._returned)

    def end(self, seconds: float) -> bool:
        """Refuse new work. Returns whether all was done within `seconds`."""
        return self._threads.end(seconds)


def _may_move(job: ImageJob, work: ImageWork) -> bool:
    """Whether the work may run on another thread: the job has no process-wide state of its own; and
    if the effects of its own code on modules are watched, the work's code must be known."""
    fiber = job.fiber
    if fiber.ambient.dtype != torch.get_default_dtype():
        return False
    if any(isinstance(state, (OwnState, OwnTypes)) and state for state in fiber.own):
        return False
    watched = any(isinstance(state, (OwnState, DefaultRandom)) for state in fiber.own)
    return work.known or not watched


def _run(
    held: list[JobT], function: Callable[[], Any], returned: Callable[[JobT, Any], None]
) -> None:
    job = held.pop()  # so that this thread's queue does not keep the job alive
    returned(job, beside(job.fiber, function))


def beside(fiber: Any, function: Callable[[], Any]) -> Outcome:
    """Call `function` on this thread as if a suspended fiber had done so; returns its outcome.

    The call uses, and may change, the fiber's context variables, gradient mode and autocast; but
    not its default dtype, which belongs to the whole process.
    """
    apart = greenlet.greenlet(Outcome.of)
    apart.gr_context = fiber.greenlet.gr_context
    outside = current(fiber.device_types)
    apply(fiber.ambient._replace(dtype=outside.dtype), outside)
    try:
        outcome: Outcome = apart.switch(function)
    finally:
        after = current(fiber.device_types)
        fiber.ambient = after._replace(dtype=fiber.ambient.dtype)
        apply(outside._replace(dtype=after.dtype), after)
    outcome.let_go()
    return outcome
