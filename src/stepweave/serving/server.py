"""The server behind every HTTP surface: it accepts requests for images."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from stepweave.calls import NONE, RequestFields, SentTensor
from stepweave.errors import NoImagesError
from stepweave.images.encode import check_file
from stepweave.parameters import Parameters
from stepweave.serving.admission import Reservation
from stepweave.serving.jobs import Followed
from stepweave.serving.lifecycle import Lifecycle
from stepweave.serving.request import ActiveRequest, Means
from stepweave.serving.resources import Answer
from stepweave.serving.submission import Submission
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from stepweave.engine import StepEngine
    from stepweave.serving.model import ServedModel
    from stepweave.store import FileStore

LOOK_SECONDS = 3.0  # how long requests wait for a look at the directory of LoRAs
UNCHECKED_DEADLINE = "deadline_ms was not checked at admission: there was no estimate."
UNFORESEEN_DEADLINE = (
    "deadline_ms was not checked at admission: no job of this model had been timed yet."
)


class Server(Lifecycle):
    """Accepts requests for one model on one engine; the arguments are those of `Lifecycle`."""

    @property
    def files(self) -> FileStore:
        """The store of image files. Raises UnavailableError before the server has started."""
        if self.jobs is None:
            raise self.unavailable()
        return self.jobs.files

    def ready(self, reservation: Reservation | None = None) -> tuple[ServedModel, StepEngine]:
        """The model and its engine. Raises UnavailableError if the server is not ready, or once
        the notice of a drain is over, unless the request holds a place since before."""
        leaving = self.leaving
        accepted = reservation is not None and reservation.held
        if (
            self.model is None
            or self.engine is None
            or not self.status.ready
            or self.engine.failure is not None
            or (leaving.ended if accepted else leaving.refusing)
        ):
            raise self.unavailable()
        return self.model, self.engine

    @property
    def fields(self) -> RequestFields:
        """What requests to the model may have beside the fields of every model."""
        return NONE if self.model is None else self.model.fields

    def named(self, model: str, *, param: str | None = None) -> ServedModel:
        """The model. Raises NotFoundError about `param` for another name, and UnavailableError."""
        served, _ = self.ready()
        served.named(model, param)
        return served

    async def look_for_loras(self) -> None:
        """Have the model know the LoRAs that there are now, or were when the directory could last
        be read: it may be on a network, so it is not read on the event loop."""
        if self.model is not None and self.model.loras is not None:
            loras = self.model.loras
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await on_thread(loras.looker, loras.look, time.monotonic())

    async def submit(self, submission: Submission) -> Followed:
        """Submit a request; returns its job, or the earlier job of its idempotency key. A place
        reserved in vain is given back. Raises what `accept` and `Jobs.start` do."""
        if self.jobs is None:
            raise self.unavailable()
        try:
            return await self.jobs.start(submission, partial(self.accept, submission))
        finally:
            if submission.reservation is not None:
                submission.reservation.release()

    async def generate(self, submission: Submission) -> Answer:
        """Submit a request and wait for its images; cancelling the wait lets go of the job."""
        job = await self.submit(submission)
        with job.held():
            return await job.result()

    async def accept(self, submission: Submission) -> ActiveRequest:
        """Admit a request and submit its job to the engine.

        Raises UnavailableError, NotFoundError if it names another model, AdmissionError or
        DeadlineTooShortError if admission refuses it, and what its `sources` and
        `ServedModel.resolve` raise.
        """
        sources = None if submission.sources is None else await submission.sources()
        began = time.monotonic()
        request = submission.request
        served, _ = self.ready(submission.reservation)
        if served.may_name_lora(request, submission.model):
            await self.look_for_loras()
        parameters = served.resolve(
            request,
            n=submission.n,
            strength=submission.strength,
            sources=sources,
            model=submission.model,
            rehearse=False,
        )
        if served.knows_steps(parameters):
            served.check_steps(parameters)
        else:
            await on_thread(None, served.check_steps, parameters)
        check_file(
            request.output_format, request.output_compression, parameters.width, parameters.height
        )
        if sources is None and not any(
            isinstance(value, SentTensor) for value in parameters.arguments.values()
        ):
            call = served.call(parameters)
        else:  # resizes images, and copies tensors
            call = await on_thread(None, served.call, parameters)
        return self._enter_engine(submission, parameters, call, began)

    @property
    def places(self) -> int:
        """The limit of requests in flight. Raises UnavailableError before the server is ready."""
        if self._admission is None:
            raise self.unavailable()
        return self._admission.limit

    def reserve(self, token: Hashable, client: Hashable, *, joins: bool = False) -> Reservation:
        """See `Admission.reserve`. Raises UnavailableError, and AdmissionError."""
        if not joins:  # it may join a job even if new ones are refused
            self.ready()
        if self._admission is None:
            raise self.unavailable()
        return self._admission.reserve(token, client, joins=joins)

    def _enter_engine(
        self,
        submission: Submission,
        parameters: Parameters,
        call: dict[str, Any],
        began: float,
    ) -> ActiveRequest:
        served, engine = self.ready(submission.reservation)
        request, sources, admission = submission.request, parameters.sources, self._admission
        assert admission is not None
        means = Means(
            model=served.id,
            metrics=self.metrics,
            encoders=self._encoders,
            queue_position=engine.queue_position,
            leave=admission.leave,
            positions=served.latent_positions,
            drawers=self._drawers,
            previewer=self.previewer,
            scheduler=served.scheduler,
            pipeline=served.pipeline_class,
            holds=engine.holds,
            answer_seconds=self.settings.stuck_seconds,
            refuse_flagged=self.settings.flagged_images == "refuse",
        )
        warnings = [
            *submission.warnings,
            *(() if sources is None else sources.warnings),
            *served.warnings_of(request, parameters),
        ]
        active = ActiveRequest(submission, parameters, means, warnings)
        deadline = None if request.deadline_ms is None else request.deadline_ms / 1000
        arguments: dict[str, Any] = {
            **call, "reproducible": parameters.reproducible, "lora": parameters.lora,
        }  # fmt: skip
        options: dict[str, Any] = {**arguments, "priority": request.priority}
        timed = engine.timed
        expected = admission.enter(
            submission.fingerprint,
            client=submission.client,
            reservation=submission.reservation,
            estimate=lambda: engine.estimate(**options, deadline=deadline),
            deadline=deadline,
            alone=lambda: engine.alone(**arguments),
        )
        try:
            left = None if deadline is None else max(1e-3, deadline - (time.monotonic() - began))
            active.begin(
                engine.submit(**options, deadline=left, observer=active),
                expected,
                timed=timed,
            )
        except BaseException:
            admission.leave()
            raise
        if deadline is not None and expected is None:
            active.warnings.append(UNCHECKED_DEADLINE if timed else UNFORESEEN_DEADLINE)
        self.active[active.id] = active
        active.ended().add_done_callback(lambda _: self._over(active))
        return active

    def _over(self, active: ActiveRequest) -> None:
        """Forget a finished request; if the first one ever made no image, stop serving."""
        self.active.pop(active.id, None)
        if active.error is None:
            self._has_images = True
        elif isinstance(active.error, NoImagesError) and not self._has_images and self.status.ready:
            self._fail(active.error.message)
