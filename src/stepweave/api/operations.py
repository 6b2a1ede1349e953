"""The operations of the HTTP contract, as OpenAPI describes them. `openapi` makes the document of
them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import BaseModel

from stepweave.api import answer_schemas as bodies
from stepweave.api.answers import EVENT_STREAM, IMAGE_TYPES
from stepweave.api.idempotency import MAX_KEY
from stepweave.api.open_inference.tensors import HEADER_LENGTH, IndexRequest, InferenceRequest
from stepweave.api.routes.diffusers_example import DiffusersExampleRequest
from stepweave.api.routes.jobs import MAX_LIST
from stepweave.api.schemas import BentoMLEditRequest, EditRequest, GenerationRequest, StreamRequest
from stepweave.config.values import MAX_NAME
from stepweave.errors import (
    AdmissionError,
    AuthenticationError,
    BodyTooLargeError,
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    RequestCancelledError,
    StepweaveError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from stepweave.parameters import ImageRequest, ResolvedParameters
from stepweave.serving.names import ModelNames
from stepweave.serving.resources import Error, Generation, JobView

JSON = "application/json"
FORM = "multipart/form-data"
BYTES = "application/octet-stream"
Content: TypeAlias = dict[str, Any]  # schemas (models, tuples of them, or JSON) by media type
Errors: TypeAlias = tuple[type[StepweaveError], ...]

EVERYWHERE: Errors = (MethodNotAllowedError, StepweaveError)
READING: Errors = (InvalidRequestError, BodyTooLargeError, UnsupportedMediaTypeError)
WORK: Errors = (
    *READING,
    NotFoundError,
    ConflictError,
    AdmissionError,
    RequestCancelledError,
    UnavailableError,
    DeadlineExceededError,
)
ERRORS: Errors = (*EVERYWHERE, *WORK, AuthenticationError)

REQUESTS: tuple[type[BaseModel], ...] = (
    GenerationRequest,
    EditRequest,
    ImageRequest,
    StreamRequest,
    BentoMLEditRequest,
    DiffusersExampleRequest,
    InferenceRequest,
    IndexRequest,
)


@dataclass(frozen=True)
class Answer:
    """One status of an operation that is no common error."""

    description: str
    content: Content = field(default_factory=dict)
    headers: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, Any] = field(default_factory=dict)
    # schemas of an event stream's data, by name
    events: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """One method of one path. `keyless`: served without a key; `elsewhere`: by BentoML or the
    middleware, not the mounted app."""

    method: str
    path: str
    id: str
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    errors: Errors = ()
    parameters: tuple[Mapping[str, Any], ...] = ()
    body: Content = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)  # of a JSON body
    description: str = ""
    keyless: bool = False
    elsewhere: bool = False
    body_required: bool = True


def _parameter(
    place: str, name: str, description: str, required: bool | None = None, **schema: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path" if required is None else required,
        "description": description,
        "schema": {"type": "string", **schema},
    }


def _header(description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    return {
        "description": description,
        "required": required,
        "schema": {"type": "string", **schema},
    }


def _json(model: type[BaseModel], description: str) -> dict[int, Answer]:
    return {200: Answer(description, {JSON: model})}


_TOKEN = (
    "Only with `Authorization: Bearer TOKEN`, of the file `drain-token` in the server's state "
    "directory; without it there is no such route."
)
WARNINGS_HEADER = {
    "X-Stepweave-Warnings": _header("A JSON list of texts, in ASCII.", pattern=r"^\[.*\]$")
}


def image_headers() -> dict[str, Any]:
    """The headers beside an image: what decides its pixels, less prompts, and warnings."""
    prompts, others = (
        ("prompt", "negative_prompt"),
        ("n", "priority", "deadline_ms", "output_format", "output_compression"),
    )
    place = f"#/components/schemas/{ResolvedParameters.__name__}/properties"
    headers = {
        f"X-Stepweave-{name.replace('_', '-').title()}": {
            "description": "As resolved.",
            "schema": {"$ref": f"{place}/{name}"},
        }
        for name in ResolvedParameters.model_fields
        if name not in (*prompts, *others)
    }
    flagged = _header("Of an image that the pipeline's safety checker flagged.", const="true")
    return headers | {"X-Stepweave-Flagged": flagged} | WARNINGS_HEADER


FILE: dict[str, Any] = {"type": "string", "format": "binary"}
IMAGE: Content = dict.fromkeys(IMAGE_TYPES, FILE)
STREAM: Content = {EVENT_STREAM: {}}  # a schema of each of its events
FILE_HEADERS = {
    "Cache-Control": _header(
        "For as long as it is kept.", required=True, pattern="^private, max-age=[0-9]+$"
    ),
    "X-Content-Type-Options": _header(
        "It is an image, whatever it looks like.", required=True, const="nosniff"
    ),
}
ACCEPTED_HEADERS = {
    "Location": _header("The job.", required=True, pattern="^(/[^/?#]+)*/v1/jobs/[0-9a-f]{32}$"),
    "Preference-Applied": _header("What `Prefer` asked for.", required=True, const="respond-async"),
}
JOB_HEADER = {"X-Stepweave-Job": _header("Of a stream: the job's id.", pattern="^[0-9a-f]{32}$")}
EXAMPLE = {"prompt": "a large red circle on a blue background", "seed": 7}
INFERENCE = {
    "inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [EXAMPLE["prompt"]]}],
    "parameters": {"seed": 7},
}
VERSION = _parameter("path", "version", "The model's version.", enum=["1"])
JOB = _parameter("path", "id", "The job's id.")
ENCODED = _parameter(
    "header", "Content-Encoding", "Of the body.", enum=["identity", "gzip", "deflate"]
)
KEY = _parameter(
    "header",
    "Idempotency-Key",
    "Requests of one key and one body are one job; another body is refused with 409. Printable "
    "characters.",
    minLength=1,
    maxLength=MAX_KEY,
    pattern="^[ -~]+$",
)
CONTROL = (
    KEY,
    _parameter(
        "header",
        "Prefer",
        "`respond-async`: answer with 202 and a job at once.",
        examples=["respond-async"],
        pattern="^[ -~]*$",
    ),
)
COMMON_EVENTS: Content = {
    "stepweave.queued": bodies.QueuedEvent,
    "stepweave.progress": bodies.ProgressEvent,
    "error": Error,
}


def _events(*prefixes: str) -> Content:
    images: Content = {}
    for prefix in prefixes:
        images |= {
            f"{prefix}.partial_image": bodies.PartialImage,
            f"{prefix}.completed": bodies.Completed,
        }
    return images | COMMON_EVENTS


def _images(name: str, prefix: str, **values: Any) -> Operation:
    """An operation of OpenAI's Images API."""
    job_links = {
        one: {"operationId": one, "parameters": {"id": "$response.body#/id"}}
        for one in ("getJob", "cancelJob", "followJob")
    }
    done = Answer(
        "The images; as `Accept` would have it, the one image itself, or events.",
        {JSON: Generation, **IMAGE, **STREAM},
        {**image_headers(), **JOB_HEADER},
        events=_events(prefix),
    )
    accepted = Answer(
        "Accepted; to be asked for later.",
        {JSON: JobView},
        ACCEPTED_HEADERS,
        job_links,
    )
    return Operation(
        "post",
        f"/v1/images/{name}",
        answers={200: done, 202: accepted},
        errors=WORK,
        parameters=CONTROL,
        tag="Images",
        **values,
    )


