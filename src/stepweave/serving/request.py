"""An accepted request, from admission to its image files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepweave.errors import (
    DeadlineExceededError,
    ImageCountError,
    NonFiniteError,
    OutOfMemoryError,
    RequestCancelledError,
    RequestError,
    StepweaveError,
)
from stepweave.images.encode import encode
from stepweave.outcome import Outcome
from stepweave.parameters import Parameters
from stepweave.previews.stream import Partial, Partials
from stepweave.serving.failures import failure_of, loggable, missed
from stepweave.serving.resources import Answer, ErrorDetail, JobView
from stepweave.serving.results import Results
from stepweave.serving.submission import Submission
from stepweave.store.jobs import JobKind, JobState
from stepweave.telemetry.metrics import Metrics
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from stepweave.engine import Job, Latents
    from stepweave.planning.plan import Estimate, QueuePosition
    from stepweave.previews.decoder import Previewer

logger = logging.getLogger(__name__)

PLACE_SECONDS = 0.5  # between two checks of the queue position
WATCH_SECONDS = 1.0  # between two checks whether a job is done
LEAST_ETA = 1e-3  # of unfinished jobs; etas are rounded to as many digits
SILENT_SECONDS = 15.0  # without news, after which `updates` yields None


@dataclass(frozen=True)
class Queued:
    """The queue position, 1 for the first and None once cancelled, and the predicted seconds until
    the job is done."""

    position: int | None
    eta: float | None


@dataclass(frozen=True)
class Progressed:
    """Denoising steps done, of `total`."""

    step: int
    total: int
    eta: float | None


Update = Queued | Progressed | Partial


@dataclass(frozen=True)
class Means:
    """What active requests need of the server."""

    model: str
    metrics: Metrics
    encoders: Executor
    queue_position: Callable[[str], QueuePosition | None]  # of a job, by its id
    leave: Callable[[], None]  # gives the request's place back to admission
    positions: Callable[[int, int], int]  # latent positions, from width and height in pixels
    drawers: Executor  # of previews
    previewer: Previewer | None = None
    scheduler: str | None = None  # the pipeline's own
    pipeline: str = "The pipeline"  # its class
    holds: Callable[[Job], bool] = lambda job: True  # whether the engine has the job
    answer_seconds: float = 600.0  # from the end of a job to its answer, at most
    refuse_flagged: bool = False  # whether flagged images are refused


class ActiveRequest:
    """An accepted request, and the engine's observer of its job; all other methods are for the
    event loop.

    Clients that wait for it hold it (`held`); when the last one lets go, the job is cancelled
    unless it is `detached`.
    """

    def __init__(
        self, submission: Submission, parameters: Parameters, means: Means, warnings: Iterable[str]
    ) -> None:
        request, previews = submission.request, submission.previews
        self.request = request
        self.parameters = parameters
        self.created = time.time()
        self.detached = submission.detached
        self.response_format = submission.response_format  # if the result is fetched later
        self.warnings = list(warnings)  # of the request; the job has those of its prompts
        self.error: StepweaveError | None = None
        self.kept = False  # whether `Jobs` stores it, and then gives its place back
        # stores the result and returns the job's error, if `kept`
        self.keeping: asyncio.Task[StepweaveError | None] | None = None
        self._means = means
        self._results = Results(request, parameters, means)
        self._partials: Partials | None = None
        if means.previewer is not None and previews:
            self._partials = Partials(
                means.previewer,
                previews,
                parameters,
                lambda image: encode(image, request.output_format, None, ""),
                means.drawers,
                self._notify,
            )
        self._placed = True
        self._holders = 0
        self._given_up = False
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._reason: StepweaveError | None = None
        self._job: Job | None = None
        self._expected: Estimate | None = None
        self._timed = True
        self._task: asyncio.Task[Answer | None] | None = None
        self._over: float | None = None  # when `_watch` first saw that the job is done
        self._overdue = False
        self._watching: asyncio.TimerHandle | None = None

    def begin(self, job: Job, expected: Estimate | None = None, *, timed: bool = True) -> None:
        """Wait for a job; `expected` is its estimate, `timed` is whether any job was timed."""
        self._job = job
        self._expected, self._timed = expected, timed
        due = None if expected is None else time.monotonic() + expected.finish
        self._task = asyncio.create_task(self._run(due))
        self._watch()

    @property
    def job(self) -> Job:
        assert self._job is not None
        return self._job

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def kind(self) -> JobKind:
        return "generation" if self.parameters.sources is None else "edit"

    @property
    def done(self) -> bool:
        return self._task is not None and self._task.done()

    @property
    def state(self) -> JobState:
        if self.done:
            return Outcome(error=self.error).end
        return "queued" if self.job.begun is None else "running"

    @property
    def all_warnings(self) -> list[str]:
        """Warnings so far, about the request, its prompts and its images."""
        return [*self.warnings, *self.job.warnings, *self._results.warnings]

    @property
    def lost(self) -> bool:
        """Whether it failed, was cancelled or is being cancelled."""
        return self.error is not None or (self._given_up and not self.done)

    @property
    def steps(self) -> int:
        """Denoising steps, as far as they are known."""
        return self.job.progress.total or self.parameters.num_inference_steps

    def latest(self) -> Queued | Progressed:
        """The present queue position or progress."""
        position = self._means.queue_position(self.id)
        eta = None if position is None else position.eta
        if position is not None and position.position:
            return Queued(position.position, _rounded(eta))
        if self.job.begun is None:
            return Queued(None, None)
        eta = self._pace() if eta is None else eta
        return Progressed(self.job.progress.step, self.steps, _rounded(eta))

    def _pace(self) -> float | None:
        """Seconds of the remaining steps at the job's own pace, if there is no other estimate."""
        job, (step, total) = self.job, self.job.progress
        if job.opened is None or job.stepped is None or not step:
            return None
        left = (total - step) * (job.stepped - job.opened) / step
        return max(0.0, left - (time.monotonic() - job.stepped))

    def view(self) -> JobView:
        """The job's present state without its result; state and position are consistent."""
        latest = None if self.done else self.latest()
        queued = latest if isinstance(latest, Queued) else None
        return JobView(
            id=self.id,
            kind=self.kind,
            state=self.state if latest is None else "queued" if queued else "running",
            step=self.job.progress.step,
            total_steps=self.steps,
            position=queued and queued.position,
            eta_seconds=None if latest is None else latest.eta,
            created=self.created,
            parameters=self._results.resolved(),
            warnings=self.all_warnings,
            error=None if self.error is None else ErrorDetail.of(self.error),
        )

    def cancel(self, reason: StepweaveError | None = None) -> None:
        """Cancel the job at its next step, with `reason`. No effect once it is done."""
        self._reason = self._reason or reason
        self._given_up = True
        if self._partials is not None:
            self._partials.end()
        self.job.cancel()

    def ended(self) -> asyncio.Future[Any]:
        """A future that is done when the request is; do not cancel it."""
        assert self._task is not None
        return self._task

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the request within the block."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self.let_go()

    def let_go(self) -> None:
        """Cancel the job if no client holds the request and it is not detached."""
        if not self._holders and not self.detached:
            self.cancel()

    async def result(self) -> Answer:
        """Wait for the answer; cancelling that does not cancel the job. Raises the job's error."""
        assert self._task is not None
        await asyncio.wait({self._task})
        if self.error is not None:
            raise self.error.again()
        answer = self._task.result()
        assert answer is not None
        return answer

    async def updates(self, *, progress: bool = True) -> AsyncIterator[Update | None]:
        """Yield all previews, and with `progress` changes of queue position and progress, until the
        job is done; None after `SILENT_SECONDS` without any."""
        last: tuple[Any, ...] = ()
        seen = 0
        yielded = time.monotonic()
        while True:
            changed, done = self._changed, self.done
            for partial in self._partials.made[seen:] if self._partials is not None else ():
                seen, yielded = seen + 1, time.monotonic()
                yield partial
            if done:
                return
            latest = self.latest()
            place = (
                (latest.position,) if isinstance(latest, Queued) else (latest.step, latest.total)
            )
            if progress and place not in (last, (None,)):
                last, yielded = place, time.monotonic()
                yield latest
            elif time.monotonic() - yielded >= SILENT_SECONDS:
                yielded = time.monotonic()
                yield None
            wait = yielded + SILENT_SECONDS - time.monotonic()
            if progress and isinstance(latest, Queued):
                wait = min(wait, PLACE_SECONDS)
            with contextlib.suppress(TimeoutError):
                # wait_for of Python 3.11 may lose a cancellation
                async with asyncio.timeout(wait):
                    await changed.wait()

    # On the engine's threads

    def wants(self, step: int, total: int) -> bool:
        """Whether a preview is due after this step."""
        return self._partials is not None and self._partials.wants(step, total)

    def progressed(self, job: Job) -> None:
        self._tell(self._notify)

    def denoised(self, job: Job, latents: Latents) -> None:
        if self._partials is not None:
            self._tell(self._partials.begin, latents)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *args)

    # On the event loop

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def leave(self) -> None:
        """Give the place back to admission; no effect when repeated."""
        if self._placed:
            self._placed = False
            self._means.leave()

    def _watch(self) -> None:
        """Fail the request, to free its place, if its job has been done for `answer_seconds`."""
        if self.done:
            return
        now, limit = time.monotonic(), self._means.answer_seconds
        if self._over is None and (
            self.job.finished is not None or not self._means.holds(self.job)
        ):
            self._over = now
        if self._over is not None and now - self._over >= limit:
            assert self._task is not None
            self._overdue = True
            self._task.cancel()
        self._watching = self._loop.call_later(min(WATCH_SECONDS, limit), self._watch)

    async def _run(self, due: float | None) -> Answer | None:
        """The answer; None if it fails, with `error` set."""
        answer = None
        try:
            answer = await self._answer(due)
        except (Exception, asyncio.CancelledError) as error:
            self.error = StepweaveError("The generation failed.", code="generation_failed")
            self.error = self._told(error)
        finally:
            if not self.kept:
                self.leave()
            if self._partials is not None:
                self._partials.end()
            if self._watching is not None:
                self._watching.cancel()
            self._tell(self._notify)
            Outcome(error=self.error).let_go()
            del self  # which the error's traceback would hold
        return answer

    async def _answer(self, due: float | None) -> Answer:
        job, metrics = self.job, self._means.metrics
        output = await self._output()
        metrics.generated(job, due)
        # not on the loop: what a pipeline returns may run code of its own
        generation = await on_thread(self._means.encoders, self._results.of, output, job)
        if self._partials is not None:
            await self._partials.settle()
        files = await self._results.encode(generation)
        generation.timings.total = time.monotonic() - self._began
        metrics.request_seconds.observe(generation.timings.total)
        details = self._results.details(generation, job, self.steps, self.all_warnings)
        return Answer(details, files)

    def _told(self, error: BaseException) -> StepweaveError:
        """The client's error for an exception that ended the request."""
        if self._overdue:
            limit = self._means.answer_seconds
            logger.error(
                "%r, %s: not answered within %g s of the job's end (STEPWEAVE_STUCK_SECONDS); it "
                "fails as not_delivered",
                self.job,
                loggable(self.parameters),
                limit,
            )
            message = f"The images were made, but not delivered within {limit:g} s."
            return StepweaveError(message, code="not_delivered")
        if isinstance(error, asyncio.CancelledError):  # the loop is closing
            return RequestCancelledError()
        special = self.parameters.arguments or self.parameters.lora
        if isinstance(error, (NonFiniteError, ImageCountError)) and special:
            return failure_of(error, self.job, self.parameters)
        if isinstance(error, NonFiniteError):
            logger.warning(
                "%r, %s: the result has NaN or infinite values; the request fails as non_finite",
                self.job,
                loggable(self.parameters),
            )
            self._means.metrics.images.labels("non_finite").inc(self.parameters.n)
        if isinstance(error, (RequestError, OutOfMemoryError, NonFiniteError, ImageCountError)):
            late = isinstance(error, DeadlineExceededError)
            if late or isinstance(error, RequestCancelledError) or error is self._reason:
                self._means.metrics.steps_saved.inc(max(0, self.steps - self.job.progress.step))
            if not late:
                return error
            deadline_ms = self.request.deadline_ms
            return missed(deadline_ms, self.job, self.steps, self._expected, timed=self._timed)
        return failure_of(error, self.job, self.parameters)

    async def _output(self) -> Any:
        try:
            return await self.job
        except RequestCancelledError:
            if self._reason is not None:
                raise self._reason from None
            raise
        except DeadlineExceededError:
            self._means.metrics.deadline_missed.inc()
            raise


def _rounded(eta: float | None) -> float | None:
    """An eta for clients: never 0 while the job is not done."""
    return None if eta is None else max(LEAST_ETA, round(eta, 3))
