"""Whole calls on threads: the modes `off` (one thread), `threads` and `request`."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from stepweave.baselines.request_batch import batch_key, run_batch
from stepweave.compat.row_adapters import detach
from stepweave.compat.torch_state import use_device
from stepweave.compat.turn_taking import modules_in
from stepweave.config.engine import EngineConfig
from stepweave.errors import EngineMisuseError
from stepweave.jobs.job import enter_engine
from stepweave.jobs.running import RunningJob
from stepweave.jobs.thread import JobQueue, engine_failed
from stepweave.memory.device_health import DeviceHealth
from stepweave.outcome import Ending, Outcome
from stepweave.planning.planner import Planner
from stepweave.planning.stats import Stats
from stepweave.views.pipeline_call import call_pipeline
from stepweave.views.scope import PrivateScope

logger = logging.getLogger(__name__)


class ThreadPool(JobQueue):
    """Starts jobs in the planner's order: several at a time in mode `threads`; in mode `request`,
    up to `max_rows` images of jobs of one `batch_key` in one call."""

    def __init__(
        self,
        pipeline: Any,
        config: EngineConfig,
        planner: Planner,
        stats: Stats,
        health: DeviceHealth,
    ) -> None:
        super().__init__(planner, stats, health)
        threads = config.threads if config.mode == "threads" else 1
        self._scope = PrivateScope(pipeline, beside=config.beside)
        self._max_images = config.max_rows if config.mode == "request" else 1  # of one call
        self._modules = [*(module for _, module in modules_in(pipeline)), *config.beside.values()]
        self._running: dict[str, RunningJob] = {}
        self._closed = False  # `_wake` guards both
        self.threads = [
            threading.Thread(target=self._work, name=f"stepweave-engine-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    def scope_of(self, pipeline: Any) -> PrivateScope:
        """The scope that makes views of the engine's pipeline, or of another pipeline of the same
        modules. Raises EngineMisuseError for one that cannot run here."""
        if pipeline is None:
            return self._scope
        scope = self._scope.sibling(pipeline)
        if len(self.threads) > 1 and scope.takes_turns() and not self._scope.takes_turns():
            kinds = type(pipeline).__name__, type(self._scope.pipeline).__name__
            raise EngineMisuseError(
                f"A call of {kinds[0]} changes modules while it runs, so no call of {kinds[1]} can "
                f"run at the same time."
            )
        return scope

    def close(self, seconds: float) -> list[str]:
        """End every job, running ones at their next step, then the threads. Returns what still runs
        after `seconds`."""
        until = time.monotonic() + seconds
        with self._wake:
            self._closed = True
            jobs = [*self._running.values(), *self._waiting.values(), *self._loading.values()]
            self._wake.notify_all()
        for job in jobs:
            job.job.cancel()
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        hanging = [f"the call of {job!r}" for job in list(self._running.values())]
        if not hanging:
            detach(self._modules)
        return hanging

    def _work(self) -> None:
        use_device(self.health.device)
        enter_engine(self)
        while (jobs := self._next_jobs()) is not None:
            try:
                self._serve(jobs)
            except BaseException:  # nothing may end this thread: jobs would hang
                self.stats.errors += 1
                logger.exception("the engine failed; it continues")
            del jobs

    def _next_jobs(self) -> list[RunningJob] | None:
        """Wait for the next job, with those that can share its call. None once closed."""
        with self._wake:
            self.wait_until(lambda: bool(self._waiting) or self._closed)
            return None if self._closed else self._take()

    def _serve(self, jobs: list[RunningJob]) -> None:
        try:
            outcomes = self._run(jobs)
        except BaseException as error:  # nothing may end this thread: jobs would hang
            self.stats.errors += 1
            logger.exception("the engine failed; it continues")
            outcomes = [Outcome(error=engine_failed(error))] * len(jobs)
        with self._wake:
            for job in jobs:
                del self._running[job.id]
        for job, outcome in zip(jobs, outcomes, strict=True):
            self.finish(job, outcome)

    def _take(self) -> list[RunningJob]:
        jobs = [self._waiting.pop(self.planner.next(self._waiting).id)]
        if self._max_images > 1:
            key = batch_key(jobs[0])
            alike = [
                job for job in self._waiting.values() if key is not None and batch_key(job) == key
            ]
            images = jobs[0].shape.images
            for job in alike:
                if images + job.shape.images > self._max_images:
                    break
                jobs.append(self._waiting.pop(job.id))
                images += job.shape.images
        for job in jobs:
            self._running[job.id] = job
        return jobs

    def _run(self, jobs: list[RunningJob]) -> list[Outcome]:
        now = time.monotonic()
        beside = min(len(self.threads), len(self._running)) if self._max_images == 1 else 1
        for job in jobs:
            job.start(now)
            self.planner.begin(job)
        if len(jobs) > 1 and self.health.failure is None:
            together = Outcome.apart(run_batch, jobs[0].scope, jobs)
            if together.error is None:
                self.planner.called(jobs, time.monotonic() - now, beside)
                return together.value  # type: ignore[no-any-return]
            # Ending means that all of them must end; `_run_alone` finds each job's error
            if (
                not isinstance(together.error, Ending)
                and self.health.examine(together.error) is None
            ):
                self.stats.retried += 1
                logger.warning(
                    "a batch of %d jobs failed; running each alone",
                    len(jobs),
                    exc_info=together.error,
                )
            for job in jobs:
                job.restart()
        return [self._run_alone(job, beside) for job in jobs]

    def _run_alone(self, job: RunningJob, beside: int) -> Outcome:
        began = time.monotonic()
        ended = job.why_end()
        if ended is not None:
            return Outcome(error=ended)
        outcome: Outcome = Outcome.apart(call_pipeline, job).value
        steps = job.task.demand.steps if outcome.error is None else job.progress.step
        # a job that ended early counts too while nothing is timed: all might end early
        if outcome.error is None or (steps and not self.planner.cost.timed):
            seconds = time.monotonic() - began
            self.planner.called([job], seconds * job.task.demand.steps / max(1, steps), beside)
        return outcome
