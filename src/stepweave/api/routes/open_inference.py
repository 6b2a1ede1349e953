"""The Open Inference Protocol v2, as KServe and Triton's clients speak it.

Each element of the input `prompt` is one picture, a generation of its own; an optional input has
one element for all of them, or one each. What holds for all may stand in the request's `parameters`
too. A picture comes back as its file, in binary tensors as it is and in JSON as base64; the output
`parameters` has a JSON text for each picture: everything as resolved, and warnings.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stepweave import __version__
from stepweave.api.auth import asker_of
from stepweave.api.bodies import whole_body
from stepweave.api.disconnect import until_disconnect
from stepweave.api.idempotency import claim_of, generate
from stepweave.api.responses import error_response
from stepweave.api.schemas import explain, parse_off_loop, require_json, some_of
from stepweave.api.tensors import (
    FLOATS,
    HEADER_LENGTH,
    INTEGERS,
    TEXTS,
    IndexRequest,
    InferenceRequest,
    OutputTensor,
    read_inputs,
    read_message,
    write_message,
    wrong,
)
from stepweave.api.triton import EXTENSIONS, configuration, index, unsupported
from stepweave.errors import InvalidRequest, NotFound, StepweaveError, shown
from stepweave.parameters import ImageRequest
from stepweave.serving.server import Server
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from stepweave.parameters import Answer
    from stepweave.serving.model import ServedModel

VERSION = "1"  # of the model: it is replaced with the process
INPUTS = {
    "prompt": TEXTS,
    "negative_prompt": TEXTS,
    "size": TEXTS,
    "seed": INTEGERS,
    "num_inference_steps": ("INT32", *(name for name in INTEGERS if name != "INT32")),
    "guidance_scale": FLOATS,
}
REQUIRED = ("prompt",)
OUTPUTS = ("image", "parameters")
PARAMETERS = tuple(name for name in ImageRequest.model_fields if name != "prompt")
OTHER_TYPES = ("", "application/octet-stream")
TRITON_PRIORITIES = {1: "high", 2: "normal", 3: "low"}
MICROSECONDS = 1000  # in a millisecond

T = TypeVar("T")


class OpenInferenceRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        model = "/v2/models/{model:path}"
        version = f"{model}/versions/{{version}}"
        return [
            Route("/v2", self.metadata, methods=["GET"]),
            Route("/v2/models", self.models, methods=["GET"]),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            *(Route(f"{one}/infer", self.infer, methods=["POST"]) for one in (version, model)),
            *(
                Route(f"{one}/config", self.configuration, methods=["GET"])
                for one in (version, model)
            ),
            *(Route(f"{one}/ready", self.model_ready, methods=["GET"]) for one in (version, model)),
            *(Route(one, self.model_metadata, methods=["GET"]) for one in (version, model)),
        ]

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(
            {"name": "stepweave", "version": __version__, "extensions": list(EXTENSIONS)}
        )

    async def models(self, request: Request) -> Response:
        """As KServe's servers list theirs."""
        model, _ = self.server.ready()
        return JSONResponse({"models": [model.id]})

    async def index(self, request: Request) -> Response:
        """The body may be empty, and any content type will do: Triton's client sends neither."""
        async with whole_body(request) as body:
            asked = await parse_off_loop(body or b"{}", IndexRequest)
        model = self.server.model
        if model is None:
            raise self.server.unavailable()
        unready = (
            None if self.server.health().stage == "ready" else self.server.unavailable().message
        )
        return JSONResponse(index(model.id, VERSION, unready, bool(asked.ready)))

    async def configuration(self, request: Request) -> Response:
        model = self._model(request)
        return JSONResponse(
            configuration(model.id, _platform(model), _accepted(model), REQUIRED, OUTPUTS)
        )

    async def live(self, request: Request) -> Response:
        if not self.server.alive():
            return error_response(self.server.unavailable(), request.scope["path"], live=False)
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        if self.server.health().stage != "ready":
            return error_response(self.server.unavailable(), request.scope["path"], ready=False)
        return JSONResponse({"ready": True})

    async def model_ready(self, request: Request) -> Response:
        model = self._model(request)
        if self.server.health().stage != "ready":
            raise self.server.unavailable()
        return JSONResponse({"name": model.id, "ready": True})

    async def model_metadata(self, request: Request) -> Response:
        model = self._model(request)
        accepted = _accepted(model)
        return JSONResponse(
            {
                "name": model.id,
                "versions": [VERSION],
                "platform": _platform(model),
                "inputs": [
                    {"name": name, "datatype": datatypes[0], "shape": [-1]}
                    for name, datatypes in accepted.items()
                ],
                "outputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in OUTPUTS],
            }
        )

    async def infer(self, request: Request) -> Response:
        model = self._model(request)
        require_json(request.headers.get("content-type", ""), *OTHER_TYPES)
        async with whole_body(request, text=False) as body:
            # off the loop: a body may be long
            message, images = await on_thread(None, self._read, request, body, model)
        outputs, warnings = _requested(message), _ignored(message)
        asked = "\n".join(image.model_dump_json() for image in images)
        claims = [claim_of(request, asked, part=i) for i in range(len(images))]
        work = [
            generate(
                self.server,
                claim,
                functools.partial(
                    self.server.accept, image, warnings=warnings, client=asker_of(request)
                ),
            )
            for claim, image in zip(claims, images, strict=True)
        ]
        try:
            answers = await until_disconnect(request, together(work))
        except StepweaveError as error:
            raise _as_sent(error, message, images[0]) from None
        content, length = await on_thread(None, _write, message, outputs, answers)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(
            content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)}
        )

    def _model(self, request: Request) -> ServedModel:
        """The model that the path names. Raises NotFound if it or its version is not the one that
        is served."""
        name, path = request.path_params["model"], request.scope["path"]
        served, _ = self.server.ready()
        # the route takes in what is below a model, and `*` any name
        if name not in served.names.listed:
            if path.endswith("/infer") and request.method != "POST":
                raise HTTPException(405, headers={"Allow": "POST"})
            if (reason := unsupported(path)) is not None:
                raise reason
            if name.startswith(tuple(f"{one}/" for one in served.names.listed)):
                raise NotFound(f"There is nothing at {shown(path)}.", code="model_not_found")
        model = self.server.named(name, param="model")
        version = request.path_params.get("version", VERSION)
        if version != VERSION:
            raise NotFound(
                f"There is no version {shown(version)} of {model.id!r}, only {VERSION!r}.",
                code="model_not_found",
                param="version",
            )
        return model

    def _read(
        self, request: Request, body: bytes, model: ServedModel
    ) -> tuple[InferenceRequest, list[ImageRequest]]:
        message, tail = read_message(body, request.headers.get(HEADER_LENGTH))
        for name, given, of_path in (
            ("model_name", message.model_name, request.path_params["model"]),
            ("model_version", message.model_version, VERSION),
        ):
            if given not in (None, "", of_path):
                raise InvalidRequest(
                    f"{name} is {shown(given)}, but the path says {shown(of_path)}.", param=name
                )
        fields = read_inputs(message, tail, _accepted(model))
        most = min(self.server.settings.max_images, self.server.places)
        return message, _image_requests(fields, _parameters(message.parameters or {}), most)


