"""The engine's thread: how jobs reach it, and how it ends."""

from __future__ import annotations

import abc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stepweave.compat.torch_state import use_device
from stepweave.contained import contained
from stepweave.errors import RequestCancelledError, StepweaveError
from stepweave.jobs.job import enter_engine
from stepweave.jobs.running import RunningJob
from stepweave.memory.device_health import DeviceHealth
from stepweave.outcome import Outcome
from stepweave.planning.planner import Planner
from stepweave.planning.stats import Stats

logger = logging.getLogger(__name__)

EXIT_SECONDS = 1.0  # how long the thread may take to end when only work on images is left
LATE = 1e-3  # seconds after a deadline at which it has passed for sure


class JobQueue:
    """The jobs that wait for a thread of the engine, and the delivery of their outcomes."""

    threads: list[threading.Thread]

    def __init__(self, planner: Planner, stats: Stats, health: DeviceHealth) -> None:
        self.planner = planner
        self.stats = stats
        self.health = health
        self._waiting: dict[str, RunningJob] = {}  # oldest first
        self._loading: dict[str, RunningJob] = {}  # until their adapters are in memory
        # guards both of these, and members of subclasses
        self._wake = threading.Condition()

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return len(self._waiting) + len(self._loading)

    def submit(self, job: RunningJob) -> None:
        with self._wake:
            (self._waiting if job.adapters_arrived() else self._loading)[job.id] = job
            self._wake.notify()

    def wake(self) -> None:
        """Have the engine look again at the jobs that it has: adapters have arrived."""
        with self._wake:
            self.look_for_loaded()
            self._wake.notify_all()

    def cancel(self, job: RunningJob) -> None:
        """End a job that waits; one that runs ends at its next step."""
        with self._wake:
            waited = self._waiting.pop(job.id, None) or self._loading.pop(job.id, None)
            self._wake.notify()
        if waited is not None:
            self.finish(job, RequestCancelledError())

    def finish(self, job: RunningJob, outcome: Outcome | BaseException) -> None:
        """Deliver a job's outcome and count it, unless the job is done."""
        if isinstance(outcome, BaseException):
            outcome = Outcome(error=outcome)
        self.planner.leave(job, succeeded=outcome.error is None)
        delivered = job.finish(outcome)
        if delivered is not None:
            self.stats.finished(delivered)

    def wait_until(self, found: Callable[[], bool]) -> None:
        """Sleep until it is so, and look for loaded jobs meanwhile. Held: `_wake`."""
        while True:
            seconds = self.look_for_loaded()
            if found():
                return
            self._wake.wait(seconds)

    def look_for_loaded(self) -> float | None:
        """Have the jobs whose adapters have arrived wait for their turn, and those that are late.
        Returns the seconds until another is late, None if none will be. Held: `_wake`."""
        for job in list(self._loading.values()):
            if job.adapters_arrived() or job.late:
                self._waiting[job.id] = self._loading.pop(job.id)
        deadlines = [job.deadline for job in self._loading.values() if job.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) + LATE if deadlines else None


