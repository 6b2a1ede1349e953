"""Answers of the HTTP surfaces other than generations and jobs (`serving.resources`), and the list
of all that are in the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, RootModel

from stepweave.calls import ArgumentType
from stepweave.config.engine import Mode
from stepweave.parameters import OutputFormat
from stepweave.resource import Resource, absent
from stepweave.serving.resources import Error, Generation, JobView, Outcome
from stepweave.serving.status import Stage


class ExamplesError(Error):
    """The same on the routes of diffusers' example servers, whose clients read `detail`."""

    detail: str = Field(description="The message.")


class ProtocolError(Resource):
    """The body of every refusal and failure of the Open Inference Protocol."""

    error: str = Field(description="For people: the offending value, and the limit.")


class Health(Resource):
    """The state of the server."""

    stage: Stage
    progress: float = Field(ge=0, le=1, description="From 0 to 1, when it is `ready`.")
    message: str
    store: str | None = Field(
        description="Why jobs and URLs of images cannot be stored, as `files full: No space left "
        "on device`; null while they can."
    )


class Unhealthy(Error, Health):
    """A failed probe: the reason, and the state of the server."""


class Drained(Resource):
    """The server after a drain, or after one was taken back."""

    stage: Stage
    in_flight: int = Field(ge=0, description="Requests accepted and not yet done.")


class MountedRoute(Resource):
    path: str
    methods: list[str]
    summary: str
    curl: list[str] = Field(description="A command for each method.")


class Discovery(Resource):
    """What this server is, and where its surfaces are."""

    name: Literal["stepweave"] = "stepweave"
    version: str
    model: str | None = Field(description="Id of the model; null until it is loaded.")
    stage: Stage
    routes: list[MountedRoute]
    links: dict[str, str]


class Unshared(Resource):
    """A module whose calls share no forward, or some of whose do not."""

    call: str = Field(description="The module, or its method.")
    reason: str = Field(
        description="One of few codes; `stepweave_unshared_calls_total` counts calls by it."
    )
    detail: str


class Certificate(Resource):
    """Whether calls of a kind may share a forward, and the proof."""

    call: str
    sample: str
    state: str
    reason: str
    largest_error: float
    rows: int
    proofs: int
    merged_forwards: int


class SchedulerSteps(Resource):
    """Values of `num_inference_steps` that were tried with a scheduler. Every other one is tried
    when it is first asked for."""

    works: list[int] = Field(description="It runs with these.")
    fails: list[int] = Field(description="It does not run with these; they are refused.")


class Limits(Resource):
    """What requests may ask for. The ends of each range were tried before the server was ready."""

    size_multiple: int = Field(description="Both sides of an image are multiples of it.")
    min_side: int
    max_side: int
    only_size: str | None = Field(
        description="The only size, if the pipeline fails with others or changes them."
    )
    guidance_range: tuple[float, float]
    max_images: int
    max_prompt_characters: int


class ModelArgument(Resource):
    """An argument of the pipeline's call that requests may set by its name."""

    name: str
    type: ArgumentType
    required: bool
    default: Any = Field(description="The preset's, or else the pipeline's own.")
    minimum: float | None = Field(description="Of numbers, and of those in a tensor.")
    maximum: float | None
    max_items: int | None = Field(description="Of lists.")
    max_length: int | None = Field(description="Characters of a text, or of each in a list.")
    description: str


class ModelImage(Resource):
    """An image that requests may send by its name."""

    name: str
    type: Literal["image", "mask"]
    required: bool = Field(description="By requests of the model's main kind.")
    several: bool = Field(description="Whether a request may have several.")
    description: str


class ModelComponent(Resource):
    """A component beside the model, which requests may name."""

    name: str
    field: str = Field(description="The field of requests that names it.")
    model: str = Field(description="Its class.")
    image: str | None = absent(description="The image that it is guided by, if there is one.")
    edits: list[str] = Field(description="The edits for which it can be used.")
    generations: bool = Field(description="Whether it can be used without another image.")
    default: bool = Field(description="Whether requests that name none of its field use it.")
    description: str


class ModelEmbedding(Resource):
    """A textual inversion."""

    token: str = Field(description="What prompts use it by.")
    vectors: int = Field(description="Tokens of the text encoder that it takes.")


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
        description="Where defaults come from, if not from the pipeline itself; the first that has "
        "a value is used."
    )
    schedulers: list[str] = Field(description="What `scheduler` may name.")
    schedulers_of_edits: dict[str, list[str]] = Field(
        description="The same of those edits that take others."
    )
    scheduler_steps: dict[str, SchedulerSteps] = Field(
        description="Of those that only run with some values of `num_inference_steps`."
    )
    arguments: list[ModelArgument]
    images: list[ModelImage]
    components: list[ModelComponent]
    prompt: bool = Field(description="Whether it takes one.")
    embeddings: list[ModelEmbedding] = Field(description="Textual inversions.")
    generations: bool = Field(description="Whether it makes images without being sent some.")
    edits: list[Literal["image_to_image", "inpainting"]]
    limits_of_edits: dict[str, Limits] = Field(
        description="Of those edits whose limits differ from the others."
    )
    previews: bool = Field(description="Whether streams have previews.")
    batching: Mode
    switches: dict[str, Any]
    certificates: list[Certificate]
    unshared: list[Unshared] = Field(description="What runs alone, or takes turns, and why.")


