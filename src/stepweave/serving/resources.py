"""Errors, generations and jobs as clients are told of them, in answers, records and the OpenAPI
document."""

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
    """All that an error's `type` may be."""
    kinds: list[type[StepweaveError]] = [StepweaveError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return sorted({kind.type for kind in kinds})


class ErrorDetail(Resource):
    """What went wrong."""

    message: str = Field(description="For people: the offending value, and the limit.")
    type: str = Field(json_schema_extra={"enum": list(error_types())})
    code: str = Field(
        description="For programs.", examples=["invalid_value", "queue_full", "model_not_found"]
    )
    param: str | None = Field(
        description="The field, parameter or header that is wrong, if it is one."
    )

    @classmethod
    def of(cls, error: StepweaveError) -> Self:
        return cls(message=error.message, type=error.type, code=error.code, param=error.param)


class Error(Resource):
    """The body of every refusal and failure."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: StepweaveError) -> Self:
        return cls(error=ErrorDetail.of(error))


class TokenDetails(Resource):
    text_tokens: int = Field(ge=0)
    image_tokens: int = Field(ge=0)


class Usage(Resource):
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


class Outcome(Resource):
    """What the answers to a generation have in common beside its images."""

    model: str
    usage: Usage
    parameters: ResolvedParameters
    timings: Timings
    warnings: list[str]
    outputs: dict[str, Any] | None = absent(
        description="What the pipeline returned beside images, where that is text or numbers."
    )


class GenerationDetails(Outcome):
    """What a generation is answered with beside its images."""

    created: int = Field(description="Unix seconds.")
    size: str = Field(pattern=SIZE, description="Of the images, as they were made.")
    output_format: OutputFormat
    # OpenAI's type has no `auto` here, and `quality` no value that would be true
    background: Literal["opaque"] = "opaque"


class _Image(Resource):
    seed: int
    flagged: bool = Field(description="Whether the pipeline's safety checker flagged it.")
    revised_prompt: None = None


class InlineImage(_Image):
    b64_json: str = Field(json_schema_extra={"contentEncoding": "base64"})


class LinkedImage(_Image):
    url: str = Field(description="Where the image is, for a while.")


class Generation(GenerationDetails):
    """Images, and everything about their making."""

    data: list[InlineImage | LinkedImage]


@dataclass(frozen=True)
class Answer:
    """What a generation is answered with, on any surface."""

    details: GenerationDetails
    images: list[ImageFile]


class JobView(Resource):
    """Where a job stands, and its result once it is there."""

    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    object: Literal["job"] = "job"
    kind: JobKind
    state: JobState
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    position: int | None = Field(
        None, description="Place among all that wait, 1 for the first; null once it runs."
    )
    eta_seconds: float | None = Field(
        None,
        gt=0,
        description="Seconds until it will be done; null once it is, and while nothing of the "
        "model has been timed.",
    )
    created: Annotated[float, PlainSerializer(_milliseconds)] = Field(description="Unix seconds.")
    parameters: ResolvedParameters
    warnings: list[str]
    error: ErrorDetail | None = None
    result: Generation | None = None


# members of a job that its record has by the same names
RECORDED = ("id", "kind", "state", "step", "total_steps", "created", "warnings", "error")