def _platform(model: ServedModel) -> str:
    return f"diffusers_{model.pipeline_class}"


def _accepted(model: ServedModel) -> dict[str, Sequence[str]]:
    """The inputs that the model's pipeline knows, each with its datatypes, the usual one first."""
    optional = ("negative_prompt", "guidance_scale")
    return {
        name: datatypes
        for name, datatypes in INPUTS.items()
        if name not in optional or name in model.arguments
    }


def _parameters(given: dict[str, Any]) -> dict[str, Any]:
    """The request's parameters as fields of an ImageRequest. Triton's own `priority` and `timeout`
    are taken as it means them."""
    values = {
        name: value
        for name, value in given.items()
        if value is not None and name in (*PARAMETERS, "timeout")
    }
    for name in ("timeout", "priority"):
        if type(values.get(name)) is int and values[name] == 0:  # Triton's default
            del values[name]
    timeout = values.pop("timeout", None)
    if timeout is not None:
        if type(timeout) is not int or timeout < 1:
            raise InvalidRequest(
                f"timeout is {shown(timeout)}; it is a number of microseconds, or 0 for none.",
                param="timeout",
            )
        if "deadline_ms" in values:
            raise InvalidRequest(
                "timeout and deadline_ms are both given; they mean the same.", param="timeout"
            )
        values["deadline_ms"] = -(-timeout // MICROSECONDS)
    if type(values.get("priority")) is int:
        if values["priority"] not in TRITON_PRIORITIES:
            raise InvalidRequest(
                f"priority is {values['priority']}; as a number it is 1 (high), 2 (normal), 3 "
                f"(low) or 0 for the default.",
                param="priority",
            )
        values["priority"] = TRITON_PRIORITIES[values["priority"]]
    return values


def _as_sent(
    error: StepweaveError, message: InferenceRequest, image: ImageRequest
) -> StepweaveError:
    """The error, naming `timeout` where that is what was sent."""
    timeout = (message.parameters or {}).get("timeout")
    told = f"deadline_ms is {image.deadline_ms}"
    if timeout and told in error.message:
        error = error.again()
        error.message = error.message.replace(told, f"timeout is {timeout} microseconds")
        error.param = error.param and "timeout"
    return error


def _ignored(message: InferenceRequest) -> list[str]:
    """A warning of parameters that the server does not know, which the protocol has it ignore."""
    known = (*PARAMETERS, "timeout", "binary_data_output")
    unknown = [name for name in message.parameters or () if name not in known]
    if not unknown:
        return []
    return [
        (
            f"Unknown parameters are ignored: {some_of(unknown)}. Those that are known are "
            f"{', '.join(known)}."
        )
    ]


def _image_requests(
    fields: dict[str, list[Any]], shared: dict[str, Any], most: int
) -> list[ImageRequest]:
    """One request for each prompt. Raises InvalidRequest naming the tensor or parameter that is
    wrong."""
    if "prompt" not in fields:
        raise wrong("prompt", "it is missing", code="missing_field")
    count = len(fields["prompt"])
    if not 1 <= count <= most:
        raise wrong("prompt", f"its shape is [{count}]; the limit is 1 to {most} elements")
    for name, elements in fields.items():
        if len(elements) not in (1, count):
            raise wrong(
                name, f"its shape is [{len(elements)}]; it must be [1] or, as prompt's, [{count}]"
            )
        if name in shared:
            raise wrong(name, "it is given as an input and as a parameter")
    requests = []
    for i in range(count):
        values = {
            name: elements[i if len(elements) == count else 0] for name, elements in fields.items()
        }
        try:
            requests.append(ImageRequest.model_validate({**shared, **values}))
        except ValidationError as error:
            explained = explain(error)
            if explained.param in values and count > 1:
                explained = wrong(
                    explained.param, f"element {i}: {explained.message.removesuffix('.')}"
                )
            raise explained from None
    return requests


def _requested(message: InferenceRequest) -> dict[str, bool]:
    """The outputs that are asked for, by whether they are to be binary."""
    default = (message.parameters or {}).get("binary_data_output")
    default = False if default is None else default
    if type(default) is not bool:
        raise InvalidRequest(
            f"binary_data_output is {shown(default)}; say true or false.",
            param="binary_data_output",
        )
    if not message.outputs:
        return dict.fromkeys(OUTPUTS, default)
    asked: dict[str, bool] = {}
    for output in message.outputs:
        if output.name not in OUTPUTS:
            problem = f"there is no such output; the outputs are {', '.join(OUTPUTS)}"
            raise wrong(output.name, problem, code="unknown_field")
        if output.name in asked:
            raise wrong(output.name, "it is asked for twice")
        if output.parameters is not None and output.parameters.shared_memory_region is not None:
            raise wrong(
                output.name, "there is no shared memory here; read the elements from the answer"
            )
        binary = None if output.parameters is None else output.parameters.binary_data
        asked[output.name] = default if binary is None else binary
    return asked


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order. The first that fails cancels the others, and its error is
    raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        failure = failures.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise failure


def _write(
    message: InferenceRequest, requested: dict[str, bool], answers: Sequence[Answer]
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON if binary tensors follow it."""
    body = answers[0].body
    output_format = body["parameters"]["output_format"]
    head = {"model_name": body["model"], "model_version": VERSION} | (
        {} if message.id is None else {"id": message.id}
    )
    images = [answer.pictures[0].data for answer in answers]
    texts = [
        json.dumps(
            {
                **answer.pictures[0].values,
                "output_format": output_format,
                "model": body["model"],
                "flagged": answer.pictures[0].flagged,
                "warnings": answer.body["warnings"],
                **({"outputs": answer.body["outputs"]} if "outputs" in answer.body else {}),
            }
        )
        for answer in answers
    ]
    outputs = []
    for name, binary in requested.items():
        if name == "image":
            parameters = {"content_type": f"image/{output_format}"} | (
                {} if binary else {"encoding": "base64"}
            )
            encoded = [] if binary else [base64.b64encode(image).decode() for image in images]
            outputs.append(OutputTensor(name, images, encoded, binary, parameters))
        else:
            outputs.append(OutputTensor(name, [text.encode() for text in texts], texts, binary, {}))
    return write_message(head, outputs)
