"""The Open Inference Protocol v2, as clients of KServe and Triton use it.

Each element of the input `prompt` is one image, a generation of its own; an optional input has
one element for all of them, or one each. A value for all may also be in the request's `parameters`.
Images to start from are inputs of BYTES, files in binary data or base64 in JSON; with a second
dimension there are several for each image.
The output `image` has files, in JSON as base64; the output `parameters` has a JSON text for each
image: all parameters as resolved, and warnings.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Collection, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stepweave import __version__
from stepweave.api import answer_schemas as bodies
from stepweave.api.bodies import whole_body
from stepweave.api.disconnect import until_disconnect
from stepweave.api.forms import edit_of, form_of_bytes
from stepweave.api.idempotency import submission_of
from stepweave.api.open_inference.requests import (
    OUTPUTS,
    EditOrGeneration,
    accepted_inputs,
    as_sent,
    file_inputs,
    ignored_parameters,
    image_requests,
    of_element,
    parameters_of,
    requested_outputs,
    required_inputs,
)
from stepweave.api.open_inference.tensors import (
    HEADER_LENGTH,
    IndexRequest,
    InferenceRequest,
    OutputTensor,
    read_inputs,
    read_message,
    write_message,
)
from stepweave.api.open_inference.triton import EXTENSIONS, configuration, index, unsupported
from stepweave.api.responses import answer, error_response
from stepweave.api.schemas import parse_off_loop, require_json
from stepweave.errors import InvalidRequestError, NotFoundError, StepweaveError, shown
from stepweave.parameters import MEDIA_TYPES
from stepweave.serving.server import Server
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from stepweave.serving.model import ServedModel
    from stepweave.serving.resources import Answer
    from stepweave.serving.submission import Submission

VERSION = "1"  # of the model: it is replaced with the process
OTHER_TYPES = ("", "application/octet-stream")

T = TypeVar("T")


class OpenInferenceRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        model = "/v2/models/{model:path}"
        paths = (f"{model}/versions/{{version}}", model)
        return [
            Route("/v2", self.metadata, methods=["GET"]),
            Route("/v2/models", self.models, methods=["GET"]),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            *(Route(f"{path}/infer", self.infer, methods=["POST"]) for path in paths),
            *(Route(f"{path}/config", self.configuration, methods=["GET"]) for path in paths),
            *(Route(f"{path}/ready", self.model_ready, methods=["GET"]) for path in paths),
            *(Route(path, self.model_metadata, methods=["GET"]) for path in paths),
        ]

    async def metadata(self, request: Request) -> Response:
        return answer(bodies.ProtocolMetadata(version=__version__, extensions=EXTENSIONS))

    async def models(self, request: Request) -> Response:
        """As KServe's servers list theirs."""
        model, _ = self.server.ready()
        return answer(bodies.ServedModels(models=[model.id]))

    async def index(self, request: Request) -> Response:
        """The body may be empty, and any content type will do: Triton's client sends neither."""
        async with whole_body(request) as body:
            asked = await parse_off_loop(body or b"{}", IndexRequest)
        model = self.server.model
        if model is None:
            raise self.server.unavailable()
        unready = None if self.server.health().ready else self.server.unavailable().message
        return answer(index(model.id, VERSION, unready, bool(asked.ready)))

    async def configuration(self, request: Request) -> Response:
        model = await self._model(request)
        accepted = accepted_inputs(model.arguments, model.fields)
        required = required_inputs(model.fields)
        return answer(configuration(model.id, _platform(model), accepted, required, OUTPUTS))

    async def live(self, request: Request) -> Response:
        if not self.server.alive():
            return error_response(self.server.unavailable(), request.scope["path"], bodies.NotLive)
        return answer(bodies.Live())

    async def ready(self, request: Request) -> Response:
        if not self.server.health().ready:
            return error_response(self.server.unavailable(), request.scope["path"], bodies.NotReady)
        return answer(bodies.Ready())

    async def model_ready(self, request: Request) -> Response:
        model = await self._model(request)
        if not self.server.health().ready:
            raise self.server.unavailable()
        return answer(bodies.ModelReady(name=model.id))

    async def model_metadata(self, request: Request) -> Response:
        model = await self._model(request)
        accepted = accepted_inputs(model.arguments, model.fields)
        metadata = bodies.ModelMetadata(
            name=model.id,
            versions=[VERSION],
            platform=_platform(model),
            inputs=[
                bodies.TensorMetadata(name=name, datatype=datatypes[0], shape=[-1])
                for name, datatypes in accepted.items()
            ],
            outputs=[
                bodies.TensorMetadata(name=name, datatype="BYTES", shape=[-1]) for name in OUTPUTS
            ],
        )
        return answer(metadata)

    async def infer(self, request: Request) -> Response:
        model = await self._model(request)
        require_json(request.headers.get("content-type", ""), *OTHER_TYPES)
        async with whole_body(request, text=False) as body:
            # off the loop: a body may be long
            message, images = await on_thread(None, self._read, request, body, model)
        outputs = requested_outputs(message)
        doubts = model.doubts(request.path_params["model"])
        warnings = (*doubts, *ignored_parameters(message, model.fields))
        asked = "\n".join(image.model_dump_json(exclude_none=True) for image, _ in images)
        submissions = []
        for i, (image, files) in enumerate(images):
            form = form_of_bytes(files, model.fields)
            edit = await edit_of(form, self.server, image, None) if files else {}
            submissions.append(
                submission_of(
                    request,
                    image,
                    part=i,
                    model=request.path_params["model"],  # which may name a LoRA
                    asked=asked,
                    warnings=warnings,
                    **edit,
                )
            )
        several = {one.name for one in message.inputs if one.shape[0] > 1}
        work = [self._generate(one, i, several) for i, one in enumerate(submissions)]
        try:
            answers = await until_disconnect(request, together(work))
        except StepweaveError as error:
            raise as_sent(error, message, images[0][0]) from None
        content, length = await on_thread(None, _write, message, outputs, answers)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(
            content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)}
        )

    async def _generate(
        self, submission: Submission, element: int, several: Collection[str]
    ) -> Answer:
        """The image of an element of the tensors that have `several`. Errors about one say so."""
        try:
            return await self.server.generate(submission)
        except (InvalidRequestError, NotFoundError) as error:  # the latter of a LoRA
            raise of_element(error, element, several) from None

    async def _model(self, request: Request) -> ServedModel:
        """The model that the path names. Raises NotFoundError if it or its version is not the one
        that is served."""
        name, path = request.path_params["model"], request.scope["path"]
        served, _ = self.server.ready()
        # the route also matches what is below a model, and the name `*` allows any
        if name not in served.names.listed:
            if path.endswith("/infer") and request.method != "POST":
                raise HTTPException(405, headers={"Allow": "POST"})
            if (reason := unsupported(path)) is not None:
                raise reason
            if name.startswith(tuple(f"{listed}/" for listed in served.names.listed)):
                raise NotFoundError(f"There is nothing at {shown(path)}.", code="model_not_found")
            await self.server.look_for_loras()
        model = self.server.named(name, param="model")
        version = request.path_params.get("version", VERSION)
        if version != VERSION:
            raise NotFoundError(
                f"There is no version {shown(version)} of {model.id!r}, only {VERSION!r}.",
                code="model_not_found",
                param="version",
            )
        return model

    def _read(
        self, request: Request, body: bytes, model: ServedModel
    ) -> tuple[InferenceRequest, list[tuple[EditOrGeneration, dict[str, list[bytes]]]]]:
        message, tail = read_message(body, request.headers.get(HEADER_LENGTH))
        for name, given, of_path in (
            ("model_name", message.model_name, request.path_params["model"]),
            ("model_version", message.model_version, VERSION),
        ):
            if given not in (None, "", of_path):
                raise InvalidRequestError(
                    f"{name} is {shown(given)}, but the path says {shown(of_path)}.", param=name
                )
        fields = model.fields
        accepted = accepted_inputs(model.arguments, fields)
        inputs = read_inputs(message, tail, accepted, file_inputs(fields))
        most = min(self.server.settings.max_images, self.server.places)
        shared = parameters_of(message.parameters or {}, fields)
        return message, image_requests(inputs, shared, most, fields)


