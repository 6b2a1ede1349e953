"""A job: one accepted call of the pipeline, as its caller holds it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from stepweave.errors import EngineMisuseError
from stepweave.outcome import Outcome
from stepweave.previews.latents import Latents

logger = logging.getLogger(__name__)

_here = threading.local()


def enter_engine(owner: object) -> None:
    """Mark the calling thread as one of an engine's."""
    _here.owner = owner


def inside_engine(owner: object) -> bool:
    """Whether the calling thread is one of the engine's, so must not wait for that engine."""
    return owner is not None and getattr(_here, "owner", None) is owner


def inside_any_engine() -> bool:
    """Whether the calling thread is an engine's, whose jobs cannot go on meanwhile."""
    return getattr(_here, "owner", None) is not None


class Progress(NamedTuple):
    """Denoising steps done, and in total as far as known; (0, 0) until the first loop begins."""

    step: int
    total: int


class Observer(Protocol):
    """Is notified of a job's progress, on the engine's thread, which it delays. Its first error for
    a job is logged, others are ignored. See `Job.add_done_callback` for the end of a job.
    """

    def progressed(self, job: Job) -> None:
        """Called when the job starts, its denoising loop begins, a step has run, or it restarts;
        see `job.progress`."""

    def wants(self, step: int, total: int) -> bool:
        """Whether to call `denoised` after this step, 1 to `total`."""

    def denoised(self, job: Job, latents: Latents) -> None:
        """Called after `progressed` with the latents that step `job.progress.step` started from."""


class Job:
    """A submitted call of the pipeline. Awaitable; `result()` returns the call's result.

    `accepted`, `started`, `begun` (first forward), `opened` (first denoising step), `stepped` (end
    of the latest step) and `finished` are times of the monotonic clock in seconds, or None until
    then. So is `deadline`, or None; `time_limit` is the same in seconds after `accepted`. `seed` is
    that of the generator that the engine made, if the caller gave none. It cannot start while it is
    `loading`: its adapters are being read, or wait for memory.
    """

    def __init__(
        self,
        *,
        deadline: float | None = None,
        seed: int | None = None,
        reproducible: bool = False,
        owner: object = None,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.accepted = time.monotonic()
        self.deadline = None if deadline is None else self.accepted + deadline
        self.time_limit = deadline
        self.seed = seed
        self.reproducible = reproducible
        self.started: float | None = None
        self.begun: float | None = None
        self.opened: float | None = None
        self.stepped: float | None = None
        self.finished: float | None = None
        self.progress = Progress(0, 0)
        self.cancelled = False
        self.loading = False
        self._warnings: dict[Hashable, str] = {}
        self._tokens: dict[Hashable, int] = {}  # by tokenizer and text
        self._owner = owner
        self._on_cancel = on_cancel
        self._future = _Result(self)

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def warnings(self) -> list[str]:
        """Warnings about the result, in order: prompts that text encoders have truncated."""
        return list(self._warnings.values())

    @property
    def tokens(self) -> int:
        """Tokens of its prompts, with special tokens, without padding and truncated ones.

        Each text counts once for each tokenizer. 0 if the pipeline has no tokenizer.
        """
        return sum(self._tokens.values())

    def done(self) -> bool:
        """Whether the job has ended, with a result or an error."""
        return self._future.done()

    def cancel(self) -> None:
        """End the job: at once if it waits, at its next step if it runs; no effect once done."""
        if not self.done():
            self.cancelled = True
            self._on_cancel()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the pipeline's result and return it.

        Raises TimeoutError after `timeout` seconds, RequestCancelledError, DeadlineExceededError,
        EngineClosedError, or the call's error. Errors that futures or asyncio treat as signals,
        such as StopIteration, are the cause of a StepweaveError.
        """
        self._check_misuse()
        try:
            return self._future.result(timeout).get()
        finally:
            del self  # an error's traceback would hold the job, which holds the error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the error that ended the job, or None; TimeoutError after `timeout` seconds."""
        self._check_misuse()
        return self._future.result(timeout).error

    def add_done_callback(self, function: Callable[[Job], None]) -> None:
        """Call `function` with the job when it is done, on the engine's thread, or now if it is.
        Errors are logged."""
        held = [(self, function)]  # emptied by the call: a future keeps its callbacks

        def call(_: Future[Any]) -> None:
            job, function = held.pop()
            try:
                function(job)
            except BaseException:  # SystemExit would end the engine's thread
                logger.exception("a callback of %r failed", job)

        self._future.add_done_callback(call)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the result; cancelling the awaiting task cancels the job."""
        return self._get().__await__()

    async def _get(self) -> Any:
        try:
            return (await asyncio.wrap_future(self._future)).get()
        finally:
            del self  # as in `result`

    def __repr__(self) -> str:
        state = "done" if self.done() else "waiting" if self.started is None else "running"
        return f"<Job {self.id} {state} {self.progress.step}/{self.progress.total}>"

    def _check_misuse(self) -> None:
        if inside_engine(self._owner) and not self.done():
            raise EngineMisuseError(
                "A job's callback cannot wait for a job of its own engine, which waits for it."
            )

    # For the engine

    def warn(self, key: Hashable, message: str) -> None:
        """Add a warning, unless there is one of this key."""
        self._warnings.setdefault(key, message)

    def read(self, key: Hashable, tokens: int) -> None:
        """Note how many tokens a tokenizer read. The least counts: pipelines read a text again,
        without truncation, to say what they cut off."""
        self._tokens[key] = min(tokens, self._tokens.get(key, tokens))

    def deliver(self, outcome: Outcome) -> None:
        """End the job with this outcome."""
        self._on_cancel = lambda: None
        self._future.set_result(outcome)
        self._future.job = self._owner = None


class _Result(Future[Outcome]):
    """A future whose cancellation, by asyncio for example, cancels the job. Its result is an
    Outcome; it has no exception."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job: Job | None = job  # until it is done
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        job = self.job
        if job is not None:
            job.cancel()
        return False
