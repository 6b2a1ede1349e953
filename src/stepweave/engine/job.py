"""A job: one accepted call of the pipeline, from submission to delivery."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from stepweave.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceFailed,
    EngineMisuse,
    OutOfMemory,
    RequestError,
    duration,
)
from stepweave.memory.device import ran_out
from stepweave.outcome import Outcome, carried
from stepweave.planning.profiles import Recorder, Shape
from stepweave.scheduling.task import Priority, Task

if TYPE_CHECKING:
    from stepweave.memory.device_health import DeviceHealth
    from stepweave.previews.latents import Latents

logger = logging.getLogger(__name__)

_here = threading.local()


def enter_engine(owner: object) -> None:
    """Say that the calling thread is one of an engine's own."""
    _here.owner = owner


def inside_engine(owner: object) -> bool:
    """Whether the calling thread is one of the engine's own: it must not wait for that engine."""
    return getattr(_here, "owner", None) is owner


class Ending(BaseException):
    """Raised in a call that must end: no `except Exception` of a pipeline or a callback stops
    it."""


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
        """It has started, its denoising loop is about to begin, a step has run, or it begins anew;
        `job.progress` tells."""

    def wants(self, step: int, total: int) -> bool:
        """Whether `denoised` shall be called after the step of this number, 1 to `total`."""

    def denoised(self, job: Job, latents: Latents) -> None:
        """The step `job.progress.step` has run, from these latents; after `progressed`."""


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


