"""The OpenAPI 3.1 document of this server: its routes, with its own limits, and its model's once
that is loaded."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stepweave import __version__
from stepweave.api.answer_schemas import ANSWERS, ExamplesError, ProtocolError
from stepweave.api.answers import EVENT_STREAM, IMAGE_TYPES
from stepweave.api.model_fields import with_fields
from stepweave.api.open_inference.tensors import (
    InputParameters,
    InputTensor,
    OutputParameters,
    RequestedOutput,
)
from stepweave.api.operations import (
    ERRORS,
    EVERYWHERE,
    FILE,
    FORM,
    JSON,
    REQUESTS,
    Answer,
    Content,
    Operation,
    header,
    name_of_model,
    operations,
)
from stepweave.api.responses import CODE, is_of_examples, is_of_protocol
from stepweave.api.routes.diffusers_example import DiffusersExampleRequest
from stepweave.api.schemas import MAX_SAME, PROMPTS, BentoMLEditRequest, EditRequest
from stepweave.api.urls import prefix
from stepweave.calls import RequestFields
from stepweave.errors import (
    AdmissionError,
    AuthenticationError,
    DeadlineExceededError,
    MethodNotAllowedError,
    StepweaveError,
    UnavailableError,
    UnsupportedEncodingError,
    UnsupportedMediaTypeError,
)
from stepweave.parameters import OPTIONAL_ARGUMENTS, ImageRequest
from stepweave.serving.resources import Error
from stepweave.serving.server import Server
from stepweave.threads import on_thread

REF = "#/components/schemas/{model}"
DIALECT = "https://spec.openapis.org/oas/3.1/dialect/base"
REQUEST_ID = header(
    "The request's, if it has a valid one, else a new one.",
    required=True,
    pattern="^[A-Za-z0-9_.:-]{1,128}$",
)
ALWAYS = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}
FORMS = (EditRequest, BentoMLEditRequest)
PROTOCOL, EXAMPLES = "Protocol", "Examples"  # surfaces whose errors have another body
BODIES: dict[str, type[BaseModel]] = {"": Error, PROTOCOL: ProtocolError, EXAMPLES: ExamplesError}
# of JSON, whose members may be null, as if they were absent
OBJECTS: tuple[type[BaseModel], ...] = (
    *(model for model in REQUESTS if model not in FORMS),
    InputTensor,
    InputParameters,
    RequestedOutput,
    OutputParameters,
)
DESCRIPTION = (
    "Diffusion models, batched by denoising steps. Every error's message names the offending value "
    "and the limit. Bodies of POST may be compressed, with `Content-Encoding: gzip` or `deflate`; "
    "their limit is that of the decoded body. Fields that are not listed are refused; a member "
    "that is null counts as absent. Limits are this server's; those of the model are there once it "
    "is loaded. HEAD is answered wherever GET is."
)


class OpenApiRoutes:
    """The handler, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route(path, self.document, methods=["GET"]) for path in ("/openapi.json", "/docs.json")
        ]

    async def document(self, request: Request) -> Response:
        mounted = {route.path_format for route in request.app.routes if isinstance(route, Route)}
        settings = self.server.settings
        place = (settings.base_url or prefix(request, settings)).rstrip("/") or "/"
        content = await on_thread(
            None, lambda: json.dumps(make_document(self.server, mounted, place))
        )
        return Response(content, media_type=JSON)


def make_document(server: Server, mounted: Collection[str], place: str = "/") -> dict[str, Any]:
    """The document of a server whose app has routes of the paths `mounted`; `place` is the URL of
    its root."""
    secured = server.keys.required
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations(None if server.model is None else server.model.names):
        if operation.elsewhere or operation.path in mounted:
            paths.setdefault(operation.path, {})[operation.method] = _operation(operation, secured)
    schemas = copy.deepcopy(_schemas(server.fields))
    _limit(schemas, server)
    components: dict[str, Any] = {
        "schemas": schemas,
        "responses": {
            f"{surface}{error.__name__}": _refusal(error, surface)
            for surface in BODIES
            for error in ERRORS
        },
        "headers": {"RequestId": REQUEST_ID},
    }
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Stepweave",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "jsonSchemaDialect": DIALECT,
        "servers": [{"url": place}],
        "paths": paths,
        "components": components,
    }
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


