"""The server behind every HTTP surface: what takes requests for images."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stepweave.errors import NoImagesError
from stepweave.images.encode import check_file
from stepweave.parameters import ImageRequest, Parameters, Sources
from stepweave.planning.plan import Estimate
from stepweave.serving.admission import Reservation
from stepweave.serving.lifecycle import Lifecycle
from stepweave.serving.request import ActiveRequest, Means
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from stepweave.engine import StepEngine
    from stepweave.serving.model import ServedModel
    from stepweave.store import FileStore

UNCHECKED_DEADLINE = "deadline_ms could not be checked beforehand: no forecast was ready."
UNFORESEEN_DEADLINE = (
    "deadline_ms could not be checked beforehand: nothing of this model had been timed yet."
)


class Server(Lifecycle):
    """A server that takes requests: what every HTTP surface calls.

    One model, one engine, one set of metrics; see `Lifecycle` for its arguments, and for how it
    loads and ends.
    """

    @property
    def files(self) -> FileStore:
        """Where image files are kept. Raises UnavailableError before the server has started."""
        if self.jobs is None:
            raise self.unavailable()
        return self.jobs.files

    def ready(self, reservation: Reservation | None = None) -> tuple[ServedModel, StepEngine]:
        """The model and its engine, also within the notice of a drain, and after it for a request
        that holds a place since then.

        Raises UnavailableError while there are none.
        """
        leaving = self.leaving
        accepted = reservation is not None and reservation.held
        if (
            self.model is None
            or self.engine is None
            or self.status.stage != "ready"
            or self.engine.failure is not None
            or (leaving.ended if accepted else leaving.refusing)
        ):
            raise self.unavailable()
        return self.model, self.engine

    def named(self, model: str, *, param: str | None = None) -> ServedModel:
        """The model of that name. Raises NotFoundError, about `param`, if it is none of the served
        one's, and UnavailableError."""
        served, _ = self.ready()
        served.names.check(model, param)
        return served

    async def accept(
        self,
        request: ImageRequest,
        *,
        n: int = 1,
        model: str | None = None,
        strength: float | None = None,
        sources: Sources | None = None,
        previews: int = 0,
        warnings: Sequence[str] = (),
        client: Hashable = None,
        reservation: Reservation | None = None,
    ) -> ActiveRequest:
        """Let a request in, and have the engine begin with it.

        `sources` and `strength` are an edit's. `previews` are as many as are wanted on the way;
        `warnings` go before those that come with the prompts. `client` is who asks, to whom a place
        is promised if there is none; `reservation` what it has reserved. Raises UnavailableError,
        NotFoundError if `model` is given and not the one served, AdmissionError or
        DeadlineTooShortError if admission does not let it in, and what `ServedModel.resolve`
        raises.
        """
        began = time.monotonic()
        served, _ = self.ready(reservation)
        admission = self._admission
        assert admission is not None
        if model is not None:
            served.names.check(model, "model")
        parameters = served.resolve(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            size=request.size,
            n=n,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            reproducible=request.reproducible,
            scheduler=request.scheduler,
            strength=strength,
            sources=sources,
            rehearse=False,
        )
        if served.knows_steps(parameters):
            served.check_steps(parameters)
        else:
            await on_thread(None, served.check_steps, parameters)
        check_file(
            request.output_format, request.output_compression, parameters.width, parameters.height
        )
        # an edit's images are brought to its size
        edit = sources is not None
        call, images_hash = (
            await on_thread(None, _prepare, served, parameters)
            if edit
            else _prepare(served, parameters)
        )
        token = hash((request.model_dump_json(), n, strength, images_hash))
        ready = self.ready(reservation)
        enter = partial(admission.enter, token, client=client, reservation=reservation)
        active = self._enter_engine(ready, request, parameters, call, enter, previews, began)
        active.warnings.extend([*warnings, *(() if sources is None else sources.warnings)])
        return active

    @property
    def places(self) -> int:
        """Requests that may be in flight at a time. Raises UnavailableError before the server is
        ready."""
        if self._admission is None:
            raise self.unavailable()
        return self._admission.limit

    def reserve(self, token: Hashable, client: Hashable, *, joins: bool = False) -> Reservation:
        """See `Admission.reserve`. Raises what `accept` would if there is no place."""
        if not joins:  # what it joins may be served though the server takes nothing new
            self.ready()
        if self._admission is None:
            raise self.unavailable()
        return self._admission.reserve(token, client, joins=joins)

    def _enter_engine(
        self,
        ready: tuple[ServedModel, StepEngine],
        request: ImageRequest,
        parameters: Parameters,
        call: dict[str, Any],
        enter: Callable[..., Estimate | None],
        previews: int,
        began: float,
    ) -> ActiveRequest:
        served, engine = ready
        admission = self._admission
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
        active = ActiveRequest(request, parameters, means, previews)
        deadline = None if request.deadline_ms is None else request.deadline_ms / 1000
        arguments: dict[str, Any] = {**call, "reproducible": parameters.reproducible}
        options: dict[str, Any] = {**arguments, "priority": request.priority}
        timed = engine.timed
        expected = enter(
            estimate=lambda: engine.estimate(**options, deadline=deadline),
            deadline=deadline,
            alone=lambda: engine.alone(**arguments),
        )
        try:
            left = None if deadline is None else max(1e-3, deadline - (time.monotonic() - began))
            active.begin(
                engine.submit(**options, deadline=left, observer=active), expected, timed=timed
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
        """Forget a request that is over; where the first ever gave no image, serve no more."""
        self.active.pop(active.id, None)
        if active.error is None:
            self._has_images = True
        elif (
            isinstance(active.error, NoImagesError)
            and not self._has_images
            and self.status.stage == "ready"
        ):
            self._fail(active.error.message)


def _prepare(served: ServedModel, parameters: Parameters) -> tuple[dict[str, Any], Hashable]:
    """The engine's arguments, and what tells an edit's images from others."""
    sources = parameters.sources
    images = () if sources is None else (sources.image, sources.mask)
    return served.call(parameters), hash(
        tuple(image.tobytes() for image in images if image is not None)
    )