def _native(path: str, answer: Answer, **values: Any) -> Operation:
    return Operation(
        "post",
        path,
        answers={200: answer},
        tag="BentoML",
        errors=WORK,
        parameters=(KEY,),
        elsewhere=True,
        **values,
    )


def _get(
    path: str,
    id: str,
    tag: str,
    summary: str,
    answers: Mapping[int, Answer],
    *errors: Any,
    **values: Any,
) -> Operation:
    return Operation("get", path, id, tag, summary, answers, errors, **values)  # fmt: skip


def _probe(path: str, id: str, summary: str) -> Operation:
    statuses = {
        200: Answer("Yes.", {JSON: bodies.Health}),
        503: Answer("No.", {JSON: bodies.Unhealthy}),
    }
    return _get(path, id, "Operation", summary, statuses, keyless=True, elsewhere=True)


def name_of_model(names: ModelNames) -> dict[str, Any]:
    """The schema of a name that requests may call the model by."""
    if not names.any:
        return {"enum": list(names.listed)}
    return {"pattern": "^[^:]+$", "minLength": 1, "maxLength": MAX_NAME, "examples": [names.told]}


def _model(name: str, names: ModelNames | None) -> dict[str, Any]:
    return _parameter(
        "path", name, "A name of the model.", **({} if names is None else name_of_model(names))
    )