class _Generator(GenerateJsonSchema):
    """Without a title for every field, which would only repeat the name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:
        if self.mode == "serialization":
            return "serialization_exclude_if" not in field  # all others are always there
        return super().field_is_required(field, total)


@functools.lru_cache(maxsize=8)
def _schemas(fields: RequestFields) -> dict[str, Any]:
    """Of bodies and answers, by name, as any server with such a model has them."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (
            with_fields(model, fields, files=model not in FORMS)
            if issubclass(model, ImageRequest)
            else model,
            "validation",
        )
        for model in REQUESTS
    ]
    models += [(model, "serialization") for model in ANSWERS]
    _, document = models_json_schema(models, ref_template=REF, schema_generator=_Generator)
    schemas: dict[str, Any] = document["$defs"]
    for model in OBJECTS:
        schema = schemas[model.__name__]
        for name in schema["properties"].keys() - set(schema.get("required", ())):
            schema["properties"][name] = _or_null(schema["properties"][name])
    for form in FORMS:
        schemas[form.__name__] = _as_form(schemas[form.__name__], fields)
    return schemas


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    names = ("description", "default")
    inner = {name: value for name, value in schema.items() if name not in names}
    outer = {name: schema[name] for name in names if name in schema}
    return {"anyOf": [inner, {"type": "null"}], **outer}


def _as_form(schema: dict[str, Any], fields: RequestFields) -> dict[str, Any]:
    """A form's schema: it has files, and no null."""
    properties: dict[str, Any] = {"image": FILE, "mask": FILE}
    several = {"type": "array", "items": FILE, "minItems": 1, "maxItems": MAX_SAME}
    for name in fields.files:
        properties[name] = several if name in fields.several else FILE
    for name, field in schema["properties"].items():
        if name in fields.tensors:
            properties[name] = {**FILE, "description": field.get("description", "")}
            continue
        values = {
            key: value
            for key, value in field.items()
            if key != "anyOf" and (key, value) != ("default", None)
        }
        properties[name] = {**(_first_type(field) if "anyOf" in field else {}), **values}
    image = ["image"] if fields.needs_image else []
    return {**schema, "properties": properties, "required": [*image, *schema.get("required", ())]}


def _limit(schemas: dict[str, Any], server: Server) -> None:
    """Write the server's limits, and those of its model once it is loaded, into the schemas of
    requests."""
    settings, model = server.settings, server.model
    limits: dict[str, dict[str, Any]] = {
        "prompt": {"maxLength": settings.max_prompt_characters, "pattern": r"\S"},
        "negative_prompt": {"maxLength": settings.max_prompt_characters},
        "num_inference_steps": {"minimum": 1, "maximum": settings.max_steps},
        "n": {"maximum": settings.max_images},
        "num_images_per_prompt": {"maximum": settings.max_images},
    }
    absent: set[str] = set()  # what the model does not have
    sizes = f"At most {settings.max_pixels} pixels."
    if model is not None:
        for name in ("n", "num_images_per_prompt"):
            limits[name]["maximum"] = model.limits.images
        for name in PROMPTS:
            limits[name]["maxLength"] = model.limits.prompt_characters
        low, high = model.limits.guidance
        limits["guidance_scale"] = {"minimum": low, "maximum": high}
        limits["model"] = limits["model_name"] = name_of_model(model.names)
        limits["scheduler"] = {"enum": sorted(model.schedulers)}
        absent = set(OPTIONAL_ARGUMENTS) - set(model.arguments)
        absent |= set() if model.schedulers else {"scheduler"}
        absent |= set() if model.loras is not None else {"lora"}
        limits["size"] = {"examples": [f"{model.width}x{model.height}"]}
        sizes += f" {model.limits.sizes}"
    of_edits = {} if model is None else model.limits_of_edits
    for request in REQUESTS:
        properties = schemas[request.__name__]["properties"]
        ignored = {"model"} if request is DiffusersExampleRequest else set()
        for name in properties.keys() & limits.keys() - ignored:
            _first_type(properties[name]).update(limits[name])
        if request is EditRequest and of_edits:  # of which some may take more than others
            properties["n"]["maximum"] = max(limit.images for limit in of_edits.values())
        for name in properties.keys() & absent:
            if request in FORMS:
                del properties[name]
            else:
                properties[name] = {"type": "null", "description": "This model has none."}
        if "response_format" in properties:
            properties["response_format"]["default"] = settings.response_format
        if "size" in properties:
            kinds = {
                f"{name}: {limit.sizes}"
                for name, limit in of_edits.items()
                if model and limit != model.limits
            }
            more = sorted(kinds) if request in FORMS else []
            properties["size"]["description"] += " ".join(["", sizes, *more])


