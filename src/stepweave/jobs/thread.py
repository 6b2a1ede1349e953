"""The engine's thread: how jobs reach it, and how it ends."""

from __future__ import annotations

import abc
import logging
import threading
from collections import deque
from collections.abc import Iterator
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

LEAVING_SECONDS = 1.0  # that the thread has to end in once nothing but work on images is left


class JobQueue:
    """Jobs that wait for a thread of the engine, and what all such threads do with jobs."""

    threads: list[threading.Thread]

    def __init__(self, planner: Planner, stats: Stats, health: DeviceHealth) -> None:
        self.planner = planner
        self.stats = stats
        self.health = health
        self._waiting: dict[str, RunningJob] = {}  # oldest first
        self._wake = threading.Condition()  # guards it, and what a subclass says

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return len(self._waiting)

    def submit(self, job: RunningJob) -> None:
        with self._wake:
            self._waiting[job.id] = job
            self._wake.notify()

    def cancel(self, job: RunningJob) -> None:
        """A waiting job ends at once; a running one is found by its step."""
        with self._wake:
            waited = self._waiting.pop(job.id, None)
            self._wake.notify()
        if waited is not None:
            self.finish(job, RequestCancelledError())

    def finish(self, job: RunningJob, outcome: Outcome | Exception) -> None:
        """Deliver what came of a job, and count it, unless that is done."""
        if isinstance(outcome, Exception):
            outcome = Outcome(error=outcome)
        self.planner.leave(job, succeeded=outcome.error is None)
        told = job.finish(outcome)
        if told is not None:
            self.stats.finished(told)


class EngineThread(JobQueue, abc.ABC):
    """One thread that runs jobs in steps. Nothing ends it but `close`.

    A subclass says what a step is. It calls `start_thread` once it is made.
    """

    def __init__(self, planner: Planner, stats: Stats, health: DeviceHealth) -> None:
        super().__init__(planner, stats, health)  # `_wake` guards all below
        # jobs whose work on another thread is done, and what came of it
        self._returned: deque[tuple[RunningJob, Any]] = deque()
        self._closing = self._abandoned = self._ended = False
        self.threads = [threading.Thread(target=self._run, name="stepweave-engine", daemon=True)]

    # What a step is

    @abc.abstractmethod
    def step(self) -> None:
        """Run jobs a little further."""

    @abc.abstractmethod
    def rescue(self) -> None:
        """Have jobs go on after a step that failed."""

    @abc.abstractmethod
    def running_jobs(self) -> list[RunningJob]:
        """Those that have started and are not done."""

    @abc.abstractmethod
    def can_step(self) -> bool:
        """Whether a running job can go on, besides those that have come back."""

    @abc.abstractmethod
    def next_job(self, waiting: dict[str, RunningJob]) -> RunningJob | None:
        """The job whose turn it is to start, if there is room for it."""

    @abc.abstractmethod
    def leave(self) -> None:
        """Leave the pipeline as it was."""

    # From any thread

    def start_thread(self) -> None:
        self.threads[0].start()

    def come_back(self, job: RunningJob, answer: Any) -> None:
        """A job's work on another thread is done."""
        with self._wake:
            self._returned.append((job, answer))
            self._wake.notify()

    def close(self, seconds: float) -> list[str]:
        """End every job at its next step, then the thread. What has not ended after some seconds;
        while a forward has not, the thread goes on until it has."""
        thread = self.threads[0]
        with self._wake:
            self._closing = True
            self._wake.notify()
        thread.join(seconds)
        with self._wake:
            self._abandoned = not self._ended
            self._wake.notify()
            left = [f"work on images of {job!r}" for job in self.running_jobs() if job.at_images]
        thread.join(LEAVING_SECONDS)
        if thread.is_alive():
            left.append("a forward or a callback; the pipeline's hooks stay until it ends")
        elif not self._abandoned:
            self.leave()
        return left

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
                    logger.exception("the engine's loop failed; it goes on")
                self.rescue()
        with self._wake:
            self._ended = True
        if self._abandoned:
            with contained("take the hooks away"):
                self.leave()

    def _wait(self) -> bool:
        """Sleep until there is something to do. False when there never will be."""
        with self._wake:
            while not (self._ready() or self._closing or self.next_job(self._waiting) is not None):
                self._wake.wait()
            if not self._closing:
                return True
            waiting, self._waiting = list(self._waiting.values()), {}
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
        """Jobs whose work on another thread is done, with their answers."""
        while self._returned:
            with self._wake:
                returned = self._returned.popleft()
            yield returned

    def take_next(self) -> RunningJob | None:
        """The job whose turn it is to start; it waits no longer."""
        with self._wake:
            job = None if self._closing or self._returned else self.next_job(self._waiting)
            if job is not None:
                del self._waiting[job.id]
            return job

    def take_late(self) -> list[RunningJob]:
        """Waiting jobs whose deadline has passed; they wait no longer."""
        with self._wake:
            late = [job for job in self._waiting.values() if job.late]
            for job in late:
                del self._waiting[job.id]
            return late

    def wait_again(self, job: RunningJob) -> None:
        """A job waits again, at its rank; before its equals."""
        with self._wake:
            self._waiting = {job.id: job, **self._waiting}


def engine_failed(error: BaseException) -> StepweaveError:
    """What a job is told when the engine itself has failed."""
    return StepweaveError(f"The engine failed ({type(error).__name__}).", code="engine_failed")
