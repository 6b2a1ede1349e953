"""Models of errors, generations and jobs, for answers, stored records and the OpenAPI document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer

from stepweave.errors import StepweaveError
from stepweave.parameters import SIZE, ImageFile, OutputFormat, ResolvedParameters, Timings
from stepweave.resource import Resource, absent
from stepweave.store.jobs import JobKind, JobState


def _milliseconds(seconds: float) -> float:
    return round(seconds, 3)


def error_types() -> list[str]:
    """All values of an error's `type`."""
    kinds: list[type[StepweaveError]] = [StepweaveError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return sorted({kind.type for kind in kinds})


class ErrorDetail(Resource):
    """Why a request or a job failed."""

    message: str = Field(description="For people: the wrong value, and the limit.")
    type: str = Field(json_schema_extra={"enum": list(error_types())})
    code: str = Field(
        description="For programs.", examples=["invalid_value", "queue_full", "model_not_found"]
    )
    param: str | None = Field(description="The field, parameter or header that is wrong, if any.")

    @classmethod
    def of(cls, error: StepweaveError) -> Self:
        return cls(message=error.message, type=error.type, code=error.code, param=error.param)


class Error(Resource):
    """The body of every error response."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: StepweaveError) -> Self:
        return cls(error=ErrorDetail.of(error))


class TokenDetails(Resource):
    text_tokens: int = Field(ge=0)
    image_tokens: int = Field(ge=0)


class Usage(Resource):
    """Usage of the request; an image's tokens are latent positions, before packing or patching."""

    input_tokens: int = Field(ge=0)
    input_tokens_details: TokenDetails = Field(
        description="Tokens of the prompts in the model's tokenizers, without padding (0 without a "
        "tokenizer); latent positions of an edit's source image."
    )
    output_tokens: int = Field(ge=0)
    output_tokens_details: TokenDetails = Field(
        description="Of all images together; text_tokens is 0."
    )
    total_tokens: int = Field(ge=0, description="Input and output.")
    images: int
    steps: int = Field(description="Denoising steps of all images.")
    pixels: int


class Outcome(Resource):
    """Members of every answer to a generation."""

    model: str
    usage: Usage
    parameters: ResolvedParameters
    timings: Timings
    warnings: list[str]
    outputs: dict[str, Any] | None = absent(
        description="Text and numbers that the pipeline returned in addition to images."
    )


class GenerationDetails(Outcome):
    """An answer to a generation without its images."""

    created: int = Field(description="Unix seconds.")
    size: str = Field(pattern=SIZE, description="Actual size of the images.")
    output_format: OutputFormat
    # OpenAI's type does not allow `auto`; `quality` is left out, as none of its values applies
    background: Literal["opaque"] = "opaque"


class _Image(Resource):
    seed: int
    flagged: bool = Field(description="Whether the pipeline's safety checker flagged it.")
    revised_prompt: None = None


class InlineImage(_Image):
    b64_json: str = Field(json_schema_extra={"contentEncoding": "base64"})


class LinkedImage(_Image):
    url: str = Field(description="The image's URL, valid for a limited time.")


class Generation(GenerationDetails):
    """An answer to a generation, with its images."""

    data: list[InlineImage | LinkedImage]


@dataclass(frozen=True)
class Answer:
    """The answer to a generation, for any HTTP surface."""

    details: GenerationDetails
    images: list[ImageFile]


class JobView(Resource):
    """A job's state, and its result once it has succeeded."""

    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    object: Literal["job"] = "job"
    kind: JobKind
    state: JobState
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    position: int | None = Field(
        None, description="Queue position, 1 for the first; null once the job runs."
    )
    eta_seconds: float | None = Field(
        None,
        gt=0,
        description="Predicted seconds until the job is done; null once it is, and before any job "
        "of the model has been timed.",
    )
    created: Annotated[float, PlainSerializer(_milliseconds)] = Field(description="Unix seconds.")
    parameters: ResolvedParameters
    warnings: list[str]
    error: ErrorDetail | None = None
    result: Generation | None = None


# members of a job that its record has under the same names
RECORDED = ("id", "kind", "state", "step", "total_steps", "created", "warnings", "error")
