"""`StepEngine`: many calls of one diffusers pipeline at once."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import torch

from stepweave.baselines.thread_pool import ThreadPool
from stepweave.compat.row_adapters import choose_later
from stepweave.compat.torch_state import draw_seed
from stepweave.config.engine import EngineConfig, EngineLimits, Mode
from stepweave.engine.loop import StepLoop
from stepweave.errors import EngineClosedError, EngineMisuseError
from stepweave.jobs.job import Job, Observer, inside_engine
from stepweave.jobs.running import RunningJob
from stepweave.memory.device import DeviceMemory
from stepweave.memory.device_health import DeviceHealth
from stepweave.parameters import PriorityName, applied
from stepweave.planning.estimates import Estimates
from stepweave.planning.planner import OnStep, Planner
from stepweave.planning.stats import EngineStats, Stats, of_the_loop
from stepweave.planning.workload import has_generator, takes
from stepweave.scheduling.policy import Policy, srpt
from stepweave.scheduling.task import Priority
from stepweave.threads import close_at_exit

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 30.0  # how long `close` waits for running steps


class StepEngine(Estimates):
    """Runs many calls of one diffusers pipeline at once, sharing forwards at every denoising step.

    Args:
        pipeline: any diffusers pipeline. Until `close`, each of its modules has a hook; direct
            calls of the pipeline work as before.
        mode, max_rows, limits: as in `EngineConfig`; 32 rows if None.
        memory: measures used and free device memory. Default: torch's CUDA allocator.
        policy: chooses the calls that share the next forward: `stepweave.scheduling.srpt`, or an
            object with the methods of `stepweave.scheduling.Policy` (docs/scheduling.md).
        on_step: called on the engine's thread after each forward with its module, rows, row limit
            and seconds.

    A job without a `generator` gets one, seeded from torch's default generator at submission.

    >>> with StepEngine(pipeline) as engine:
    ...     jobs = [engine.submit(prompt=prompt, num_inference_steps=20) for prompt in prompts]
    ...     images = [job.result().images[0] for job in jobs]
    """

    def __init__(
        self,
        pipeline: Any,
        mode: Mode = "step",
        max_rows: int | None = None,
        *,
        memory: DeviceMemory | None = None,
        policy: Policy = srpt,
        on_step: OnStep = lambda module, rows, cap, seconds: None,
        **limits: Unpack[EngineLimits],
    ) -> None:
        rows = EngineConfig.max_rows if max_rows is None else max_rows
        self.config = config = EngineConfig(mode, rows, **limits)
        if not isinstance(policy, Policy):
            raise TypeError(
                f"policy is {policy!r}; it must be an object such as stepweave.scheduling.srpt"
            )
        self.pipeline = pipeline
        self.mode = config.mode
        self._stats = Stats()
        device = torch.device(getattr(pipeline, "_execution_device", "cpu"))
        self._health = DeviceHealth(device)
        self._closed = False
        self._lock = threading.Lock()
        self._planner = Planner(
            pipeline,
            policy=policy,
            max_rows=config.max_rows,
            merges=mode in ("step", "request"),
            whole=mode != "step",
            knee=config.knee,
            on_step=on_step,
        )
        parts = self._planner, self._stats, self._health
        self._loop = StepLoop(pipeline, config, memory, *parts) if mode == "step" else None
        if self._loop is not None:
            self._planner.fits = self._loop.fits
        self._runner = self._loop or ThreadPool(pipeline, config, *parts)
        self._at_exit = close_at_exit(self)

    def submit(
        self,
        *args: Any,
        scheduler: Any = None,
        deadline: float | None = None,
        reproducible: bool = False,
        priority: PriorityName = "normal",
        observer: Observer | None = None,
        pipeline: Any = None,
        lora: Sequence[tuple[str, float]] = (),
        **kwargs: Any,
    ) -> Job:
        """Run the pipeline's call with these arguments as soon as possible.

        `pipeline`, if given, is called instead of the engine's. It must be made of the same
        modules, such as an image-to-image pipeline, and of those `beside`; its calls share forwards
        with all others. `lora` names adapters of the engine's `loras`, each with its scale, in the
        order in which they are applied; while one is read, the job waits, and others go on. It
        fails with LoraError if one cannot be used.

        `scheduler` replaces the pipeline's; the job uses a copy. `deadline` is in seconds from now;
        a late job ends at its next step with DeadlineExceededError. Jobs of a higher `priority` go
        first. With `reproducible` the result is bitwise equal to the plain call's, whatever else
        runs: its calls are never merged. The `observer` is notified of the job's progress. It and
        callbacks run on the engine's thread and delay every job.

        Raises EngineClosedError; DeviceFailedError if the device has failed permanently;
        EngineMisuseError for a pipeline with modules that are not the engine's; LoraError for an
        unknown adapter, or one that could not be used before.
        """
        self._health.check()
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline is {deadline!r}; it must be more than 0 seconds")
        scope = self._runner.scope_of(pipeline)
        seed = None if has_generator(scope.pipeline, args, kwargs) else draw_seed()
        if seed is not None and takes(scope.pipeline, "generator"):
            kwargs["generator"] = torch.Generator().manual_seed(seed)
        job = Job(
            deadline=deadline, seed=seed, reproducible=reproducible, owner=self._runner,
            on_cancel=lambda: self._runner.cancel(running),
        )  # fmt: skip
        adapters = choose_later(
            self.config.loras, lora, kwargs, lambda: job.done() or job.cancelled or job.late
        )
        try:
            running = RunningJob(
                job, args, kwargs, scope=scope, scheduler=scheduler,
                priority=Priority[priority.upper()], observer=observer, health=self._health,
                adapters_wanted=applied(lora), arriving=adapters,
            )  # fmt: skip
            with self._lock:
                if self._closed:
                    raise EngineClosedError
                self._planner.enter(running)
                self._runner.submit(running)
        except BaseException:
            job.cancelled = True  # so that its adapters are not read
            raise
        if adapters is not None:
            adapters.add_done_callback(lambda _: self._runner.wake())
        return job

    @property
    def failure(self) -> str | None:
        """The device's error after which no job can run in this process, or None."""
        failed = self._health.failure
        return None if failed is None else failed.reason

    def takes(self, pipeline: Any) -> bool:
        """Whether `submit` accepts this pipeline instead of the engine's."""
        try:
            self._runner.scope_of(pipeline)
        except EngineMisuseError:
            return False
        return True

    @contextlib.contextmanager
    def in_lockstep(self) -> Iterator[None]:
        """Within the block, batches do not depend on the machine's speed, for warm-up: they may
        exceed the knee, and image work runs on the engine's thread."""
        threads = None if self._loop is None else self._loop.image_threads
        try:
            self._planner.caps.ignore_knee = True
            if threads is not None:
                threads.lockstep = True
            yield
        finally:
            self._planner.caps.ignore_knee = False
            if threads is not None:
                threads.lockstep = False

    def forget_encodings(self) -> None:
        """Empty the cache of encoders' results. Call it only while no job runs."""
        if self._loop is not None:
            self._loop.cache.clear()

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return self._runner.waiting

    @property
    def running(self) -> int:
        """Jobs that have started and are not done."""
        return self._runner.running

    def stats(self) -> EngineStats:
        """Statistics since the engine was made."""
        return EngineStats(
            mode=self.mode,
            waiting=self.waiting,
            running=self.running,
            backlog=self.backlog(),
            cost_error=self._planner.cost.error,
            **of_the_loop(self._loop),
            **self._stats.counts(),
        )

    def certificates(self) -> dict[str, int]:
        """The number of kinds of calls by state: certified, pending, failed."""
        return self._loop.certificates.counts() if self._loop else {}

    def stalled(self) -> float:
        """Seconds without progress while there are jobs; infinite if a thread has ended."""
        ended = not self._closed and not all(thread.is_alive() for thread in self._runner.threads)
        return math.inf if ended else self._planner.stalled()

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Refuse new jobs, cancel all others (running ones at their next step), and remove the
        hooks from the pipeline.

        Waits at most about `timeout` seconds for running steps. Jobs that still run then fail with
        EngineClosedError, and what hangs is logged. If a forward hangs, the engine's thread removes
        the hooks when it ends; until then no other engine can use these modules.

        Raises EngineMisuseError in a callback of one of its jobs, which would wait for itself.
        """
        if not timeout >= 0:
            raise ValueError(f"timeout is {timeout!r}; it must be at least 0 seconds")
        if inside_engine(self._runner):
            raise EngineMisuseError("A job's callback cannot close its own engine.")
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self._at_exit)
        hanging = self._runner.close(timeout)
        jobs = self._planner.jobs()
        if hanging or jobs:
            logger.error("still running %g s after close: %s", timeout, "; ".join(hanging) or jobs)
        reason = f"The engine was closed, and the job was still running {timeout:g} s later."
        for job in jobs:
            self._runner.finish(job, EngineClosedError(reason))

    def __enter__(self) -> StepEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