def _inference(names: ModelNames | None) -> Iterable[Operation]:
    tag, model, named = "Open Inference Protocol", "/v2/models/{model}", _model("model", names)
    yield _get(
        "/v2", "serverMetadata", tag, "The server", _json(bodies.ProtocolMetadata, "Its metadata.")
    )
    yield _get("/v2/models", "listServedModels", tag, "The name of the model that is served",
               _json(bodies.ServedModels, "One."), UnavailableError)  # fmt: skip
    yield Operation(
        "post",
        "/v2/repository/index",
        "repositoryIndex",
        tag,
        "The repository's models, for Triton's clients",
        {200: Answer("One, or none.", {JSON: bodies.RepositoryIndex})},
        (*READING, RequestCancelledError, UnavailableError),
        body={JSON: IndexRequest},
        body_required=False,
    )
    for name, yes, no in (
        ("live", bodies.Live, bodies.NotLive),
        ("ready", bodies.Ready, bodies.NotReady),
    ):
        statuses = {200: Answer("Yes.", {JSON: yes}), 503: Answer("No.", {JSON: no})}
        yield _get(
            f"/v2/health/{name}",
            f"server{name.title()}",
            tag,
            f"Is the server {name}?",
            statuses,
            keyless=True,
        )
    for suffix, path, parameters in (
        ("", model, (named,)),
        ("Version", f"{model}/versions/{{version}}", (named, VERSION)),
    ):
        lost = (NotFoundError, UnavailableError)
        yield _get(
            path,
            f"model{suffix}Metadata",
            tag,
            "The model's tensors",
            _json(bodies.ModelMetadata, "Its metadata."),
            *lost,
            parameters=parameters,
        )
        yield _get(
            f"{path}/config",
            f"model{suffix}Configuration",
            tag,
            "The model's tensors, for Triton's clients",
            _json(bodies.ModelConfiguration, "Its configuration."),
            *lost,
            parameters=parameters,
        )
        yield _get(f"{path}/ready", f"model{suffix}Ready", tag, "Is the model ready?",
                   _json(bodies.ModelReady, "Yes."), *lost, parameters=parameters)  # fmt: skip
        length = _parameter(
            "header",
            HEADER_LENGTH,
            "Bytes of the JSON, where tensors follow it.",
            pattern="^[0-9]+$",
        )
        done = Answer(
            "The images, as tensors.",
            {JSON: bodies.InferenceAnswer, BYTES: FILE},
            {
                HEADER_LENGTH: _header(
                    "Bytes of the JSON, where tensors follow it.", pattern="^[1-9][0-9]*$"
                )
            },
        )
        yield Operation(
            "post",
            f"{path}/infer",
            f"infer{suffix}",
            tag,
            "Make images of prompts",
            {200: done},
            WORK,
            (*parameters, KEY, length, ENCODED),
            {JSON: InferenceRequest, BYTES: FILE},
            INFERENCE,
        )


