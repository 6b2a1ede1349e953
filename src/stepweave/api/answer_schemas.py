"""What the HTTP surfaces answer, for the OpenAPI document.

Handlers build these as dicts; tests hold real answers against them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from stepweave.errors import StepweaveError
from stepweave.parameters import OutputFormat, PriorityName, Timings
from stepweave.serving.request import State

STAGES = (
    "starting",
    "importing",
    "loading",
    "warming_up",
    "ready",
    "draining",
    "closed",
    "failed",
    "stuck",
)


def _absent() -> Any:
    """Marks what answers may leave out; documents have no default for it."""
    raise AssertionError("answers are not made of these models")


def _error_types() -> list[str]:
    kinds: list[type[StepweaveError]] = [StepweaveError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return sorted({kind.type for kind in kinds})


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="For people: the offending value, and the limit.")
    type: str = Field(json_schema_extra={"enum": list(_error_types())})
    code: str = Field(
        description="For programs.", examples=["invalid_value", "queue_full", "model_not_found"]
    )
    param: str | None = Field(
        description="The field, parameter or header that is wrong, if it is one."
    )


class Error(BaseModel):
    """The body of every refusal and failure."""

    error: ErrorDetail


class ExamplesError(Error):
    """The same on the routes of diffusers' example servers, whose clients read `detail`."""

    detail: str = Field(description="The message.")


class ProtocolError(BaseModel):
    """The body of every refusal and failure of the Open Inference Protocol."""

    error: str = Field(description="For people: the offending value, and the limit.")


class Health(BaseModel):
    """Where the server stands."""

    stage: str = Field(json_schema_extra={"enum": list(STAGES)})
    progress: float = Field(ge=0, le=1, description="Share of the way to `ready`.")
    message: str
    store: str | None = Field(
        description="Why jobs and URLs of images cannot be stored, as `files full: No space left "
        "on device`; null while they can."
    )


class Unhealthy(Error, Health):
    """A probe's refusal: why, and where the server stands."""


class Drained(BaseModel):
    """The server leaves, or stays after all."""

    stage: str = Field(json_schema_extra={"enum": list(STAGES)})
    in_flight: int = Field(ge=0, description="Requests accepted and not yet done.")


class MountedRoute(BaseModel):
    path: str
    methods: list[str]


class Discovery(BaseModel):
    """What this server is, and where its surfaces are."""

    name: Literal["stepweave"]
    version: str
    model: str | None = Field(description="Id of the model; null while it is loaded.")
    stage: str = Field(json_schema_extra={"enum": list(STAGES)})
    routes: list[MountedRoute]
    links: dict[str, str]


class Unshared(BaseModel):
    """A module whose calls share no forward, or some of whose do not."""

    call: str = Field(description="The module, or its method.")
    reason: str = Field(
        description="One of few codes; `stepweave_unshared_calls_total` counts calls by it."
    )
    detail: str


class Certificate(BaseModel):
    """Whether calls of a kind may share a forward, and the proof."""

    call: str
    sample: str
    state: str
    reason: str
    largest_error: float
    rows: int
    proofs: int
    merged_forwards: int


class SchedulerSteps(BaseModel):
    """Values of `num_inference_steps` that were tried with a scheduler. Every other one is tried
    when it is first asked for."""

    works: list[int] = Field(description="It runs with these.")
    fails: list[int] = Field(description="It does not run with these; they are refused.")


class Limits(BaseModel):
    """What requests may ask for. The ends of each range were tried before the server was ready."""

    size_multiple: int = Field(description="Both sides of an image are multiples of it.")
    min_side: int
    max_side: int
    only_size: str | None = Field(
        description="The one size that there is, where others fail or come out in another size."
    )
    guidance_range: tuple[float, float]
    max_images: int
    max_prompt_characters: int


