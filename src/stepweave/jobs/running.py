"""A job as the engine sees it: what it calls, how far it is, and what its fiber waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from stepweave.batching.call import Call
from stepweave.compat.snapshot import ArgumentSnapshot
from stepweave.errors import (
    DeadlineExceededError,
    DeviceFailedError,
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

    `args` and `kwargs` are the pipeline call's; `scope` makes views of the pipeline; `scheduler`,
    if given, stands in the place of the view's.
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
        self.priority = priority
        self.task = Task()  # as the planner sees it, as are its shape and the calls that it makes
        self.shape = Shape()
        self.recorder = Recorder()
        self.warn, self.read = job.warn, job.read
        self._observer = observer
        self._observer_failed = False
        self._health = health
        self._error: Exception | None = None  # that it was told to end with
        self._finishing = threading.Lock()

        # once it has started
        self.fiber: Any = None  # that runs its pipeline's call
        self.watched = False  # whether its own code changes modules is looked at
        self.call: Call | None = None  # that stands in a queue
        self.waiting_for_memory: WaitForMemory | None = None
        self.at_images = False  # it waits for work on another thread
        self.restarting = False  # it ends, to start again
        self.refused = False  # it was told that the modules are no longer as they were
        self.told = 0  # how often it was told to end
        self._snapshot = ArgumentSnapshot()

    def __repr__(self) -> str:
        return repr(self.job)

    # What it is told

    @property
    def deadline(self) -> float | None:
        return self.job.deadline

    @property
    def late(self) -> bool:
        return self.job.late

    def why_end(self) -> RequestCancelledError | DeviceFailedError | DeadlineExceededError | None:
        """Why the job must end, if it must."""
        if self.job.cancelled:
            return RequestCancelledError()
        if (failed := self._health.error()) is not None:
            return failed
        if self.late:
            seconds = duration(self.job.time_limit or 0.0)
            return DeadlineExceededError(f"The job was not done within its deadline of {seconds}.")
        return None

    def ending(self) -> Ending | None:
        """What to raise in the job's call if it must end, else None. Once told so it has ended,
        whatever its pipeline does."""
        error = self.why_end()
        if error is None:
            return None
        self._error = error
        return Ending()

    def check_step(self) -> None:
        """Raise Ending if the job must end."""
        if (ending := self.ending()) is not None:
            raise ending

    # How far it is

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
        """Note that its call begins, now or at a time."""
        self._snapshot = ArgumentSnapshot(*self.args, *self.kwargs.values())
        self.job.started = time.monotonic() if at is None else at
        self._tell()

    def begin(self) -> None:
        """Note that it is given a forward."""
        self.job.begun = self.job.begun or time.monotonic()
        self.task.begun = True

    def open(self, total: int) -> None:
        """Note that a denoising loop of `total` steps begins."""
        self.job.opened = self.job.opened or time.monotonic()
        self.job.progress = Progress(self.progress.step, self.progress.total + total)
        self._tell()

    def advance(self, steps: int) -> None:
        """Note that denoising steps have run."""
        self.job.progress = Progress(self.progress.step + steps, self.progress.total)
        self.job.stepped = time.monotonic()
        self._tell()

    def last_output(self) -> Any:
        """What the last call of a model gave."""
        return None if self.fiber is None else self.fiber.last

    def restartable(self) -> bool:
        """Whether its call can be made again: it has written to no tensor that it was given."""
        return not self._snapshot.overwritten()

    def restart(self) -> None:
        """Have the job be as it was before it started."""
        self._snapshot.put_back()
        self.fiber = None
        self.watched, self.restarting, self.refused, self.told = False, False, False, 0
        self.job.opened = self.job.stepped = None
        self.job.progress = Progress(0, 0)
        self.recorder = Recorder()
        self.task.begun = self.task.opened = False
        self.task.done = 0
        self._tell()

    # Who watches it

    @property
    def observed(self) -> bool:
        """Whether anyone wants to know how it goes."""
        return self._observer is not None

    def wants_latents(self) -> bool:
        """Whether the observer wants the latents of the step that runs."""
        observer, (step, total) = self._observer, self.progress
        if observer is None:
            return False
        return self._contained(lambda: observer.wants(step + 1, total)) is True

    def denoised(self, latents: Latents) -> None:
        """Tell the observer of the step that has run."""
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
        """Deliver a result, or an error, and give what was told; None if the job was done
        already."""
        with self._finishing:
            if self.job.done() or self.job.finished is not None:
                return None
            self.job.finished = time.monotonic()
        outcome.let_go()
        if self._error is not None or outcome.error is not None:
            outcome = Outcome(error=self._error or self._health.told(outcome.error))
        self._observer = None
        self.job.deliver(outcome)
        return outcome
