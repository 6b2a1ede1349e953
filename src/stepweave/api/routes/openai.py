"""OpenAI's API: images (generations and edits, at once, as a stream, or as jobs) and models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stepweave.api.answer_schemas import (
    Model,
    ModelArgument,
    ModelComponent,
    ModelDetails,
    ModelEmbedding,
    ModelImage,
    ModelList,
)
from stepweave.api.answers import (
    PROFILE,
    check_one_image,
    generation_of,
    image_answer,
    job_accepted,
    wants_image,
    wants_stream,
    wants_to_come_back,
)
from stepweave.api.bodies import pass_over_body
from stepweave.api.context import context_of
from stepweave.api.disconnect import until_disconnect
from stepweave.api.events import EventStream, events
from stepweave.api.forms import (
    Form,
    edit_of,
    place_for,
    read_form,
    read_json,
    reserve,
)
from stepweave.api.idempotency import submission_of
from stepweave.api.model_fields import with_fields
from stepweave.api.responses import answer, json_answer
from stepweave.api.routes.loras import described_loras
from stepweave.api.schemas import (
    EditBody,
    EditRequest,
    GenerationRequest,
    OpenAIRequest,
    is_json,
    parse_form_off_loop,
    require_form,
    require_json,
)
from stepweave.api.urls import base_url, reference
from stepweave.calls import CONTROL_IMAGE, has_scalar, takes_lists
from stepweave.config.components import GUIDES, IP_ADAPTER
from stepweave.errors import InvalidRequestError
from stepweave.serving.admission import Reservation
from stepweave.serving.kinds import IP_ADAPTER_IMAGE, TEXT_TO_IMAGE
from stepweave.serving.server import Server

if TYPE_CHECKING:
    from stepweave.serving.model import ServedModel

NO_STREAM = "partial_images: it has no effect without stream."


class OpenAIRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/images/variations", self.variations, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{id:path}", self.model, methods=["GET"]),
        ]

    async def generations(self, request: Request) -> Response:
        require_json(request.headers.get("content-type", ""))
        body, form = await read_json(request, self.server, GenerationRequest)
        with form, await place_for(request, self.server, form) as place:
            return await self._answer(request, body, form if form.files else None, place)

    async def edits(self, request: Request) -> Response:
        content_type = request.headers.get("content-type", "")
        in_json = is_json(content_type)
        if not in_json:
            require_form(content_type)
        body: EditRequest
        with await reserve(request, self.server) as place:
            fields = self.server.fields
            if in_json:
                body, form = await read_json(request, self.server, EditBody, place)
            else:
                form = await read_form(request, fields)
            with form:
                place.settle()
                if not in_json:
                    schema = with_fields(EditRequest, fields, files=False)
                    body = await parse_form_off_loop(form.texts, schema)
                return await self._answer(request, body, form, place)

    async def variations(self, request: Request) -> Response:
        """OpenAI has retired variations, but its clients still have the call."""
        # else the client may fail while it sends the body, before it reads the answer
        await pass_over_body(request)
        raise InvalidRequestError(
            "There are no variations here: send the image to /v1/images/edits, with a prompt and a "
            "strength.",
            code="unsupported",
        )

    async def _answer(
        self,
        request: Request,
        body: OpenAIRequest,
        form: Form | None = None,
        place: Reservation | None = None,
    ) -> Response:
        """`form` and `place` are an edit's."""
        server = self.server
        served, _ = server.ready(place)
        jobs = server.jobs
        assert jobs is not None
        detached, stream = wants_to_come_back(request), wants_stream(request)
        streams = body.stream or stream is not None
        image_format = None if detached or streams else wants_image(request)
        if image_format is not None:
            check_one_image(
                body.n, image_format, body.output_format, "output_format" in body.model_fields_set
            )
            body = body.model_copy(update={"output_format": image_format})
        response_format = body.response_format or server.settings.response_format
        linked = response_format == "url" and (
            image_format is None or body.response_format is not None
        )
        base = base_url(request, server.settings) if linked else None
        of_edit: dict[str, Any] = {}
        if form is not None:
            of_edit = await edit_of(form, server, body, place)
        may_be_joined = detached or "idempotency-key" in request.headers
        submission = submission_of(
            request,
            body,
            n=body.n,
            model=body.model or None,  # empty is absent
            previews=body.partial_images if streams or may_be_joined else 0,
            response_format=response_format,
            detached=detached,
            **of_edit,
            warnings=(
                *body.ignored(),
                *served.doubts(body.model or None),
                *((NO_STREAM,) if body.partial_images and not (streams or may_be_joined) else ()),
                *(() if form is None else form.warnings),
            ),
        )
        if detached:
            job = await server.submit(submission)
            headers = {
                "Location": reference(request, server.settings, f"/v1/jobs/{job.id}"),
                "Preference-Applied": "respond-async",
            }
            count = context_of(request.scope).count
            assert count is not None
            count.job = job
            return await json_answer(await job_accepted(job, jobs.files, base), headers, 202)
        if streams:
            job = await until_disconnect(request, server.submit(submission))
            verbose = body.events == "all" or (stream or {}).get("profile") == PROFILE
            told = events(job, request, jobs.files, verbose=verbose, base=base)
            return EventStream(request, job, told, {"X-Stepweave-Job": job.id})
        made = await until_disconnect(request, server.generate(submission))
        if image_format is not None:
            return image_answer(made)
        return await json_answer(await generation_of(made, base, jobs.files))

    async def models(self, request: Request) -> Response:
        return answer(ModelList(data=[self._described(), *await described_loras(self.server)]))

    async def model(self, request: Request) -> Response:
        id = request.path_params["id"]
        loras = {one.root: one for one in await described_loras(self.server)}
        lora = self.server.ready()[0].named(id)
        # another request may have removed it meanwhile
        return answer(self._described() if lora is None else loras.get(lora) or self._described())

    def _described(self) -> Model:
        model, engine = self.server.ready()
        settings, stats = self.server.settings, engine.stats()
        details = ModelDetails(
            pipeline=model.pipeline_class,
            device=self.server.device,
            dtype=self.server.dtype,
            native_size=f"{model.width}x{model.height}",
            **model.limits.as_json(),
            max_pixels=settings.max_pixels,
            max_input_pixels=settings.max_input_pixels,
            default_num_inference_steps=model.default_steps,
            max_num_inference_steps=settings.max_steps,
            default_guidance_scale=model.default_guidance,
            presets=model.preset.sources(),
            schedulers=sorted(model.schedulers),
            schedulers_of_edits=model.schedulers_of_edits,
            scheduler_steps=model.scheduler_steps,
            arguments=_arguments(model),
            images=_images(model),
            components=_components(model),
            prompt=model.fields.prompt,
            embeddings=[
                ModelEmbedding(token=embedding.token, vectors=embedding.vectors)
                for embedding in model.embeddings
            ],
            generations=model.kind.task == TEXT_TO_IMAGE,
            edits=model.edits,
            limits_of_edits={
                name: limits.as_json()
                for name, limits in model.limits_of_edits.items()
                if limits != model.limits
            },
            previews=self.server.previewer is not None,
            batching=engine.mode,
            switches=settings.optimizations(),
            certificates=stats.certificates,
            unshared=stats.unshared,
        )
        return Model(id=model.id, created=self.server.created, stepweave=details)