def _first_type(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself, or what it says of values that are not null."""
    return next(
        (branch for branch in schema.get("anyOf", ()) if branch.get("type") != "null"), schema
    )


def _operation(described: Operation, secured: bool) -> dict[str, Any]:
    responses = {str(status): _response(answer) for status, answer in described.answers.items()}
    errors = [*described.errors, *EVERYWHERE]
    if secured and not described.keyless:
        errors.append(AuthenticationError)
    for error in sorted(errors, key=lambda error: error.status):
        name = f"{_surface(described.path)}{error.__name__}"
        responses.setdefault(str(error.status), {"$ref": f"#/components/responses/{name}"})
    operation: dict[str, Any] = {
        "operationId": described.id,
        "tags": [described.tag],
        "summary": described.summary,
        "responses": dict(sorted(responses.items())),
    }
    if described.description:
        operation["description"] = described.description
    if described.parameters:
        operation["parameters"] = list(described.parameters)
    if described.body:
        content = _content(described.body)
        if described.example:
            content[JSON]["example"] = dict(described.example)
        operation["requestBody"] = {"required": described.body_required, "content": content}
    if secured and described.keyless:
        operation["security"] = []
    return operation


def _response(answer: Answer) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": answer.description,
        "headers": {**ALWAYS, **answer.headers},
    }
    if answer.content:
        response["content"] = _content(answer.content, answer.events)
    if answer.links:
        response["links"] = dict(answer.links)
    return response


def _content(content: Content, events: Mapping[str, Any] | None = None) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for media_type, schema in content.items():
        described[media_type] = {"schema": _schema(schema)}
        if media_type == FORM:
            described[media_type]["encoding"] = {
                name: {"contentType": ", ".join(IMAGE_TYPES)} for name in ("image", "mask")
            }
        if media_type == EVENT_STREAM and events:
            described[media_type]["schema"] = {"anyOf": [_event(*each) for each in events.items()]}
    return described


def _event(name: str, data: Any) -> dict[str, Any]:
    """The schema of a server-sent event, as OpenAPI 3.2 writes it."""
    content = {"type": "string", "contentMediaType": JSON, "contentSchema": _schema(data)}
    return {
        "type": "object",
        "properties": {"event": {"const": name}, "data": content},
        "required": ["event", "data"],
    }


def _schema(given: Any) -> dict[str, Any]:
    """A reference to a model, to any of several, or a schema as it is."""
    if isinstance(given, tuple):
        return {"anyOf": [_schema(item) for item in given]}
    if isinstance(given, dict):
        return given
    return {"$ref": REF.format(model=given.__name__)}


def _surface(path: str) -> str:
    return PROTOCOL if is_of_protocol(path) else EXAMPLES if is_of_examples(path) else ""


def _refusal(error: type[StepweaveError], surface: str) -> dict[str, Any]:
    headers: dict[str, Any] = dict(ALWAYS)
    if surface == PROTOCOL:
        headers[CODE] = header("For programs.", required=True)
    if error is UnsupportedMediaTypeError:
        headers["Accept-Encoding"] = header(
            "Where the content encoding is the reason: those that are accepted.",
            const=UnsupportedEncodingError.TAKEN,
        )
    if issubclass(error, (AdmissionError, UnavailableError)):
        headers["Retry-After"] = header(
            "Seconds after which it may be accepted.",
            required=issubclass(error, AdmissionError),
            type="integer",
            minimum=1,
        )
    if issubclass(error, AuthenticationError):
        headers["WWW-Authenticate"] = header("How to send a key.", required=True, const="Bearer")
    if issubclass(error, MethodNotAllowedError):
        headers["Allow"] = header("Methods that the path has.", required=True)
    if error in (StepweaveError, DeadlineExceededError):
        headers["X-Should-Retry"] = header(
            "`false` where it would fail again, or come too late.", const="false"
        )
    description = (
        "The server failed; its log names the request's id."
        if error is StepweaveError
        else inspect.getdoc(error) or ""
    )
    return {
        "description": description.partition("\n")[0],
        "headers": headers,
        "content": _content({JSON: BODIES[surface]}),
    }