class Model(Resource):
    """A model, as OpenAI describes one, and its `stepweave` details."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["stepweave"] = "stepweave"
    stepweave: ModelDetails


class LoraModel(Resource):
    """A LoRA of the model, as OpenAI describes a model: `id` is what requests may call `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["stepweave"] = "stepweave"
    root: str = Field(description="Its name in `lora`.")
    parent: str = Field(description="The model that it is for.")
    loaded: bool = Field(description="Whether it is in memory; others are read when named.")
    bytes: int | None = Field(description="Of its weights in memory.")
    rank: int | None = Field(description="The largest of its layers.")
    components: list[str] | None = Field(description="The parts of the model that it changes.")


class LoraList(Resource):
    object: Literal["list"] = "list"
    data: list[LoraModel]


class LoraRemoved(Resource):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelList(Resource):
    object: Literal["list"] = "list"
    data: list[Model | LoraModel] = Field(description="The model, then its LoRAs.")


class JobList(Resource):
    object: Literal["list"] = "list"
    data: list[JobView]
    next: str | None = Field(
        description="What to send as `before` for the next page; null at the end."
    )


class PartialImage(Resource):
    """Event: a preview."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    b64_json: str = Field(json_schema_extra={"contentEncoding": "base64"})
    partial_image_index: int = Field(ge=0)
    image_index: int = Field(ge=0)
    created_at: int
    size: str
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    background: Literal["auto"] = "auto"


class Completed(Outcome):
    """Event: an image is done. With `response_format` `url`, it is also stored."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    b64_json: str = Field(json_schema_extra={"contentEncoding": "base64"})
    url: str | None = absent(description="URL of the stored image, until it expires.")
    created_at: int
    size: str
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    background: Literal["auto"] = "auto"
    image_index: int = Field(ge=0)
    seed: int
    flagged: bool = Field(description="Whether the pipeline's safety checker flagged it.")


class QueuedEvent(Resource):
    """Event: the queue position."""

    type: Literal["stepweave.queued"] = "stepweave.queued"
    id: str
    position: int = Field(ge=1)
    eta_seconds: float | None = Field(gt=0)


class ProgressEvent(Resource):
    """Event: steps done."""

    type: Literal["stepweave.progress"] = "stepweave.progress"
    id: str
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    eta_seconds: float | None = Field(gt=0)


class ProtocolMetadata(Resource):
    """The server, in the Open Inference Protocol."""

    name: Literal["stepweave"] = "stepweave"
    version: str
    extensions: list[str]


class Live(Resource):
    live: Literal[True] = True


class NotLive(ProtocolError):
    live: Literal[False] = False


class Ready(Resource):
    ready: Literal[True] = True


class NotReady(ProtocolError):
    ready: Literal[False] = False


class ModelReady(Ready):
    name: str


class TensorMetadata(Resource):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Resource):
    """The model's tensors, in the Open Inference Protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServedModels(Resource):
    """Names of the models, as KServe's servers list them."""

    models: list[str]


ModelState = Literal["READY", "UNAVAILABLE"]


class IndexedModel(Resource):
    """A model of the repository, as Triton's servers list them."""

    name: str
    version: str
    state: ModelState
    reason: str = Field(description="Why it is not ready.")


class RepositoryIndex(Resource, RootModel[list[IndexedModel]]):
    """The models of the repository."""


class TensorConfiguration(Resource):
    name: str
    data_type: str
    dims: list[int]


class InputConfiguration(TensorConfiguration):
    optional: bool


class TransactionPolicy(Resource):
    decoupled: Literal[False] = False


class ModelConfiguration(Resource):
    """The model's tensors, as Triton's servers tell of them."""

    name: str
    platform: str
    backend: Literal["stepweave"] = "stepweave"
    max_batch_size: Literal[0] = 0
    input: list[InputConfiguration]
    output: list[TensorConfiguration]
    model_transaction_policy: TransactionPolicy = TransactionPolicy()


class ReturnedTensor(TensorMetadata):
    parameters: dict[str, bool | int | float | str]
    data: list[str] | None = absent(description="Left out where the tensor follows the JSON.")


class InferenceAnswer(Resource):
    """Images as tensors: `image` has their files, `parameters` a JSON text for each."""

    id: str | None = absent(description="The request's, if it had one.")
    model_name: str
    model_version: str
    outputs: list[ReturnedTensor]


class DiffusersExampleAnswer(Resource):
    response: list[str] = Field(description="URLs of the images.")


class DiffusersExampleStatus(Resource):
    """The diffusers example server's status."""

    current_model: str
    type_models: Literal["t2im"] = "t2im"
    memory: dict[str, float | str]
    active_inferences: int
    total_requests: int


# all of this module, and those of `serving.resources`
ANSWERS: tuple[type[Resource], ...] = (
    *(Error, Generation, JobView),
    *(
        model
        for model in list(globals().values())
        if isinstance(model, type) and issubclass(model, Resource) and model.__module__ == __name__
    ),
)
