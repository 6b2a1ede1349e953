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
    """Say that the calling thread is one of an engine's own."""
    _here.owner = owner


def inside_engine(owner: object) -> bool:
    """Whether the calling thread is one of the engine's own: it must not wait for that engine."""
    return owner is not None and getattr(_here, "owner", None) is owner


class Progress(NamedTuple):
    """Denoising steps done, and as many as are known to be needed; (0, 0) until the pipeline says
    how many."""

    step: int
    total: int


class Observer(Protocol):
    """Is told how a job goes, on an engine's thread, which it holds up meanwhile. What it raises is
    logged once a job.

    That a job is done tells `Job.add_done_callback`.
    """

    def progressed(self, job: Job) -> None:
        """It has started, its denoising loop is about to begin, a step has run, or it restarts;
        `job.progress` tells."""

    def wants(self, step: int, total: int) -> bool:
        """Whether `denoised` shall be called after the step of this number, 1 to `total`."""

    def denoised(self, job: Job, latents: Latents) -> None:
        """The step `job.progress.step` has run, from these latents; after `progressed`."""


class Job:
    """A submitted call. Awaitable; `result()` gives what the pipeline's own call returns.

    `accepted`, `started`, `begun` (it was given its first forward), `opened` (the first denoising
    step is about to run), `stepped` (the last one has run) and `finished` are seconds of the
    monotonic clock, or None until then; `deadline` is one, too, or None, and `time_limit` the
    seconds that it was given for. `seed` is of the generator that it was given where the caller
    gave none.
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
        self.cancelled = False  # it was asked to end
        self._warnings: dict[Hashable, str] = {}
        self._tokens: dict[Hashable, int] = {}  # of each text that a tokenizer read
        self._owner = owner
        self._on_cancel = on_cancel
        self._future = _Result(self)

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def warnings(self) -> list[str]:
        """What the caller should know of the result, in order: which prompts the text encoders did
        not read to their end."""
        return list(self._warnings.values())

    @property
    def tokens(self) -> int:
        """Tokens that the pipeline's tokenizers read of its prompts, special ones included, padding
        and what was cut off not.

        A text counts once for each tokenizer that read it, however often that did. 0 where the
        pipeline has no tokenizer.
        """
        return sum(self._tokens.values())

    def done(self) -> bool:
        """Whether the result, or the error, is there."""
        return self._future.done()

    def cancel(self) -> None:
        """Ask that the job end: at once if it waits, at its next step if it runs. No effect once it
        is done."""
        if not self.done():
            self.cancelled = True
            self._on_cancel()

    def result(self, timeout: float | None = None) -> Any:
        """What the pipeline's call returned.

        Raises TimeoutError after `timeout` seconds, RequestCancelledError, DeadlineExceededError,
        EngineClosedError, or what the call raised; a StepweaveError, whose cause that is, in place
        of a StopIteration and whatever else would mean something to who waits.
        """
        self._check_misuse()
        try:
            return self._future.result(timeout).get()
        finally:
            del self  # which an error's traceback would hold, and it that

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error that ended the job, or None. Raises TimeoutError after `timeout` seconds."""
        self._check_misuse()
        return self._future.result(timeout).error

    def add_done_callback(self, function: Callable[[Job], None]) -> None:
        """Call `function` with the job once it is done, on the engine's thread; at once if it is.
        What it raises is logged."""
        held = [(self, function)]  # until it is called; the future keeps what it has called

        def call(_: Future[Any]) -> None:
            job, function = held.pop()
            try:
                function(job)
            except BaseException:  # SystemExit would end the engine's thread
                logger.exception("a callback of %r failed", job)

        self._future.add_done_callback(call)

    def __await__(self) -> Generator[Any, None, Any]:
        """Cancelling the task that awaits it cancels the job."""
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
                "A job's callback waits for a job of its own engine, which cannot run meanwhile."
            )

    # By the engine

    def warn(self, key: Hashable, message: str) -> None:
        """Have the caller know; once for each key."""
        self._warnings.setdefault(key, message)

    def read(self, key: Hashable, tokens: int) -> None:
        """Note how many tokens of a text a tokenizer read. Pipelines read a text once more, whole,
        to tell what they cut."""
        self._tokens[key] = min(tokens, self._tokens.get(key, tokens))

    def deliver(self, outcome: Outcome) -> None:
        """The job is done."""
        self._on_cancel = lambda: None
        self._future.set_result(outcome)
        self._future.job = self._owner = None


class _Result(Future[Outcome]):
    """Cancelling it, as asyncio does when an awaiting task is cancelled, asks the job to end. It
    has results only, no errors."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job: Job | None = job  # until it is done
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        job = self.job
        if job is not None:
            job.cancel()
        return False
