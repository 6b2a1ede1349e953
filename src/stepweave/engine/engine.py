"""The engine: any diffusers pipeline, many calls at once."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from stepweave.baselines.thread_pool import Pool, Runner
from stepweave.compat.torch_state import draw_seed
from stepweave.engine.job import Job, Observer, inside_engine
from stepweave.engine.loop import StepLoop
from stepweave.errors import EngineClosed, EngineMisuse
from stepweave.memory.device import DeviceMemory
from stepweave.memory.device_health import DeviceHealth
from stepweave.parameters import PriorityName
from stepweave.planning.estimates import Estimates
from stepweave.planning.planner import OnStep, Planner
from stepweave.planning.stats import Forwards, Stats
from stepweave.planning.workload import arguments_of
from stepweave.scheduling.policy import POLICIES
from stepweave.scheduling.task import Priority

logger = logging.getLogger(__name__)

Mode = Literal["off", "threads", "request", "step"]

MAX_ROWS = 32
MAX_DECODE_ROWS = 4
MAX_JOBS = 64
CACHE_BYTES = 256 * 2**20
AUDIT_EVERY = 1000
CLOSE_SECONDS = 30.0  # that steps under way may take when the engine is closed


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. `forwards` and `certificates` are of mode `step`; `forwards` by module, rows and
    calls that shared one."""

    mode: Mode
    waiting: int  # jobs
    running: int  # jobs
    jobs: Mapping[str, int]  # done, by outcome: succeeded, failed, cancelled
    forwards: Mapping[str, Forwards]
    certificates: list[dict[str, Any]]
    # what runs alone, or takes turns: `call`, `reason` (one of few) and `detail`
    unshared: list[dict[str, str]]
    unshared_calls: Mapping[str, int]  # calls that ran alone, by `reason`
    cache_hits: int
    cache_misses: int
    cache_bytes: int
    proofs: int  # forwards run both merged and alone, audits included
    checks: int  # forwards that were run for these, merged ones of audits aside
    retried: int  # merged forwards that failed and were run alone
    out_of_memory: int  # forwards that ran out, and were halved or put off
    divided: int  # calls that were run some rows at a time
    unfit: int  # jobs that failed for want of memory
    peak_memory: int  # bytes of the device, the most taken at a time; 0 if unknown
    errors: int  # of the engine itself, survived
    backlog: float  # predicted seconds of work submitted and not yet done
    # the median error of the last predicted forwards, as a share of the prediction
    cost_error: float