def operations(names: ModelNames | None) -> list[Operation]:
    """All of them, for a server whose model has these names, if it is loaded."""
    job_events = _events("image_generation", "image_edit")
    return [
        _images(
            "generations",
            "image_generation",
            id="createImage",
            summary="Text to image",
            body={JSON: GenerationRequest},
            example=EXAMPLE,
        ),
        _images(
            "edits",
            "image_edit",
            id="createImageEdit",
            summary="Image to image and inpainting",
            body={FORM: EditRequest},
            description="`image` is what to start from. `mask` is transparent where it is to be "
            "repainted, or, if its alpha is the same throughout, white there; it has "
            "the proportions of `image`. Both are PNG, JPEG or WebP, are turned as "
            "their EXIF says, converted to sRGB, and scaled to the size of the result. "
            "`image[]`, as OpenAI's clients name several, is taken for `image`.",
        ),
        Operation(
            "post",
            "/v1/images/variations",
            "createImageVariation",
            "Images",
            "Refused: send the image to be edited",
            {},
            (InvalidRequestError, BodyTooLargeError),
            body={FORM: {"type": "object"}},
        ),
        _get(
            "/v1/models",
            "listModels",
            "Models",
            "The model that is served",
            _json(bodies.ModelList, "One."),
            UnavailableError,
        ),
        _get(
            "/v1/models/{id}",
            "getModel",
            "Models",
            "What the model takes",
            _json(bodies.Model, "It."),
            NotFoundError,
            UnavailableError,
            parameters=(_model("id", names),),
        ),
        _get(
            "/v1/jobs",
            "listJobs",
            "Jobs",
            "Jobs that are kept, newest first",
            _json(bodies.JobList, "Theirs whose key it is."),
            InvalidRequestError,
            NotFoundError,
            UnavailableError,
            parameters=(
                _parameter(
                    "query",
                    "limit",
                    "How many at most.",
                    type="integer",
                    minimum=1,
                    maximum=MAX_LIST,
                    default=20,
                ),
                _parameter("query", "before", "The `next` of the list before."),
            ),
            description="Off (404) while no keys are set.",
        ),
        _get(
            "/v1/jobs/{id}",
            "getJob",
            "Jobs",
            "Where a job stands, and its result",
            _json(JobView, "The job."),
            InvalidRequestError,
            NotFoundError,
            UnavailableError,
            parameters=(JOB,),
        ),
        Operation(
            "delete",
            "/v1/jobs/{id}",
            "cancelJob",
            "Jobs",
            "Cancel a job, or forget one that is over",
            _json(JobView, "As it was left."),
            (InvalidRequestError, NotFoundError, UnavailableError),
            (JOB,),
        ),
        _get(
            "/v1/jobs/{id}/events",
            "followJob",
            "Jobs",
            "Follow a job",
            {200: Answer("From where it stands to its end.", STREAM, events=job_events)},
            InvalidRequestError,
            NotFoundError,
            UnavailableError,
            parameters=(JOB,),
        ),
        _native(
            "/generate",
            Answer("The image.", IMAGE, image_headers()),
            id="generate",
            summary="One image",
            body={JSON: ImageRequest},
            example=EXAMPLE,
        ),
        _native(
            "/generate_stream",
            Answer("Events.", STREAM, JOB_HEADER, events=_events("image_generation")),
            id="generateStream",
            summary="One image, and its making",
            body={JSON: StreamRequest},
            example={**EXAMPLE, "partial_images": 2},
        ),
        _native(
            "/edit",
            Answer("The image.", IMAGE, image_headers()),
            id="edit",
            summary="One image from another",
            body={FORM: BentoMLEditRequest},
        ),
        _get(
            "/schema.json",
            "bentomlSchema",
            "BentoML",
            "The native API, for BentoML's clients",
            {200: Answer("BentoML's own description.", {JSON: {"type": "object"}})},
            elsewhere=True,
        ),
        *_inference(names),
        Operation(
            "post",
            "/api/diffusers/inference",
            "diffusersExampleInference",
            "Diffusers example server",
            "Text to image",
            {
                200: Answer(
                    "Where the images are.",
                    {JSON: bodies.DiffusersExampleAnswer},
                    WARNINGS_HEADER,
                )
            },
            WORK,
            (KEY,),
            body={JSON: DiffusersExampleRequest},
            example={"prompt": EXAMPLE["prompt"]},
        ),
        _get(
            "/api/status",
            "diffusersExampleStatus",
            "Diffusers example server",
            "What is served, and how much",
            _json(bodies.DiffusersExampleStatus, "Status."),
            UnavailableError,
        ),
        _get(
            "/images/{filename}",
            "getImage",
            "Images",
            "A stored image",
            {200: Answer("The file.", IMAGE, FILE_HEADERS)},
            NotFoundError,
            UnavailableError,
            parameters=(_parameter("path", "filename", "Its name, the key to it."),),
        ),
        _get(
            "/",
            "discover",
            "Operation",
            "What this server is",
            {
                200: Answer(
                    "For browsers a page.",
                    {JSON: bodies.Discovery, "text/html": {"type": "string"}},
                )
            },
        ),
        _get(
            "/ui",
            "playground",
            "Operation",
            "A page to try it",
            {200: Answer("The page.", {"text/html": {"type": "string"}})},
        ),
        _get(
            "/openapi.json",
            "openapi",
            "Operation",
            "This document",
            {200: Answer("OpenAPI 3.1.", {JSON: {"type": "object"}})},
        ),
        _get(
            "/docs.json",
            "docs",
            "Operation",
            "This document, where BentoML has one",
            {200: Answer("OpenAPI 3.1.", {JSON: {"type": "object"}})},
        ),
        _get(
            "/metrics",
            "metrics",
            "Operation",
            "For Prometheus",
            {200: Answer("The exposition format.", {"text/plain": {"type": "string"}})},
        ),
        _probe("/livez", "livez", "Is the process alive?"),
        _probe("/healthz", "healthz", "Is the process alive?"),
        _probe("/readyz", "readyz", "Does it take work?"),
        Operation(
            "post",
            "/drain",
            "drain",
            "Operation",
            "Announce that the server leaves",
            _json(bodies.Drained, "What is left."),
            (NotFoundError,),
            keyless=True,
            elsewhere=True,
            description="`/readyz` is 503 from now on, and new work is refused "
            f"`STEPWEAVE_DRAIN_NOTICE` seconds later. {_TOKEN}",
        ),
        Operation(
            "delete",
            "/drain",
            "take_back_drain",
            "Operation",
            "Take a drain back",
            _json(bodies.Drained, "What is left."),
            (NotFoundError, ConflictError),
            keyless=True,
            elsewhere=True,
            description=f"Until the process was told to end (409, code `terminating`). {_TOKEN}",
        ),
    ]