class ModelDetails(Limits):
    """What the model takes, and how it is run."""

    pipeline: str = Field(description="Class of the diffusers pipeline.")
    device: str
    dtype: str
    native_size: str
    max_pixels: int
    max_input_pixels: int = Field(description="Of an image, or a mask, that is sent.")
    default_num_inference_steps: int
    max_num_inference_steps: int
    default_guidance_scale: float | None
    presets: list[str] = Field(
        description="Where defaults come from, the strongest first, if not from the pipeline "
        "itself."
    )
    schedulers: list[str] = Field(description="What `scheduler` may name.")
    scheduler_steps: dict[str, SchedulerSteps] = Field(
        description="Of those that run with some values of `num_inference_steps` only."
    )
    edits: list[Literal["image_to_image", "inpainting"]]
    limits_of_edits: dict[str, Limits] = Field(
        description="Of those edits whose limits differ from the others."
    )
    previews: bool = Field(description="Whether streams have previews.")
    batching: Literal["off", "threads", "request", "step"]
    switches: dict[str, Any]
    certificates: list[Certificate]
    unshared: list[Unshared] = Field(description="What runs alone, or takes turns, and why.")


class Model(BaseModel):
    """A model, as OpenAI describes one, and its `stepweave` details."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["stepweave"]
    stepweave: ModelDetails


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class ResolvedParameters(BaseModel):
    """Everything that was asked for, defaults filled in; what there is not is left out."""

    prompt: str
    negative_prompt: str = Field(default_factory=_absent)
    size: str = Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*$")
    seed: int = Field(ge=0)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float = Field(
        default_factory=_absent, description="Where the pipeline has one."
    )
    scheduler: str = Field(default_factory=_absent)
    strength: float = Field(default_factory=_absent, description="Of edits.")
    reproducible: bool = Field(default_factory=_absent)
    n: int = Field(ge=1)
    priority: PriorityName = Field(default_factory=_absent)
    deadline_ms: int = Field(default_factory=_absent, ge=1)
    output_format: OutputFormat = Field(default_factory=_absent)
    output_compression: int = Field(default_factory=_absent, ge=0, le=100)


class InlineImage(BaseModel):
    b64_json: str = Field(json_schema_extra={"contentEncoding": "base64"})
    seed: int
    flagged: bool = Field(description="Whether the pipeline's safety checker flagged it.")
    revised_prompt: None


class LinkedImage(BaseModel):
    url: str = Field(description="Where the image is, for a while.")
    seed: int
    flagged: bool = Field(description="Whether the pipeline's safety checker flagged it.")
    revised_prompt: None


class TokenDetails(BaseModel):
    text_tokens: int = Field(ge=0)
    image_tokens: int = Field(ge=0)


class Usage(BaseModel):
    """Of the whole request. Of an image, tokens are positions of its latents, before these are
    packed or made into patches."""

    input_tokens: int = Field(ge=0)
    input_tokens_details: TokenDetails = Field(
        description="Tokens that the model's tokenizers read of the prompts, padding left out (0 "
        "where it has no tokenizer); positions of the image that an edit starts from."
    )
    output_tokens: int = Field(ge=0)
    output_tokens_details: TokenDetails = Field(
        description="Of all images together; there is no text."
    )
    total_tokens: int = Field(ge=0, description="Of input and output.")
    images: int
    steps: int = Field(description="Denoising steps of all images.")
    pixels: int


class _Outcome(BaseModel):
    model: str
    usage: Usage
    parameters: ResolvedParameters
    timings: Timings
    warnings: list[str]
    outputs: dict[str, Any] = Field(
        default_factory=_absent,
        description="What the pipeline returned beside images, where that is text or numbers.",
    )


class Generation(_Outcome):
    """Images, and everything about their making."""

    created: int = Field(description="Unix seconds.")
    size: str = Field(
        pattern=r"^[1-9][0-9]*x[1-9][0-9]*$", description="Of the images, as they were made."
    )
    output_format: OutputFormat
    background: Literal["opaque"]
    data: list[InlineImage | LinkedImage]


class Job(BaseModel):
    """Where a job stands, and its result once it is there."""

    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    object: Literal["job"]
    kind: Literal["generation", "edit"]
    state: State
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    position: int | None = Field(
        description="Place among all that wait, 1 for the first; null once it runs."
    )
    eta_seconds: float | None = Field(
        gt=0,
        description="Seconds until it will be done; null once it is, and while nothing of the "
        "model has been timed.",
    )
    created: float = Field(description="Unix seconds.")
    parameters: ResolvedParameters
    warnings: list[str]
    error: ErrorDetail | None
    result: Generation | None


class JobList(BaseModel):
    object: Literal["list"]
    data: list[Job]
    next: str | None = Field(
        description="What to send as `before` for those that follow; null at the end."
    )


class PartialImage(BaseModel):
    """Event: a preview."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    b64_json: str = Field(json_schema_extra={"contentEncoding": "base64"})
    partial_image_index: int = Field(ge=0)
    image_index: int = Field(ge=0)
    created_at: int
    size: str
    output_format: OutputFormat
    quality: Literal["auto"]
    background: Literal["auto"]


