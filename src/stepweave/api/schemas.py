"""Bodies of the HTTP surfaces. What depends on the model (size, limits) is checked when the request is resolved."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepweave.errors import SHOWN, InvalidRequest, UnsupportedMedia, shown
from stepweave.generation import MAX_SEED, PriorityName

MAX_DEADLINE_MS = 24 * 3600 * 1000
Size = Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", examples=["64x64"])]


class ImageRequest(BaseModel):
    """What every surface takes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="What the picture should show.")
    negative_prompt: str | None = Field(None, description="What it should not show.")
    size: Size | None = Field(None, description="WIDTHxHEIGHT in pixels, or `auto` for the model's own.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Same seed, same picture; drawn if absent.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Classifier-free guidance; 1 turns it off.")
    reproducible: bool = Field(False, description="Bitwise the pipeline's own picture; it shares no step with others.")
    priority: PriorityName = Field("normal", description="Requests of a higher class go first.")
    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="Milliseconds from now within which the picture must be made: refused with 429 if it cannot be, ended "
        "with 504 at the first step after.",
    )
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="File format of the picture.")


class GenerationRequest(ImageRequest):
    """Body of `POST /v1/images/generations`: OpenAI's Images API and Stepweave's extensions."""

    model: str | None = Field(None, description="Id of the model, if given.")
    n: int = Field(1, ge=1, description="Number of pictures; picture i has seed + i.")
    response_format: Literal["b64_json"] = Field("b64_json", description="How pictures are returned.")


def require_json(content_type: str) -> None:
    """Raise UnsupportedMedia unless the content type is JSON."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMedia(f"The content type is {shown(content_type)}; send application/json.")


RequestT = TypeVar("RequestT", bound=ImageRequest)


def parse(body: bytes, schema: type[RequestT]) -> RequestT:
    """Read a JSON body. Raises InvalidRequest naming the first wrong field, its value and what is allowed."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from None


def _explain(problem: Any) -> InvalidRequest:
    if problem["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {problem['ctx']['error']}.", code="invalid_json")
    # strings that JSON's reader accepts and UTF-8 does not (lone surrogates) have no field to blame
    param = ".".join(str(part) for part in problem["loc"])[:SHOWN] or None
    if problem["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown field {shown(param)}.", code="unknown_field", param=param)
    if problem["type"] == "missing":
        return InvalidRequest(f"{param} is missing.", code="missing_field", param=param)
    if param == "size":
        return InvalidRequest(f"size is {shown(problem['input'])}: say WIDTHxHEIGHT in pixels, or auto.", param=param)
    return InvalidRequest(f"{param or 'body'} is {shown(problem['input'])}: {problem['msg']}.", param=param)
