"""A job as the engine sees it: its call, its progress, and what its fiber waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stepweave.batching.call import Call
from stepweave.compat.row_adapters import NONE, Chosen
from stepweave.compat.snapshot import ArgumentSnapshot
from stepweave.errors import (
    DeadlineExceededError,
    RequestCancelledError,
    duration,
)
from stepweave.jobs.job import Job, Observer, Progress
from stepweave.memory.device_health import DeviceHealth
from stepweave.memory.microbatch import WaitForMemory
from stepweave.outcome import Ending, Outcome
from stepweave.planning.profiles import Recorder, Shape
from stepweave.previews.latents import Latents
from stepweave.scheduling.task import Priority, Task
from stepweave.views.scope import PrivateScope

logger = logging.getLogger(__name__)


class RunningJob:
    """The engine's side of a `Job`, from submission to delivery.

    `args` and `kwargs` are those of the pipeline's call; `scope` makes views of the pipeline;
    `scheduler`, unless None, replaces the view's. It names `adapters_wanted` adapters for its calls
    alone, which it has once they `arrive`.
    """

    def __init__(
        self,
        job: Job,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        scope: PrivateScope,
        scheduler: Any,
        priority: Priority,
        observer: Observer | None,
        health: DeviceHealth,
        adapters_wanted: int = 0,
        arriving: Future[Chosen] | None = None,
    ) -> None:
        self.job = job
        self.id = job.id
        self.accepted = job.accepted
        self.reproducible = job.reproducible
        self.seed = job.seed
        self.args = args
        self.kwargs = kwargs
        self.scope = scope
        self.scheduler = scheduler
        self.adapters = NONE
        self.adapters_wanted = adapters_wanted
        self.names_adapters = arriving is not None
        self._arriving = arriving
        self.could_start = job.accepted if arriving is None else None
        job.loading = arriving is not None
        self.priority = priority
        self.task = Task()  # for the planner, as are `shape` and `recorder`
        self.shape = Shape()
        self.recorder = Recorder()
        self.warn, self.read = job.warn, job.read
        self._observer = observer
        self._observer_failed = False
        self._health = health
        self._error: BaseException | None = None  # why `ending` has ended it
        self._finishing = threading.Lock()

        # from its start
        self.fiber: Any = None  # runs its pipeline's call
        self.watched = False  # whether changes of modules by its own code are watched
        self.call: Call | None = None  # waiting in a queue
        self.waiting_for_memory: WaitForMemory | None = None
        self.at_images = False  # it waits for work on another thread
        self.restarting = False  # its fiber must end before it starts again
        self.refused = False  # it was ended because another job has changed the weights
        self.end_attempts = 0  # how often Ending, or an error, was raised in its call
        self._snapshot = ArgumentSnapshot()

    def __repr__(self) -> str:
        return repr(self.job)

    @property
    def deadline(self) -> float | None:
        return self.job.deadline

    @property
    def late(self) -> bool:
        return self.job.late

    def adapters_arrived(self) -> bool:
        """Whether its adapters are in memory, or will never be."""
        arriving = self._arriving
        arrived = arriving is None or arriving.done()
        if arrived and self.could_start is None:
            self.could_start = time.monotonic()
            self.job.loading = False
        return arrived

    def why_end(self) -> BaseException | None:
        """Why the job must end, if it must."""
        if self.job.cancelled:
            return RequestCancelledError()
        if (failed := self._health.error()) is not None:
            return failed
        if self.late:
            seconds = duration(self.job.time_limit or 0.0)
            return DeadlineExceededError(
                f"The job did not finish within its deadline of {seconds}."
            )
        arriving = self._arriving
        if arriving is not None and arriving.done():
            return arriving.exception()
        return None

    def ending(self) -> Ending | None:
        """The exception to raise in the job's call if it must end, else None. From then on the
        job's outcome is that error, even if its pipeline continues."""
        error = self.why_end()
        if error is None:
            return None
        self._error = error
        return Ending()

    def check_step(self) -> None:
        """Raise Ending if the job must end."""
        if (ending := self.ending()) is not None:
            raise ending

    @property
    def begun(self) -> float | None:
        return self.job.begun

    @property
    def opened(self) -> float | None:
        return self.job.opened

    @property
    def stepped(self) -> float | None:
        return self.job.stepped

    @property
    def progress(self) -> Progress:
        return self.job.progress

    def start(self, at: float | None = None) -> None:
        """Note that its call starts, `at` a time or now."""
        arriving = self._arriving
        if arriving is not None and arriving.done() and arriving.exception() is None:
            self.adapters, self._arriving = arriving.result(), None
        self.adapters.attach()
        self._snapshot = ArgumentSnapshot(*self.args, *self.kwargs.values())
        self.job.started = time.monotonic() if at is None else at
        self._tell()

    def begin(self) -> None:
        """Note that a forward of its call starts."""
        self.job.begun = self.job.begun or time.monotonic()
        self.task.begun = True

    def open(self, total: int) -> None:
        """Note that a denoising loop of `total` steps starts."""
        self.job.opened = self.job.opened or time.monotonic()
        self.job.progress = Progress(self.progress.step, self.progress.total + total)
        self._tell()

    def advance(self, steps: int) -> None:
        """Note that denoising steps have run."""
        self.job.progress = Progress(self.progress.step + steps, self.progress.total)
        self.job.stepped = time.monotonic()
        self._tell()

    def last_output(self) -> Any:
        """The result of its last call of a model."""
        return None if self.fiber is None else self.fiber.last

    def restartable(self) -> bool:
        """Whether its call can be repeated: it has not overwritten tensors in its arguments."""
        return not self._snapshot.overwritten()

    def restart(self) -> None:
        """Reset the job to its state before it started."""
        self._snapshot.put_back()
        self.fiber = None
        self.watched, self.restarting, self.refused, self.end_attempts = False, False, False, 0
        self.job.opened = self.job.stepped = None
        self.job.progress = Progress(0, 0)
        self.recorder = Recorder()
        self.task.begun = self.task.opened = False
        self.task.done = 0
        self._tell()

    @property
    def observed(self) -> bool:
        return self._observer is not None

    def wants_latents(self) -> bool:
        """Whether the observer wants the latents of the running step."""
        observer, (step, total) = self._observer, self.progress
        if observer is None:
            return False
        return self._contained(lambda: observer.wants(step + 1, total)) is True

    def denoised(self, latents: Latents) -> None:
        observer = self._observer
        if observer is not None:
            self._contained(lambda: observer.denoised(self.job, latents))

    def _tell(self) -> None:
        observer = self._observer
        if observer is not None:
            self._contained(lambda: observer.progressed(self.job))

    def _contained(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException:  # SystemExit would end the engine's thread
            if not self._observer_failed:
                self._observer_failed = True
                logger.exception("an observer of %r failed", self)
            return None

    def finish(self, outcome: Outcome) -> Outcome | None:
        """Deliver a result or an error. Returns what was delivered; None if the job was done."""
        with self._finishing:
            if self.job.done() or self.job.finished is not None:
                return None
            self.job.finished = time.monotonic()
        outcome.let_go()
        if self._error is not None or outcome.error is not None:
            outcome = Outcome(error=self._error or self._health.reported(outcome.error))
        self._observer = None
        self.adapters, self._arriving = NONE, None  # others may need their memory at once
        self.job.deliver(outcome)
        return outcome