class Completed(_Outcome):
    """Event: an image is done. With `response_format` `url` it is stored, too."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    b64_json: str = Field(json_schema_extra={"contentEncoding": "base64"})
    url: str = Field(default_factory=_absent, description="Where the image is, for a while.")
    created_at: int
    size: str
    output_format: OutputFormat
    quality: Literal["auto"]
    background: Literal["auto"]
    image_index: int = Field(ge=0)
    seed: int
    flagged: bool = Field(description="Whether the pipeline's safety checker flagged it.")


class QueuedEvent(BaseModel):
    """Event: the place in the queue."""

    type: Literal["stepweave.queued"]
    id: str
    position: int = Field(ge=1)
    eta_seconds: float | None = Field(gt=0)


class ProgressEvent(BaseModel):
    """Event: steps done."""

    type: Literal["stepweave.progress"]
    id: str
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    eta_seconds: float | None = Field(gt=0)


class ProtocolMetadata(BaseModel):
    """The server, in the Open Inference Protocol."""

    name: Literal["stepweave"]
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: Literal[True]


class NotLive(ProtocolError):
    live: Literal[False]


class Ready(BaseModel):
    ready: Literal[True]


class NotReady(ProtocolError):
    ready: Literal[False]


class ModelReady(Ready):
    name: str


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model's tensors, in the Open Inference Protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServedModels(BaseModel):
    """Names of the models, as KServe's servers list them."""

    models: list[str]


class IndexedModel(BaseModel):
    """A model of the repository, as Triton's servers list them."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = Field(description="Why it is not ready.")


class TensorConfiguration(BaseModel):
    name: str
    data_type: str
    dims: list[int]


class InputConfiguration(TensorConfiguration):
    optional: bool


class TransactionPolicy(BaseModel):
    decoupled: Literal[False]


class ModelConfiguration(BaseModel):
    """The model's tensors, as Triton's servers tell of them."""

    name: str
    platform: str
    backend: Literal["stepweave"]
    max_batch_size: Literal[0]
    input: list[InputConfiguration]
    output: list[TensorConfiguration]
    model_transaction_policy: TransactionPolicy


class ReturnedTensor(TensorMetadata):
    parameters: dict[str, bool | int | float | str]
    data: list[str] = Field(
        default_factory=_absent, description="Left out where the tensor follows the JSON."
    )


class InferenceAnswer(BaseModel):
    """Images as tensors: `image` has their files, `parameters` a JSON text for each."""

    id: str = Field(default_factory=_absent, description="The request's, if it had one.")
    model_name: str
    model_version: str
    outputs: list[ReturnedTensor]


class DiffusersExampleAnswer(BaseModel):
    response: list[str] = Field(description="URLs of the images.")


class DiffusersExampleStatus(BaseModel):
    """The diffusers example server's status."""

    current_model: str
    type_models: Literal["t2im"]
    memory: dict[str, float | str]
    active_inferences: int
    total_requests: int


ANSWERS: tuple[type[BaseModel], ...] = (
    Error,
    ExamplesError,
    ProtocolError,
    Health,
    Unhealthy,
    Drained,
    Discovery,
    Model,
    ModelList,
    Generation,
    Job,
    JobList,
    PartialImage,
    Completed,
    QueuedEvent,
    ProgressEvent,
    ProtocolMetadata,
    Live,
    NotLive,
    Ready,
    NotReady,
    ModelReady,
    ModelMetadata,
    ServedModels,
    IndexedModel,
    ModelConfiguration,
    InferenceAnswer,
    DiffusersExampleAnswer,
    DiffusersExampleStatus,
)
