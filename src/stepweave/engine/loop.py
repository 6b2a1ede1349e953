"""The step loop: start jobs, choose calls of one key, run one forward, let their fibers go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from stepweave.batching.call import Attempt, Call
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.fingerprints import Fingerprints
from stepweave.batching.layout import LayoutReader
from stepweave.batching.lookup import LookUp
from stepweave.certification.certificate import Verdict
from stepweave.certification.certificates import Certificates
from stepweave.certification.unshared import Unshared
from stepweave.compat import torch_state
from stepweave.config.engine import EngineConfig
from stepweave.engine.fiber import Done, Fiber
from stepweave.engine.hooks import SuspendHook, call_engine, on_image_thread
from stepweave.engine.runner import Batch, BatchRunner
from stepweave.errors import StepweaveError
from stepweave.jobs.running import RunningJob
from stepweave.jobs.thread import EngineThread, engine_failed
from stepweave.memory.concurrency import ConcurrencyLimit, Preempt
from stepweave.memory.device import DeviceMemory, memory_of
from stepweave.memory.device_health import DeviceHealth
from stepweave.memory.microbatch import WaitForMemory
from stepweave.outcome import Ending, Outcome
from stepweave.planning.planner import Planner
from stepweave.planning.stats import Stats
from stepweave.recovery.restarts import Recovery
from stepweave.scheduling.queues import CallQueues
from stepweave.views.image_threads import ImageThreads, ImageWork
from stepweave.views.modules import EngineModules
from stepweave.views.pipeline_call import call_pipeline

logger = logging.getLogger(__name__)

MAX_END_ATTEMPTS = 100  # times that Ending is raised in a pipeline that catches it


class StepLoop(EngineThread):
    """Runs jobs on one thread; their calls of heavy modules share forwards if a certificate allows
    it."""

    def __init__(
        self,
        pipeline: Any,
        config: EngineConfig,
        memory: DeviceMemory | None,
        planner: Planner,
        stats: Stats,
        health: DeviceHealth,
    ) -> None:
        super().__init__(planner, stats, health)
        device, fingerprints = health.device, Fingerprints()
        self._running: dict[Fiber, RunningJob] = {}
        self._queues = CallQueues[Call]()
        self.one_at_a_time = False  # the job that runs must be the only one
        self._modules = EngineModules(
            pipeline, config.beside, hook=partial(SuspendHook, self._running.__contains__),
            call=call_engine, max_decode_rows=config.max_decode_rows, health=health,
            fingerprints=fingerprints,
        )  # fmt: skip
        self.cache = EncoderCache(fingerprints, config.cache_bytes)
        self.certificates = Certificates(fingerprints, config.audit_every, self.cache.clear)
        self.unshared = Unshared()
        self.memory = memory or memory_of(device)
        self.image_threads = ImageThreads(self.return_job, device)
        self._concurrency = ConcurrencyLimit(config.max_jobs)
        self._lookup = LookUp(LayoutReader(fingerprints), self._modules.guard, self.cache, stats)
        self._device_types = torch_state.device_types(device)
        self._runner = BatchRunner(
            self.certificates, self.cache, stats, self.memory, planner, device,
            self._device_types, config.max_rows,
        )  # fmt: skip
        self._recovery = Recovery(
            self, self._modules, self.certificates, self.cache, self._runner.watches
        )
        self.fits, self.scope_of = self._runner.fits, self._modules.scope_of
        self.start_thread()

    def step(self) -> None:
        """Start jobs, choose calls that share a key, run one forward, let their fibers go on."""
        self._recovery.before_step()  # state that modules keep must not reach other jobs
        self._admit()  # waiting -> running
        self._expire()  # cancelled and late jobs leave
        self._retry_for_memory()  # jobs that wait for memory, once no others are left
        batch = self._schedule()  # calls of one key, up to the knee and the memory limit
        if batch is not None:
            for call, answer in self._runner.run(batch):  # merged, alone, or both ways as a proof
                self._resume(call.owner, answer)  # until its next call or its end
            self._recovery.after_step(batch.calls[0])  # jobs with doubtful results restart

    def _admit(self) -> None:
        """Start jobs, and resume those whose work on images is done."""
        while True:
            for job, answer in self.take_returned():
                job.at_images = False
                self._resume(job, answer)
            starting = self.take_next()
            if starting is None:
                return
            self._start(starting)

    def _start(self, job: RunningJob) -> None:
        error = job.why_end() or self._modules.guard.error()
        if error is not None:
            self.finish(job, error)
            return
        try:
            job.start()
            if not self._running:
                self.one_at_a_time = job.scope.takes_turns()
                self._modules.guard.keep()
            call = partial(call_pipeline, job, last=job.last_output, on_thread=on_image_thread)
            ambient = torch_state.quiet(self._device_types)
            job.fiber = fiber = Fiber(call, ambient, self._modules.own(job), job)
        except Exception as failed:
            self.stats.errors += 1
            logger.exception("%r failed to start", job)
            self.finish(job, engine_failed(failed))
            return
        self._running[fiber] = job
        self._go_on(job, fiber.resume, None)

    def _expire(self) -> None:
        """End the jobs that are cancelled or late, or that a failed device prevents."""
        for job in self.running_jobs():
            ending = job.ending() if job.call or job.waiting_for_memory else None
            if ending is not None:
                self.end(job, ending)
        for job in self.take_late():
            self._start(job)

    def _retry_for_memory(self) -> None:
        if self._all_wait_for_memory():
            for job, answer in self._concurrency.retry_or_preempt(self.running_jobs()):
                self._resume(job, answer)

    def _schedule(self) -> Batch | None:
        """Take the calls of the next forward out of their queue."""
        if not self._queues:
            return None
        calls = self.planner.pick(self._queues, self._runner.limit)
        batch = self._runner.decide(calls)
        if batch.verdict is Verdict.ALONE:
            turns = self._modules.scope.why_turns() if self.one_at_a_time else {}
            self.unshared.met(calls, self.certificates, turns)
        if len(batch.calls) < len(calls):
            self.planner.runs_alone(batch.calls[0])
        self._queues.take(batch.calls)
        for call in batch.calls:
            call.owner.call = None
            self.planner.begin(call.owner)
        return batch

    def _resume(self, job: RunningJob, answer: Any) -> None:
        """Resume a job's fiber with the answer to its request, unless it must wait for memory."""
        if isinstance(answer, WaitForMemory) and len(self._running) == 1:
            answer = answer.error()  # no other job will free memory
        job.waiting_for_memory = answer if isinstance(answer, WaitForMemory) else None
        if isinstance(answer, Preempt):
            self.restart(job, "other jobs need its memory")
        elif isinstance(answer, BaseException):
            self._go_on(job, job.fiber.throw, answer)
        elif job.waiting_for_memory is None:
            self._go_on(job, job.fiber.resume, answer)

    def _go_on(self, job: RunningJob, switch: Callable[[Any], Any], value: Any) -> None:
        """Run a job's fiber until it has to wait, or has ended."""
        request = switch(value)
        while isinstance(request, Call) and not job.restarting:
            call, result = self._lookup.read(request)
            if result is None:
                self.planner.saw(job, call)
                job.call = call
                self._queues.add(call)
                return
            request = job.fiber.resume(result)  # from the cache of encoders' results
        if isinstance(request, Done):
            self._fiber_ended(job, request.outcome)
        elif job.restarting:  # its pipeline has caught Ending
            self.end(job, Ending())
        elif isinstance(request, ImageWork):
            self.image_threads.run(job, request)
        else:  # an attempt: memory ran out
            self._resume(job, self._runner.answer_out_of_memory(request))

    def _fiber_ended(self, job: RunningJob, outcome: Outcome) -> None:
        """Finish or restart a job whose fiber has ended."""
        outcome.let_go()
        del self._running[job.fiber]
        self._modules.guard.left(job, last=not self._running, succeeded=outcome.error is None)
        if job.restarting and job.ending() is None:
            self.certificates.forget_job(job)
            job.restart()
            self.requeue(job)
            return
        job.fiber = None
        self._concurrency.ended()
        self.finish(job, outcome)

    def end(self, job: RunningJob, error: BaseException) -> None:
        """Raise `error` in a job's call, to end it."""
        if job.call is not None:
            self._queues.remove(job.call)
        job.call = job.waiting_for_memory = None
        job.end_attempts += 1
        if job.end_attempts > MAX_END_ATTEMPTS:
            del self._running[job.fiber]
            reason = f"The pipeline did not stop after {MAX_END_ATTEMPTS} requests to end."
            self.finish(job, StepweaveError(reason, code="cancel_ignored"))
        else:
            self._go_on(job, job.fiber.throw, error)

    def restart(self, job: RunningJob, reason: str) -> None:
        """Restart a job, if its arguments are unchanged."""
        if job.fiber not in self._running or job.restarting:
            return
        if not job.restartable():
            logger.warning("%r continues, although %s: it has changed its arguments", job, reason)
            return
        logger.info("%r restarts: %s", job, reason)
        job.restarting = True
        if not job.at_images:
            self.end(job, Ending())

    def rescue(self) -> None:
        """After an error of the loop: have the fibers that it did not answer run their requests
        themselves."""
        for job in self.running_jobs():
            if job.call or job.waiting_for_memory or job.at_images:
                continue
            request = job.fiber.request
            request = request.call if isinstance(request, Attempt) else request
            try:
                self._resume(job, Attempt(request) if isinstance(request, Call) else request)
            except BaseException as error:
                logger.exception("%r cannot be resumed", job)
                self._running.pop(job.fiber, None)
                self.finish(job, engine_failed(error))

    @property
    def running(self) -> int:
        """Jobs that have started and are not done."""
        return len(self._running)

    def running_jobs(self) -> list[RunningJob]:
        return list(self._running.values())

    def can_step(self) -> bool:
        return bool(self._queues) or self._all_wait_for_memory()

    def _all_wait_for_memory(self) -> bool:
        return bool(self._running) and all(job.waiting_for_memory for job in self.running_jobs())

    def next_job(self, waiting: dict[str, RunningJob]) -> RunningJob | None:
        running = self.running_jobs()
        full = self.one_at_a_time or len(running) >= self._concurrency.limit
        full = full or any(job.waiting_for_memory for job in running)
        if not waiting or (running and full):
            return None
        job = self.planner.next(waiting)
        return None if running and job.scope.takes_turns() else job

    def close(self, seconds: float) -> list[str]:
        until = time.monotonic() + seconds
        hanging = super().close(seconds)
        self.image_threads.end(max(0.0, until - time.monotonic()))
        return hanging

    def restore_pipeline(self) -> None:
        self._running.clear()
        self._modules.close()