class EngineThread(JobQueue, abc.ABC):
    """One thread that runs jobs in steps until `close`. A subclass defines the step, and calls
    `start_thread` at the end of its constructor."""

    def __init__(self, planner: Planner, stats: Stats, health: DeviceHealth) -> None:
        super().__init__(planner, stats, health)  # `_wake` guards all below
        # jobs whose work on another thread is done, with its outcome
        self._returned: deque[tuple[RunningJob, Any]] = deque()
        self._closing = self._abandoned = self._ended = False
        self.threads = [threading.Thread(target=self._run, name="stepweave-engine", daemon=True)]

    @abc.abstractmethod
    def step(self) -> None:
        """Advance the jobs, by one forward if there is one to run."""

    @abc.abstractmethod
    def rescue(self) -> None:
        """Resume the jobs after a step that failed."""

    @abc.abstractmethod
    def running_jobs(self) -> list[RunningJob]:
        """Jobs that have started and are not done."""

    @abc.abstractmethod
    def can_step(self) -> bool:
        """Whether a running job can continue, besides those in `_returned`."""

    @abc.abstractmethod
    def next_job(self, waiting: dict[str, RunningJob]) -> RunningJob | None:
        """The job that is to start now, if there is room for one."""

    @abc.abstractmethod
    def restore_pipeline(self) -> None:
        """Remove the engine's hooks from the pipeline."""

    # From any thread

    def start_thread(self) -> None:
        self.threads[0].start()

    def return_job(self, job: RunningJob, answer: Any) -> None:
        """Have the engine's thread resume a job whose work on another thread is done."""
        with self._wake:
            self._returned.append((job, answer))
            self._wake.notify()

    def close(self, seconds: float) -> list[str]:
        """End every job at its next step, then the thread. Returns what still runs after `seconds`;
        a thread in a forward ends after it."""
        thread = self.threads[0]
        with self._wake:
            self._closing = True
            self._wake.notify()
        thread.join(seconds)
        with self._wake:
            self._abandoned = not self._ended
            self._wake.notify()
            jobs = self.running_jobs()
            hanging = [f"work on images of {job!r}" for job in jobs if job.at_images]
        thread.join(EXIT_SECONDS)
        if thread.is_alive():
            hanging.append("a forward or a callback (hooks are removed from modules when it ends)")
        elif not self._abandoned:
            self.restore_pipeline()
        return hanging

    # On the engine's thread

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        use_device(self.health.device)
        enter_engine(self)
        while self._wait():
            try:
                self.step()
            except BaseException as error:  # nothing may end this thread: jobs would hang
                if self.health.examine(error) is None:
                    self.stats.errors += 1
                    logger.exception("the engine's loop failed; it continues")
                self.rescue()
        with self._wake:
            self._ended = True
        if self._abandoned:
            with contained("remove the engine's hooks from the pipeline"):
                self.restore_pipeline()

    def _wait(self) -> bool:
        """Sleep until there is something to do. Returns False when the thread must end."""
        with self._wake:
            self.wait_until(
                lambda: self._ready() or self._closing or self.next_job(self._waiting) is not None
            )
            if not self._closing:
                return True
            waiting = [*self._waiting.values(), *self._loading.values()]
            self._waiting, self._loading = {}, {}
            for job in self.running_jobs():
                job.job.cancel()
            while self.running_jobs() and not (self._ready() or self._abandoned):
                self._wake.wait()
            goes_on = self._ready()
        for job in waiting:
            self.finish(job, RequestCancelledError())
        return goes_on

    def _ready(self) -> bool:
        return bool(self._returned) or self.can_step()

    def take_returned(self) -> Iterator[tuple[RunningJob, Any]]:
        """Yield jobs whose work on another thread is done, with their answers."""
        while self._returned:
            with self._wake:
                returned = self._returned.popleft()
            yield returned

    def take_next(self) -> RunningJob | None:
        """Take the job that is to start now, if any, from the waiting ones."""
        with self._wake:
            self.look_for_loaded()
            job = None if self._closing or self._returned else self.next_job(self._waiting)
            if job is not None:
                del self._waiting[job.id]
            return job

    def take_late(self) -> list[RunningJob]:
        """Take the jobs whose deadline has passed from the waiting ones."""
        with self._wake:
            late = [job for job in self._waiting.values() if job.late]
            for job in late:
                del self._waiting[job.id]
            return late

    def requeue(self, job: RunningJob) -> None:
        """Have a job wait again, before others of equal rank."""
        with self._wake:
            self._waiting = {job.id: job, **self._waiting}


def engine_failed(error: BaseException) -> StepweaveError:
    """The error of a job that an error of the engine itself has ended."""
    return StepweaveError(f"The engine failed ({type(error).__name__}).", code="engine_failed")