def _arguments(model: ServedModel) -> list[ModelArgument]:
    found = []
    for name, field in model.fields.arguments.items():
        argument, bounds = field.argument, field.bounds
        texts = has_scalar(argument.value, str)
        numbers = argument.type in ("integer", "number", "array", "tensor") and not texts
        found.append(
            ModelArgument(
                name=name,
                type=argument.type,
                required=name in model.fields.needs,
                default=model.preset.call.get(name, argument.default),
                minimum=bounds.least if numbers else None,
                maximum=bounds.most if numbers else None,
                max_items=bounds.length if takes_lists(argument.value) else None,
                max_length=bounds.characters if texts else None,
                description=argument.description,
            )
        )
    return found


def _components(model: ServedModel) -> list[ModelComponent]:
    found = []
    images = {IP_ADAPTER: IP_ADAPTER_IMAGE, **dict.fromkeys(GUIDES, CONTROL_IMAGE)}
    for field, components in model.pipelines.components().items():
        for name, one in components.items():
            tasks = model.pipelines.tasks_of(field, name)
            found.append(
                ModelComponent(
                    name=name,
                    field=field,
                    model=type(one.model).__name__,
                    image=images.get(field),
                    edits=[task for task in model.edits if task in tasks],
                    generations=TEXT_TO_IMAGE in tasks,
                    default=one.default,
                    description=one.description,
                )
            )
    return found


def _images(model: ServedModel) -> list[ModelImage]:
    fields, needs = model.fields, model.needs_images
    return [
        ModelImage(
            name=name,
            type="mask" if argument.type == "mask" else "image",
            required=name in needs,
            several=name in fields.several,
            description=argument.description,
        )
        for name, argument in fields.files.items()
    ]