class Job:
    """A submitted call. Awaitable; `result()` gives what the pipeline's own call returns.

    `accepted`, `started`, `begun` (it was given its first forward), `opened` (the first denoising
    step is about to run), `stepped` (the last one has run) and `finished` are seconds of the
    monotonic clock, or None until then.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        scheduler: Any = None,
        scope: Any = None,
        deadline: float | None = None,
        seed: int | None = None,
        reproducible: bool = False,
        priority: Priority = Priority.NORMAL,
        owner: object = None,
        on_cancel: Callable[[Job], None] = lambda job: None,
        observer: Observer | None = None,
        health: DeviceHealth | None = None,
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.scheduler = scheduler
        self.scope = scope  # makes views of the pipeline that it calls
        self.seed = (
            # of the generator that it was given where the caller gave none, or of a default one of
            # its own
            seed
        )
        self.reproducible = reproducible  # its calls share no forward with others
        self.watched = False  # whether its own code changes modules has been looked at
        self.priority = priority
        # as the planner sees it, as are the next two: what it is like, and the calls it makes
        self.task = Task()
        self.shape: Shape | None = None
        self.recorder = Recorder()
        self.id = uuid.uuid4().hex
        self.accepted = time.monotonic()
        self.deadline = None if deadline is None else self.accepted + deadline
        self.started: float | None = None
        self.begun: float | None = None
        self.opened: float | None = None
        self.stepped: float | None = None
        self.finished: float | None = None
        self._seconds = deadline
        self._step = 0
        self._total = 0
        self._cancelled = False
        self._ended: Exception | None = None
        self._warnings: dict[Hashable, str] = {}
        self._tokens: dict[Hashable, int] = {}  # of each text that a tokenizer read
        self._owner = owner
        self._on_cancel = on_cancel
        self._observer = observer
        self._observer_failed = False
        self._finishing = threading.Lock()
        self._health = health
        self._future = _Result(self)

    @property
    def progress(self) -> Progress:
        return Progress(self._step, self._total)

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
            self._cancelled = True
            self._on_cancel(self)

    def result(self, timeout: float | None = None) -> Any:
        """What the pipeline's call returned.

        Raises TimeoutError after `timeout` seconds, Cancelled, DeadlineExceeded, EngineClosed, or
        what the call raised; a StepweaveError, whose cause that is, in place of a StopIteration and
        whatever else would mean something to who waits.
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
        return f"<Job {self.id} {state} {self._step}/{self._total}>"

    def _check_misuse(self) -> None:
        if self._owner is not None and inside_engine(self._owner) and not self.done():
            raise EngineMisuse(
                "A job's callback waits for a job of its own engine, which cannot run meanwhile."
            )

    # By the engine

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def check(self) -> None:
        """Raise Cancelled, DeviceFailed or DeadlineExceeded if the job must end."""
        error = self.end()
        if error is not None:
            raise error

    def end(self) -> Cancelled | DeviceFailed | DeadlineExceeded | None:
        """Why the job must end, if it must."""
        if self._cancelled:
            return Cancelled()
        if self._health is not None and (failed := self._health.error()) is not None:
            return failed
        if self.late:
            return DeadlineExceeded(
                f"The job was not done within its deadline of {duration(self._seconds or 0)}."
            )
        return None

    def check_step(self) -> None:
        """Raise Ending if the job must end."""
        ending = self.ending()
        if ending is not None:
            raise ending

    def ending(self) -> Ending | None:
        """What to raise in the job's call if it must end, else None. Once told so it has ended,
        whatever its pipeline does."""
        error = self.end()
        if error is None:
            return None
        self._ended = error
        return Ending()

    def start(self, at: float | None = None) -> None:
        """Note that its call begins, now or at a time."""
        self.started = time.monotonic() if at is None else at
        self._tell()

    def begin(self) -> None:
        """Note that it is given a forward."""
        self.begun = self.begun or time.monotonic()
        self.task.begun = True

    def open(self, total: int) -> None:
        """Note that a denoising loop of `total` steps begins."""
        self.opened = self.opened or time.monotonic()
        self._total += total
        self._tell()

    def warn(self, key: Hashable, message: str) -> None:
        """Have the caller know; once for each key."""
        self._warnings.setdefault(key, message)

    def read(self, key: Hashable, tokens: int) -> None:
        """Note how many tokens of a text a tokenizer read. Pipelines read a text once more, whole,
        to tell what they cut."""
        self._tokens[key] = min(tokens, self._tokens.get(key, tokens))

    def restart(self) -> None:
        """Note that the call begins anew."""
        self.opened = self.stepped = None
        self._step = self._total = 0
        self.recorder = Recorder()
        self.task.begun = self.task.opened = False
        self.task.done = 0
        self._tell()

    def advance(self, steps: int) -> None:
        """Note that denoising steps have run."""
        self._step += steps
        self.stepped = time.monotonic()
        self._tell()

    @property
    def observed(self) -> bool:
        """Whether anyone wants to know how it goes."""
        return self._observer is not None

    def wants_latents(self) -> bool:
        """Whether the observer wants the latents of the step that runs."""
        observer, step = self._observer, self._step + 1
        return (
            observer is not None
            and self._contained(lambda: observer.wants(step, self._total)) is True
        )

    def denoised(self, latents: Latents) -> None:
        """Tell the observer of the step that has run."""
        observer = self._observer
        if observer is not None:
            self._contained(lambda: observer.denoised(self, latents))

    def _tell(self) -> None:
        observer = self._observer
        if observer is not None:
            self._contained(lambda: observer.progressed(self))

    def _contained(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException:  # SystemExit would end the engine's thread
            if not self._observer_failed:
                self._observer_failed = True
                logger.exception("an observer of %r failed", self)
            return None

    def finish(self, outcome: Outcome) -> Outcome | None:
        """Deliver a result, or an error, and give what was told; None if the job was done
        already."""
        with self._finishing:
            if self._future.done() or self.finished is not None:
                return None
            self.finished = time.monotonic()
        outcome.let_go()
        if self._ended is not None or outcome.error is not None:
            outcome = Outcome(error=self._ended or self._told(outcome.error))
        self._observer = None
        self._future.set_result(outcome)
        self._future.job = None
        return outcome

    def _told(self, error: BaseException | None) -> Exception:
        """What the caller is told."""
        assert error is not None
        if not isinstance(error, RequestError) and self._health is not None:
            failed = self._health.examine(error)
            if failed is not None:
                return failed
        if ran_out(error):
            too_little = OutOfMemory(
                "There is not enough memory for this job: ask for a smaller size, or fewer "
                "pictures."
            )
            too_little.__cause__ = error
            return too_little
        return carried(error, "The pipeline", TimeoutError)  # as `result` raises that is not done
