"""The operations of the HTTP contract, of which `openapi` makes the document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from pydantic import BaseModel

from stepweave.api import answer_schemas as bodies
from stepweave.api.answers import EVENT_STREAM, IMAGE_TYPES, image_header
from stepweave.api.idempotency import MAX_KEY
from stepweave.api.open_inference.tensors import HEADER_LENGTH, IndexRequest, InferenceRequest
from stepweave.api.routes.diffusers_example import DiffusersExampleRequest
from stepweave.api.routes.documentation import FILES
from stepweave.api.routes.jobs import MAX_LIST
from stepweave.api.routes.loras import LoraRequest
from stepweave.api.schemas import (
    BentoMLEditBody,
    BentoMLEditRequest,
    EditBody,
    EditRequest,
    GenerationRequest,
    StreamRequest,
)
from stepweave.config.values import MAX_NAME
from stepweave.errors import (
    AdmissionError,
    AuthenticationError,
    BodyTooLargeError,
    ConflictError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    RequestCancelledError,
    StepweaveError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from stepweave.parameters import COMPONENTS, ImageRequest, ResolvedParameters
from stepweave.serving.names import ModelNames
from stepweave.serving.resources import Error, Generation, JobView

JSON = "application/json"
FORM = "multipart/form-data"
BYTES = "application/octet-stream"
Content: TypeAlias = dict[str, Any]  # schemas (models, tuples of them, or JSON) by media type
Errors: TypeAlias = tuple[type[StepweaveError], ...]

EVERYWHERE: Errors = (MethodNotAllowedError, StepweaveError)
NAMED: Errors = (NotFoundError, UnavailableError)
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
ERRORS: Errors = (*EVERYWHERE, *WORK, AuthenticationError, ForbiddenError)

REQUESTS: tuple[type[BaseModel], ...] = (
    GenerationRequest,
    EditRequest,
    EditBody,
    ImageRequest,
    StreamRequest,
    BentoMLEditRequest,
    BentoMLEditBody,
    DiffusersExampleRequest,
    InferenceRequest,
    IndexRequest,
    LoraRequest,
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
    middleware, not by routes of `api/routes/`."""

    method: str
    path: str
    id: str
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
    tag: str = ""  # set by `_tagged`


def _tagged(tag: str, *operations: Operation) -> list[Operation]:
    return [replace(operation, tag=tag) for operation in operations]