def _platform(model: ServedModel) -> str:
    return f"diffusers_{model.pipeline_class}"


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order. The first that fails cancels the others, and its error is
    raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
    except ExceptionGroup as failures:
        failure = failures.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise failure


def _write(
    message: InferenceRequest, requested: dict[str, bool], answers: Sequence[Answer]
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON if binary tensors follow it."""
    model, output_format = answers[0].details.model, answers[0].details.output_format
    images = [one.images[0].data for one in answers]
    texts = [_described(one) for one in answers]
    outputs = []
    for name, binary in requested.items():
        if name == "image":
            parameters = {"content_type": MEDIA_TYPES[output_format]} | (
                {} if binary else {"encoding": "base64"}
            )
            encoded = [] if binary else [base64.b64encode(image).decode() for image in images]
            outputs.append(OutputTensor(name, images, encoded, binary, parameters))
        else:
            outputs.append(OutputTensor(name, [text.encode() for text in texts], texts, binary, {}))
    return write_message(outputs, id=message.id, model_name=model, model_version=VERSION)


def _described(answer: Answer) -> str:
    """The element of `parameters` of an image."""
    (file, *_), details = answer.images, answer.details
    described = {
        **file.values,
        "output_format": details.output_format,
        "model": details.model,
        "flagged": file.flagged,
        "warnings": details.warnings,
        **({} if details.outputs is None else {"outputs": details.outputs}),
    }
    return json.dumps(described)