class StepEngine(Estimates):
    """Runs many calls of one diffusers pipeline at once, sharing forwards at every denoising step.

    Args:
        pipeline: any diffusers pipeline. Until `close` its modules carry a hook each; calls made
            past the engine are as ever.
        mode: `step` shares single forwards; `request` puts calls that differ in prompts and
            generators only into one call of the pipeline; `threads` runs calls side by side; `off`
            one at a time.
        max_rows: rows of a shared forward (in mode `request`, pictures of a shared call); a call
            with guidance has two for each picture. 32 if None.
        max_decode_rows: rows of a shared forward of the autoencoder, which needs more memory for
            each.
        max_jobs: jobs that run at a time in mode `step`; more wait in order of arrival.
        threads: calls at a time in mode `threads`.
        cache_bytes: bound of the remembered results of text and image encoders; 0 remembers none.
            Close the engine before you change an encoder's weights.
        audit_every: one in so many merged forwards is compared with the single ones.
        memory: tells what a forward takes of the device's memory and what is left of it; torch's
            CUDA allocator does if None.
        policy: which step runs next: `thrifty`, `aged`, `fifo`, `keyed_fifo` or `round_robin`;
            docs/scheduling.md.
        knee: with the first two, forwards have no more rows than pay: beyond the knee they bring
            less than 5 % more a second.
        on_step: called on the engine's thread with each forward's module, rows, the rows it was
            allowed, and seconds.

    A job that is given no `generator` gets one, seeded from torch's default generator at
    submission.

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
        max_decode_rows: int = MAX_DECODE_ROWS,
        max_jobs: int = MAX_JOBS,
        threads: int = 4,
        cache_bytes: int = CACHE_BYTES,
        audit_every: int = AUDIT_EVERY,
        memory: DeviceMemory | None = None,
        policy: str = "thrifty",
        knee: bool = True,
        on_step: OnStep = lambda module, rows, cap, seconds: None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}")
        rows = MAX_ROWS if max_rows is None else max_rows
        bounds = {
            "max_rows": rows,
            "max_decode_rows": max_decode_rows,
            "max_jobs": max_jobs,
            "threads": threads,
        }
        for name, value in (bounds | {"audit_every": audit_every}).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes is {cache_bytes}; it must be at least 0")
        self.pipeline = pipeline
        self.mode = mode
        self._stats = Stats()
        self._health = health = DeviceHealth(
            torch.device(getattr(pipeline, "_execution_device", "cpu"))
        )
        self._closed = False
        self._lock = threading.Lock()
        self._loop: StepLoop | None = None
        self._planner = planner = Planner(
            pipeline,
            policy=policy,
            max_rows=rows,
            merges=mode in ("step", "request"),
            whole=mode != "step",
            knee=knee,
            on_step=on_step,
        )
        self._runner: Runner
        if mode == "step":
            self._runner = self._loop = StepLoop(
                pipeline,
                max_rows=rows,
                max_decode_rows=max_decode_rows,
                max_jobs=max_jobs,
                cache_bytes=cache_bytes,
                audit_every=audit_every,
                memory=memory,
                planner=planner,
                stats=self._stats,
                health=health,
            )
            planner.fits = self._loop.fits
        else:
            workers = threads if mode == "threads" else 1
            together = rows if mode == "request" else 1
            self._runner = Pool(
                pipeline,
                threads=workers,
                stats=self._stats,
                planner=planner,
                health=health,
                together=together,
            )
        self._at_exit = _close_at_exit(self)

    def submit(
        self,
        *args: Any,
        scheduler: Any = None,
        deadline: float | None = None,
        reproducible: bool = False,
        priority: PriorityName = "normal",
        observer: Observer | None = None,
        pipeline: Any = None,
        **kwargs: Any,
    ) -> Job:
        """Run the pipeline's call with these arguments as soon as possible.

        `pipeline`, if given, is called in place of the engine's: another one of its modules, as for
        image to image, whose calls share forwards with all others.

        `scheduler` is used in place of the pipeline's, as a copy. `deadline` is in seconds from
        now; a job that is late ends at its next step with DeadlineExceeded. Jobs of a higher
        `priority` go first. With `reproducible` the result is bitwise that of the plain call, in
        any company: its forwards are its own, and take turns with the others'. The `observer` is
        told how the job goes. It and callbacks run on the engine's thread and hold up every job
        meanwhile.

        Raises EngineClosed, DeviceFailed once the device has failed for good, or EngineMisuse for a
        pipeline that has modules of its own.
        """
        self._health.check()
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline is {deadline!r}; it must be more than 0 seconds")
        runner = self._runner
        scope = runner.scope_of(pipeline)
        seed = None
        names = list(arguments_of(scope.pipeline))
        # None: it takes no generator
        index = names.index("generator") if "generator" in names else None
        if kwargs.get("generator") is None and (index is None or len(args) <= index):
            seed = draw_seed()
            if index is not None:
                kwargs["generator"] = torch.Generator().manual_seed(seed)
        job = Job(
            args,
            kwargs,
            scheduler=scheduler,
            scope=scope,
            deadline=deadline,
            seed=seed,
            reproducible=reproducible,
            priority=Priority[priority.upper()],
            owner=runner,
            on_cancel=runner.cancel,
            observer=observer,
            health=self._health,
        )
        with self._lock:
            if self._closed:
                raise EngineClosed
            self._planner.enter(job)
            self._runner.submit(job)
        return job

    @property
    def failure(self) -> str | None:
        """Why no job can run any more in this process: what the device's library said of it; None
        while it works."""
        failed = self._health.failure
        return None if failed is None else failed.reason

    def takes(self, pipeline: Any) -> bool:
        """Whether `submit` takes this pipeline in place of the engine's."""
        try:
            self._runner.scope_of(pipeline)
        except EngineMisuse:
            return False
        return True

    @contextlib.contextmanager
    def in_lockstep(self) -> Iterator[None]:
        """Within it, how fast the machine is has no influence on which calls meet: forwards have as
        many rows as may be, whether they pay or not, and pictures are read and made on the engine's
        own thread. For jobs of a warm-up."""
        elsewhere = None if self._loop is None else self._loop._elsewhere
        try:
            self._planner.lavish = True
            if elsewhere is not None:
                elsewhere.here = True
            yield
        finally:
            self._planner.lavish = False
            if elsewhere is not None:
                elsewhere.here = False

    def forget_encodings(self) -> None:
        """Forget what encoders gave for inputs seen before. To be called while no job runs."""
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
        """What the engine has done so far."""
        stats, loop = self._stats, self._loop
        return EngineStats(
            mode=self.mode,
            waiting=self.waiting,
            running=self.running,
            jobs=dict(stats.jobs),
            forwards=dict(stats.forwards),
            certificates=[one.describe() for one in loop.certificates.all()] if loop else [],
            unshared=loop.unshared_now() if loop else [],
            unshared_calls=dict(loop.unshared.calls) if loop else {},
            cache_hits=loop.cache.hits if loop else 0,
            cache_misses=loop.cache.misses if loop else 0,
            cache_bytes=loop.cache.bytes if loop else 0,
            proofs=stats.proofs,
            checks=stats.checks,
            retried=stats.retried,
            out_of_memory=stats.out_of_memory,
            divided=stats.divided,
            unfit=stats.unfit,
            peak_memory=loop.memory.peak() if loop else 0,
            errors=stats.errors,
            backlog=self.backlog(),
            cost_error=self._planner.cost.error,
        )

    def certificates(self) -> dict[str, int]:
        """How many kinds of calls are certified, pending and failed."""
        return self._loop.certificates.counts() if self._loop else {}

    def stalled(self) -> float:
        """Seconds for which nothing has moved though there are jobs; infinite if a thread has
        ended."""
        ended = not self._closed and not all(thread.is_alive() for thread in self._runner.threads)
        return math.inf if ended else self._planner.stalled()

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Cancel what is left, running jobs at their next step, and leave the pipeline as it was.
        Then it takes no more jobs.

        Waits for the steps under way for at most about `timeout` seconds. Then the jobs that are
        left fail with EngineClosed, and what hangs is logged. While it is a forward, the modules
        keep their hooks, which the engine's thread takes away once it ends; until then no other
        engine can be made of them.

        Raises EngineMisuse in a callback of one of its jobs, which would wait for itself.
        """
        if not timeout >= 0:
            raise ValueError(f"timeout is {timeout!r}; it must be at least 0 seconds")
        if inside_engine(self._runner):
            raise EngineMisuse("A job's callback cannot close its own engine.")
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self._at_exit)
        left = self._runner.close(timeout)
        jobs = self._planner.jobs()
        if left or jobs:
            logger.error(
                "the engine is closed, but after %g s there is left: %s",
                timeout,
                "; ".join(left) or jobs,
            )
        for job in jobs:
            self._runner.abandon(
                job,
                EngineClosed(
                    f"The engine was closed, and the job had not ended {timeout:g} s later."
                ),
            )

    def __enter__(self) -> StepEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _close_at_exit(engine: StepEngine) -> Any:
    reference = weakref.ref(engine)

    def close() -> None:
        engine = reference()
        if engine is not None:
            engine.close()

    atexit.register(close)
    return close
