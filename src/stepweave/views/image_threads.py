"""Images are read and made on other threads than the engine's, while other jobs go on."""

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

    fiber: Any  # that waits for the work
    at_images: bool  # whether it does


JobT = TypeVar("JobT", bound=ImageJob)


@dataclass(frozen=True)
class ImageWork:
    """A job's wish to have `function` run on another thread; whether its code is `known`, as that
    of diffusers is. Given back as the answer: the job is to do it itself."""

    function: Callable[[], Any]
    known: bool = True

    def result(self, answer: Any) -> Any:
        """What came of it, by the answer."""
        return answer.get() if isinstance(answer, Outcome) else self.function()


class ImageThreads(Generic[JobT]):
    """Runs such work; `returned` is called with what came of it, on any thread."""

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
        """Take no more work; whether all is done within some seconds."""
        return self._threads.end(seconds)


def _may_move(job: ImageJob, work: ImageWork) -> bool:
    """Whether it would find on another thread what it finds on the engine's: nothing of the whole
    process is the job's own. Where it is watched what a job's own code leaves in the modules, code
    that is not known stays, too."""
    fiber = job.fiber
    if fiber.ambient.dtype != torch.get_default_dtype():
        return False
    if any(isinstance(state, (OwnState, OwnTypes)) and state for state in fiber.own):
        return False
    watched = any(isinstance(state, (OwnState, DefaultRandom)) for state in fiber.own)
    return work.known or not watched


def _run(
    held: list[JobT],
    function: Callable[[], Any],
    returned: Callable[[JobT, Any], None],
) -> None:
    job = held.pop()  # so that nothing on this thread keeps it
    returned(job, beside(job.fiber, function))


def beside(fiber: Any, function: Callable[[], Any]) -> Outcome:
    """What comes of a call on this thread, while a fiber is suspended; as if the fiber had made it.

    It sees the fiber's context variables, gradient mode and autocast, and what it sets of these the
    fiber has. Not the default dtype: that is the whole process's.
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
