"""Runs jobs on a bounded number of threads, one by default, behind a bounded queue."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
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
    """Accepts jobs up to a bound and starts them in order of arrival, `threads` of them at a time."""

    def __init__(self, model: ServedModel, max_queue: int, threads: int = 1) -> None:
        self._model = model
        self._threads = threads
        self._max_queue = max_queue
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[Job, Future[None]]] = {}  # accepted and not yet done
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="stepweave-engine")

    @property
    def in_flight(self) -> int:
        """Jobs accepted and not yet done, running or waiting."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Jobs accepted that no thread is free for yet."""
        return max(0, self.in_flight - self._threads)

    def submit(self, parameters: Parameters) -> Job:
        """Accept a job. Raises Refused if the queue is full, Unavailable once the engine is closed."""
        job = Job(parameters)
        with self._lock:
            if self._closed:
                raise Unavailable("The server is shutting down.", code="draining", retry_after=10)
            if self.in_flight >= self._threads + self._max_queue:
                raise Refused(
                    f"{self.waiting} requests are waiting; the limit is {self._max_queue}.",
                    retry_after=self._predicted_wait(),
                )
            self._jobs[job.id] = job, self._pool.submit(self._run, job)
        return job

    def cancel(self, job: Job) -> None:
        """End the job: at once if it waits, at its next step if it runs. No effect once it is done."""
        job.cancel()
        with self._lock:
            _, turn = self._jobs.get(job.id, (job, None))
            if turn is None or not turn.cancel():
                return
            del self._jobs[job.id]
        job.result.set_exception(Cancelled())

    def close(self) -> None:
        """Refuse new jobs, cancel those that are left, and wait for the running ones to reach their next step."""
        with self._lock:
            self._closed = True
            left = [job for job, _ in self._jobs.values()]
        for job in left:
            self.cancel(job)
        self._pool.shutdown(wait=True)

    def _predicted_wait(self) -> float:
        """Seconds until a place is likely free: one job's time, shared by the threads."""
        return sum(self._recent) / len(self._recent) / self._threads if self._recent else UNKNOWN_SECONDS

    def _run(self, job: Job) -> None:
        job.started = time.monotonic()
        try:
            job.check()
            images = self._model.generate(job.parameters, job.on_step)
            seconds = time.monotonic() - job.started
            self._recent.append(seconds)
            timings = Timings(queued=job.started - job.accepted, generate=seconds)
            outcome: Generation | Exception = Generation(job.parameters, images, timings)
        except RequestError as error:
            outcome = error
        except Exception as error:
            logger.exception("job failed: %s", job.describe())
            outcome = StepweaveError(f"The generation failed ({type(error).__name__}).", code="generation_failed")
            outcome.__cause__ = error
        with self._lock:
            del self._jobs[job.id]
        if isinstance(outcome, Exception):
            job.result.set_exception(outcome)
        else:
            job.result.set_result(outcome)