def header(description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    return {
        "description": description,
        "required": required,
        "schema": {"type": "string", **schema},
    }


def _parameter(place: str, name: str, description: str, **schema: Any) -> dict[str, Any]:
    described = header(description, required=place == "path", **schema)
    return {"name": name, "in": place, **described}


def _ok(
    description: str, content: Any, headers: Mapping[str, Any] | None = None
) -> dict[int, Answer]:
    """`content` is a schema of JSON, or several by media type."""
    by_type = content if isinstance(content, dict) else {JSON: content}
    return {200: Answer(description, by_type, headers or {})}


_TOKEN = (
    "Only with `Authorization: Bearer TOKEN`, of the file `drain-token` in the server's state "
    "directory; 404 without it."
)
_ADMIN = "Only with a key that is marked `admin`; disabled (404) unless API keys are set."
WARNINGS_HEADER = {
    "X-Stepweave-Warnings": header("A JSON list of texts, in ASCII.", pattern=r"^\[.*\]$")
}


def image_headers() -> dict[str, Any]:
    """The headers of an image: the parameters that decide its pixels, except prompts; warnings."""
    others = ("n", "priority", "deadline_ms", "output_format", "output_compression")
    place = f"#/components/schemas/{ResolvedParameters.__name__}/properties"
    headers = {
        image_header(name): {
            "description": "As resolved.",
            "schema": {"$ref": f"{place}/{name}"},
        }
        for name in ResolvedParameters.model_fields
        if name not in others and "prompt" not in name and name != "lora"
    }
    for component, scale in COMPONENTS.items():
        for name, told in ((component, "Names"), (scale, "Scales")):
            if name is not None:
                headers[image_header(name)] = header(
                    f"{told} of components beside the model, separated by commas."
                )
    headers["X-Stepweave-Lora"] = header("LoRAs with their scales: `rings:0.8,chalk:1`.")
    flagged = header("Of an image that the pipeline's safety checker flagged.", const="true")
    return headers | {"X-Stepweave-Flagged": flagged} | WARNINGS_HEADER


FILE: dict[str, Any] = {"type": "string", "format": "binary"}
IMAGE: Content = dict.fromkeys(IMAGE_TYPES, FILE)
STREAM: Content = {EVENT_STREAM: {}}  # a schema of each of its events
FILE_HEADERS = {
    "Cache-Control": header(
        "For as long as it is stored.", required=True, pattern="^private, max-age=[0-9]+$"
    ),
    "X-Content-Type-Options": header(
        "Browsers must take it for an image only.", required=True, const="nosniff"
    ),
}
ACCEPTED_HEADERS = {
    "Location": header("The job.", required=True, pattern="^(/[^/?#]+)*/v1/jobs/[0-9a-f]{32}$"),
    "Preference-Applied": header("What `Prefer` asked for.", required=True, const="respond-async"),
}
JOB_HEADER = {"X-Stepweave-Job": header("Of a stream: the job's id.", pattern="^[0-9a-f]{32}$")}
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
    "Requests with the same key and body are one job; another body is refused with 409. "
    "Printable characters.",
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
    kinds = {"partial_image": bodies.PartialImage, "completed": bodies.Completed}
    images = {f"{prefix}.{kind}": data for prefix in prefixes for kind, data in kinds.items()}
    return images | COMMON_EVENTS


def _images(name: str, prefix: str, **values: Any) -> Operation:
    """An operation of OpenAI's Images API."""
    links = {
        id: {"operationId": id, "parameters": {"id": "$response.body#/id"}}
        for id in ("getJob", "cancelJob", "followJob")
    }
    done = Answer(
        "The images; as `Accept` asks, JSON, the one image itself, or events.",
        {JSON: Generation, **IMAGE, **STREAM},
        {**image_headers(), **JOB_HEADER},
        events=_events(prefix),
    )
    accepted = Answer("Accepted; ask for the job later.", {JSON: JobView}, ACCEPTED_HEADERS, links)
    return Operation(
        "post",
        f"/v1/images/{name}",
        answers={200: done, 202: accepted},
        errors=WORK,
        parameters=CONTROL,
        **values,
    )


def _native(
    path: str, id: str, summary: str, answer: Answer, body: Content, **values: Any
) -> Operation:
    answers = {200: answer}
    return Operation(
        "post", path, id, summary, answers, WORK, (KEY,), body, elsewhere=True, **values
    )


def _get(
    path: str, id: str, summary: str, answers: Mapping[int, Answer], *errors: Any, **values: Any
) -> Operation:
    return Operation("get", path, id, summary, answers, errors, **values)


def _probe(
    path: str,
    id: str,
    summary: str,
    yes: type[BaseModel] = bodies.Health,
    no: type[BaseModel] = bodies.Unhealthy,
    *,
    elsewhere: bool = True,
) -> Operation:
    answers = {200: Answer("Yes.", {JSON: yes}), 503: Answer("No.", {JSON: no})}
    return _get(path, id, summary, answers, keyless=True, elsewhere=elsewhere)


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
    model, named = "/v2/models/{model}", _model("model", names)
    tensors, triton = "The model's tensors", "The model's tensors, for Triton's clients"
    yield _get("/v2", "serverMetadata", "The server", _ok("Its metadata.", bodies.ProtocolMetadata))
    yield _get(
        "/v2/models",
        "listServedModels",
        "The name of the model that is served",
        _ok("One.", bodies.ServedModels),
        UnavailableError,
    )
    yield Operation(
        "post",
        "/v2/repository/index",
        "repositoryIndex",
        "The repository's models, for Triton's clients",
        _ok("One, or none.", bodies.RepositoryIndex),
        (*READING, RequestCancelledError, UnavailableError),
        body={JSON: IndexRequest},
        body_required=False,
    )
    for name, yes, no in (
        ("live", bodies.Live, bodies.NotLive),
        ("ready", bodies.Ready, bodies.NotReady),
    ):
        path, id = f"/v2/health/{name}", f"server{name.title()}"
        yield _probe(path, id, f"Is the server {name}?", yes, no, elsewhere=False)
    for suffix, path, parameters in (
        ("", model, (named,)),
        ("Version", f"{model}/versions/{{version}}", (named, VERSION)),
    ):
        for below, name, summary, description, schema in (
            ("", "Metadata", tensors, "Its metadata.", bodies.ModelMetadata),
            ("/config", "Configuration", triton, "Its configuration.", bodies.ModelConfiguration),
            ("/ready", "Ready", "Is the model ready?", "Yes.", bodies.ModelReady),
        ):
            yield _get(
                f"{path}{below}",
                f"model{suffix}{name}",
                summary,
                _ok(description, schema),
                *NAMED,
                parameters=parameters,
            )
        length = "Bytes of the JSON, where tensors follow it."
        yield Operation(
            "post",
            f"{path}/infer",
            f"infer{suffix}",
            "Make images of prompts",
            _ok(
                "The images, as tensors.",
                {JSON: bodies.InferenceAnswer, BYTES: FILE},
                {HEADER_LENGTH: header(length, pattern="^[1-9][0-9]*$")},
            ),
            WORK,
            (
                *parameters,
                KEY,
                _parameter("header", HEADER_LENGTH, length, pattern="^[0-9]+$"),
                ENCODED,
            ),
            {JSON: InferenceRequest, BYTES: FILE},
            INFERENCE,
        )


def _drain(method: str, id: str, summary: str, description: str, *errors: Any) -> Operation:
    return Operation(
        method,
        "/drain",
        id,
        summary,
        _ok("What is left.", bodies.Drained),
        (NotFoundError, *errors),
        keyless=True,
        elsewhere=True,
        description=f"{description} {_TOKEN}",
    )


def operations(names: ModelNames | None) -> list[Operation]:
    """All of them, for a server whose model has these names, if it is loaded."""
    job_events = _events("image_generation", "image_edit")
    of_job: Errors = (InvalidRequestError, NotFoundError, UnavailableError)
    image = Answer("The image.", IMAGE, image_headers())
    anything, text = {"type": "object"}, {"type": "string"}
    html, plain = {"text/html": text}, {"text/plain": text}
    document = _ok("OpenAPI 3.1.", {JSON: anything})
    return [
        *_tagged(
            "Images",
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
                body={FORM: EditRequest, JSON: EditBody},
                description="`image` is the image to edit. `mask` is transparent where it is to be "
                "repainted, or, if its alpha is the same throughout, white there; it has "
                "the proportions of `image`. All are PNG, JPEG or WebP, are turned as "
                "their EXIF says, and converted to sRGB; the image that the result begins with, "
                "and its mask, are scaled to the size of the result. `image[]` is `image`, which "
                "some models take several times, as references.",
            ),
            Operation(
                "post",
                "/v1/images/variations",
                "createImageVariation",
                "Not supported: send the image to be edited",
                {},
                (InvalidRequestError, BodyTooLargeError),
                body={FORM: anything},
            ),
        ),
        *_tagged(
            "Models",
            _get(
                "/v1/models",
                "listModels",
                "The model that is served, and its LoRAs",
                _ok("The model first.", bodies.ModelList),
                UnavailableError,
            ),
            _get(
                "/v1/models/{id}",
                "getModel",
                "What the model takes",
                _ok("The model, or a LoRA.", (bodies.Model, bodies.LoraModel)),
                *NAMED,
                parameters=(_model("id", names),),
            ),
            _get(
                "/v1/loras",
                "listLoras",
                "The LoRAs that requests may name",
                _ok("Sorted by name.", bodies.LoraList),
                UnavailableError,
            ),
            Operation(
                "post",
                "/v1/loras",
                "loadLora",
                "Have a LoRA in memory",
                _ok("The LoRA.", bodies.LoraModel),
                (*READING, *NAMED, ForbiddenError, RequestCancelledError),
                body={JSON: LoraRequest},
                description=f"It is one of the directory of `STEPWEAVE_LORAS`. {_ADMIN}",
            ),
            Operation(
                "delete",
                "/v1/loras/{name}",
                "removeLora",
                "Offer a LoRA no more, until it is loaded again",
                _ok("It is removed.", bodies.LoraRemoved),
                (*NAMED, ForbiddenError),
                (_parameter("path", "name", "The LoRA's name."),),
                description=f"Jobs that have it keep it. {_ADMIN}",
            ),
        ),
        *_tagged(
            "Jobs",
            _get(
                "/v1/jobs",
                "listJobs",
                "Stored jobs, newest first",
                _ok("The jobs of the request's key.", bodies.JobList),
                *of_job,
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
                    _parameter("query", "before", "The `next` of the previous page."),
                ),
                description="Disabled (404) unless API keys are set.",
            ),
            _get(
                "/v1/jobs/{id}",
                "getJob",
                "A job's state, and its result",
                _ok("The job.", JobView),
                *of_job,
                parameters=(JOB,),
            ),
            Operation(
                "delete",
                "/v1/jobs/{id}",
                "cancelJob",
                "Cancel a job, or delete one that has ended",
                _ok("Its last state.", JobView),
                of_job,
                (JOB,),
            ),
            _get(
                "/v1/jobs/{id}/events",
                "followJob",
                "Follow a job",
                {200: Answer("From its state now to its end.", STREAM, events=job_events)},
                *of_job,
                parameters=(JOB,),
            ),
        ),
        *_tagged(
            "BentoML",
            _native(
                "/generate", "generate", "One image", image, {JSON: ImageRequest}, example=EXAMPLE
            ),
            _native(
                "/generate_stream",
                "generateStream",
                "One image, and its progress",
                Answer("Events.", STREAM, JOB_HEADER, events=_events("image_generation")),
                {JSON: StreamRequest},
                example={**EXAMPLE, "partial_images": 2},
            ),
            _native(
                "/edit",
                "edit",
                "One image from another",
                image,
                {FORM: BentoMLEditRequest, JSON: BentoMLEditBody},
            ),
            _get(
                "/schema.json",
                "bentomlSchema",
                "The native API, for BentoML's clients",
                _ok("BentoML's own description.", {JSON: anything}),
                elsewhere=True,
            ),
        ),
        *_tagged("Open Inference Protocol", *_inference(names)),
        *_tagged(
            "Diffusers example server",
            Operation(
                "post",
                "/api/diffusers/inference",
                "diffusersExampleInference",
                "Text to image",
                _ok("URLs of the images.", bodies.DiffusersExampleAnswer, WARNINGS_HEADER),
                WORK,
                (KEY,),
                body={JSON: DiffusersExampleRequest},
                example={"prompt": EXAMPLE["prompt"]},
            ),
            _get(
                "/api/status",
                "diffusersExampleStatus",
                "The model, its memory and numbers of requests",
                _ok("Status.", bodies.DiffusersExampleStatus),
                UnavailableError,
            ),
        ),
        *_tagged(
            "Images",
            _get(
                "/images/{filename}",
                "getImage",
                "A stored image",
                _ok("The file.", IMAGE, FILE_HEADERS),
                *NAMED,
                parameters=(_parameter("path", "filename", "Its name, which nobody can guess."),),
            ),
        ),
        *_tagged(
            "Operation",
            _get(
                "/",
                "discover",
                "What this server is",
                _ok("JSON, or a page for browsers.", {JSON: bodies.Discovery, **html}),
            ),
            _get("/ui", "playground", "A page to try it", _ok("The page.", html)),
            _get("/openapi.json", "openapi", "This document", document, keyless=True),
            _get(
                "/docs",
                "documentation",
                "This document as a page",
                _ok("The page.", html),
                keyless=True,
            ),
            _get(
                "/docs/{file}",
                "documentationFile",
                "What that page loads",
                _ok("Script or style.", {"text/css": {}, "text/javascript": {}}),
                NotFoundError,
                parameters=(_parameter("path", "file", "Its name.", enum=sorted(FILES)),),
                keyless=True,
            ),
            _get("/docs.json", "docs", "This document, where BentoML has one", document),
            _get("/metrics", "metrics", "For Prometheus", _ok("The exposition format.", plain)),
            _probe("/livez", "livez", "Is the process alive?"),
            _probe("/healthz", "healthz", "Is the process alive?"),
            _probe("/readyz", "readyz", "Does it accept work?"),
            _probe("/health", "health", "Does it accept work?"),
            _drain(
                "post",
                "drain",
                "Announce that the server will stop",
                "`/readyz` is 503 from now on, and new work is refused `STEPWEAVE_DRAIN_NOTICE` "
                "seconds later.",
            ),
            _drain(
                "delete",
                "take_back_drain",
                "Take a drain back",
                "Until the process was told to end (409, code `terminating`).",
                ConflictError,
            ),
        ),
    ]
