"""Runs jobs on a bounded number of threads, one by default, behind a bounded queue."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from stepweave.engine.job import Job
from stepweave.errors import Cancelled, Refused, RequestError, StepweaveError, Unavailable
from stepweave.generation import Generation, Parameters, Timings

if TYPE_CHECKING:
    from stepweave.model import ServedModel

logger = logging.getLogger(__name__)

RECENT = 32  # jobs whose mean time predicts the wait
UNKNOWN_SECONDS = 5.0  # Retry-After before any job has been timed


class PoolEngine:
    """Accepts jobs up to a bound and starts them in order of arrival, `threads` of them at a time.

    An accepted job holds its place until `release`: also while its pictures are encoded, so that they are bounded too.
    """

    def __init__(self, model: ServedModel, max_queue: int, threads: int = 1) -> None:
        self._model = model
        self._limit = threads + max_queue
        self._accepted: set[str] = set()
        self._running: dict[str, Job] = {}
        self._waiting: dict[str, Job] = {}  # oldest first
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._closed = False
        self._changed = threading.Condition()  # guards all of the above
        self._threads = [
            threading.Thread(target=self._work, name=f"stepweave-engine-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def in_flight(self) -> int:
        """Jobs accepted and not yet released: waiting, running, or being encoded."""
        return len(self._accepted)

    @property
    def waiting(self) -> int:
        """Jobs accepted and not yet started."""
        return len(self._waiting)

    def submit(self, parameters: Parameters) -> Job:
        """Accept a job. Raises Refused if the queue is full, Unavailable once the engine is closed."""
        job = Job(parameters)
        with self._changed:
            if self._closed:
                raise Unavailable("The server is shutting down.", code="draining", retry_after=10)
            if len(self._accepted) >= self._limit:
                raise Refused(
                    f"{len(self._accepted)} requests are in flight; the limit is {self._limit}.",
                    retry_after=self._predicted_wait(),
                )
            self._accepted.add(job.id)
            self._waiting[job.id] = job
            self._changed.notify()
        return job

    def release(self, job: Job) -> None:
        """Free the job's place. Whoever submitted it calls this once, when done with its result."""
        with self._changed:
            self._accepted.discard(job.id)

    def cancel(self, job: Job) -> None:
        """End the job: at once if it waits, at its next step if it runs. No effect once it is done."""
        job.cancel()
        with self._changed:
            waited = self._waiting.pop(job.id, None)
        if waited is not None:
            job.result.set_exception(Cancelled())

    def close(self) -> None:
        """Refuse new jobs, cancel those that are left, and wait for what runs to reach its next step."""
        with self._changed:
            self._closed = True
            left = [*self._running.values(), *self._waiting.values()]
            self._changed.notify_all()
        for job in left:
            self.cancel(job)
        for thread in self._threads:
            thread.join()

    def _predicted_wait(self) -> float:
        """Seconds until a place is likely free: one job's time, shared by the threads."""
        if not self._recent:
            return UNKNOWN_SECONDS
        return sum(self._recent) / len(self._recent) / len(self._threads)

    def _work(self) -> None:
        """One thread: take the oldest waiting job, run it, until closed."""
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._waiting.pop(next(iter(self._waiting)))
                self._running[job.id] = job
            outcome = self._run(job)
            with self._changed:
                if isinstance(outcome, Generation):
                    self._recent.append(outcome.timings.generate)
                del self._running[job.id]
            if isinstance(outcome, Exception):
                job.result.set_exception(outcome)
            else:
                job.result.set_result(outcome)

    def _run(self, job: Job) -> Generation | Exception:
        started = time.monotonic()
        try:
            job.check()
            images = self._model.generate(job.parameters, job.on_step)
        except RequestError as error:
            return error
        except Exception as error:
            logger.exception("job failed: %s", job.describe())
            failure = StepweaveError(f"The generation failed ({type(error).__name__}).", code="generation_failed")
            failure.__cause__ = error
            return failure
        seconds = time.monotonic() - started
        return Generation(job.parameters, images, Timings(queued=started - job.accepted, generate=seconds))
