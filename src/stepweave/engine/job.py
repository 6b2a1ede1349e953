"""A job: one accepted call of the pipeline, from submission to delivery."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, NamedTuple

from stepweave.engine.fiber import in_fiber
from stepweave.errors import Cancelled, DeadlineExceeded, EngineMisuse

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Denoising steps done, and as many as are known to be needed; (0, 0) until the pipeline says how many."""

    step: int
    total: int


class _Result(Future[Any]):
    """Cancelling it, as asyncio does when an awaiting task is cancelled, asks the job to end."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        self._job.cancel()
        return False


class Job:
    """A submitted call. Awaitable; `result()` gives what the pipeline's own call returns.

    `accepted`, `started`, `opened` (the first denoising step is about to run), `stepped` (the last one has run) and
    `finished` are seconds of the monotonic clock, or None until then.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        scheduler: Any = None,
        deadline: float | None = None,
        seed: int = 0,
        on_cancel: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.scheduler = scheduler
        self.seed = seed  # of the default random generator, where the call is given none
        self.id = uuid.uuid4().hex
        self.accepted = time.monotonic()
        self.deadline = None if deadline is None else self.accepted + deadline
        self.started: float | None = None
        self.opened: float | None = None
        self.stepped: float | None = None
        self.finished: float | None = None
        self._seconds = deadline
        self._step = 0
        self._total = 0
        self._cancelled = False
        self._on_cancel = on_cancel
        self._future = _Result(self)

    @property
    def progress(self) -> Progress:
        return Progress(self._step, self._total)

    def done(self) -> bool:
        """Whether the result, or the error, is there."""
        return self._future.done()

    def cancel(self) -> None:
        """Ask that the job end: at once if it waits, at its next step if it runs. No effect once it is done."""
        if not self.done():
            self._cancelled = True
            self._on_cancel(self)

    def result(self, timeout: float | None = None) -> Any:
        """What the pipeline's call returned.

        Raises TimeoutError after `timeout` seconds, Cancelled, DeadlineExceeded, EngineClosed, or what the call raised.
        """
        self._check_misuse()
        return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error that ended the job, or None."""
        self._check_misuse()
        return self._future.exception(timeout)

    def add_done_callback(self, function: Callable[[Job], None]) -> None:
        """Call `function` with the job once it is done, on the engine's thread; at once if it is."""
        self._future.add_done_callback(lambda _: function(self))

    def __await__(self) -> Generator[Any, None, Any]:
        """Cancelling the task that awaits it cancels the job."""
        return asyncio.wrap_future(self._future).__await__()

    def __repr__(self) -> str:
        state = "done" if self.done() else "waiting" if self.started is None else "running"
        return f"<Job {self.id} {state} {self._step}/{self._total}>"

    def _check_misuse(self) -> None:
        if in_fiber() and not self.done():
            raise EngineMisuse("A job's callback waits for a job of its own engine, which cannot run meanwhile.")

    # By the engine

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if the job must end."""
        if self._cancelled:
            raise Cancelled
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded(f"The job was not done within its deadline of {self._seconds:g} s.")

    def open(self, total: int) -> None:
        """Note that a denoising loop of `total` steps begins."""
        self.opened = self.opened or time.monotonic()
        self._total += total

    def advance(self, steps: int) -> None:
        """Note that denoising steps have run."""
        self._step += steps
        self.stepped = time.monotonic()

    def finish(self, outcome: Any) -> bool:
        """Deliver a result, or an error; False if the job was done already."""
        self.finished = time.monotonic()
        if self._future.done():
            return False
        if isinstance(outcome, BaseException):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
        return True
