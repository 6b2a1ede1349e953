"""Bodies of the HTTP surfaces. Size and limits, which depend on the model, are checked when the
request is resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json
from python_multipart.multipart import parse_options_header

from stepweave.errors import (
    SHOWN,
    InvalidRequestError,
    UnsupportedMediaTypeError,
    did_you_mean,
    shown,
)
from stepweave.parameters import LORA_TEXT, ImageRequest, ResponseFormat
from stepweave.threads import on_thread

MAX_PARTIAL_IMAGES = 3
MAX_SAME = 16  # images of one name, as in OpenAI's API
NULL = "null"  # in a form: the field is absent
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")  # of JSON and forms
LONG = 32 * 1024  # bytes beyond which a body is not parsed on the event loop
# times the number of fields: with more members, none is validated, since each would become an error
MANY = 4
PROMPTS = ("prompt", "negative_prompt")
MOST_NAMED = 5  # of what is ignored
MOST_PARTS = 20_000  # commas and brackets of a long body in JSON
# what other servers and pipelines call a field
MEANT = {
    "batch_size": "n",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "height": "size",
    "image_size": "size",
    "init_image": "image",
    "num_images": "n",
    "num_images_per_prompt": "n",
    "num_steps": "num_inference_steps",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "sampling_steps": "num_inference_steps",
    "steps": "num_inference_steps",
    "width": "size",
}
# of pipelines, for tensors, functions and dictionaries
NEVER = re.compile(r"latents|embeds|callback|generator|_kwargs$")


class StreamRequest(ImageRequest):
    """A request whose progress can be followed."""

    partial_images: int = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="Number of previews in a stream."
    )
    events: Literal["openai", "all"] = Field(
        "openai",
        description="Which events a stream has: OpenAI's, or all, with queue position and "
        "progress.",
    )


class OpenAIRequest(StreamRequest):
    """Further fields of OpenAI's Images API; those without use for a diffusion model are accepted
    and ignored, with a warning."""

    IGNORED: ClassVar[tuple[str, ...]] = (
        "quality",
        "style",
        "background",
        "moderation",
        "complexity",
    )
    # identify people: warnings do not repeat them
    IGNORED_NAMES: ClassVar[tuple[str, ...]] = ("safety_identifier", "user")
    REFUSED: ClassVar[Mapping[str, str]] = {
        "svg": "this server makes no SVG; leave it out, and let output_format be png, jpeg or webp",
        "frame_count": "an image has one frame; leave it out",
        "frame_duration_ms": "an image has one frame; leave it out",
        "markup": "draw it into image, or send a mask of what is to be repainted",
    }

    model: str | None = Field(None, description="Name of the model, if given.")
    n: int = Field(1, ge=1, description="Number of images; image i has seed + i.")
    response_format: ResponseFormat | None = Field(None, description="How images are returned.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    user: str | None = Field(None, max_length=512, description="Ignored.")
    safety_identifier: str | None = Field(None, max_length=512, description="Ignored.")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(None, description="Ignored.")
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Ignored.")
    background: Literal["auto", "transparent", "opaque"] | None = Field(
        None, description="Ignored."
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="Ignored.")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="Ignored.")

    def ignored(self) -> list[str]:
        """A warning for each field that is ignored and does not say `auto`."""
        given = ((name, getattr(self, name)) for name in self.IGNORED)
        warnings = [
            f"{name}: {value!r} has no effect here."
            for name, value in given
            if value not in (None, "auto")
        ]
        return warnings + [
            f"{name}: it has no effect here." for name in self.IGNORED_NAMES if getattr(self, name)
        ]


class GenerationRequest(OpenAIRequest):
    """Body of `POST /v1/images/generations`: OpenAI's Images API and Stepweave's extensions."""


class Edit(BaseModel):
    """What an edit takes beside an image."""

    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How much noise is added to the image: near 0, little of it changes; with 1, "
        "all.",
    )


class EditRequest(Edit, OpenAIRequest):
    """Fields of `POST /v1/images/edits` less its files, `image` and `mask`."""

    IGNORED = (*OpenAIRequest.IGNORED, "input_fidelity")

    input_fidelity: Literal["high", "low"] | None = Field(None, description="Ignored.")


DataURL = Annotated[
    str,
    Field(
        description="The image itself: `data:image/png;base64,...`.",
        json_schema_extra={"pattern": r"^data:image/[a-z]+;base64,"},
    ),
]


class ImageReference(BaseModel):
    """An image as OpenAI's API has it in JSON; only data URLs are read, never others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image_url: DataURL


File = DataURL | ImageReference
Files = File | Annotated[list[File], Field(min_length=1, max_length=MAX_SAME, fail_fast=True)]


class JSONImages(BaseModel):
    """The images of an edit in JSON."""

    IMAGES: ClassVar[tuple[str, ...]] = ("image", "images", "mask")

    image: Files | None = Field(None, description="The image to edit, or several references.")
    images: Files | None = Field(None, description="As OpenAI's API names `image` in JSON.")
    mask: File | None = Field(
        None, description="Transparent where the image is to be repainted, or white there."
    )


class EditBody(JSONImages, EditRequest):
    """Body of `POST /v1/images/edits` in JSON, with its images as data URLs."""

    IGNORED = EditRequest.IGNORED


class BentoMLEditRequest(Edit, ImageRequest):
    """Fields of `POST /edit` less its files, `image` and `mask`."""


class BentoMLEditBody(JSONImages, BentoMLEditRequest):
    """Body of `POST /edit` in JSON, with its images as data URLs."""


def require_json(content_type: str, *others: str) -> None:
    """Raise UnsupportedMediaTypeError unless the content type is JSON in UTF-8, or one of `others`;
    empty is none."""
    kind, parameters = parse_options_header(content_type)
    if kind.decode("latin-1") in others:
        return
    if not is_json(content_type):
        told = (
            " (curl -d sends it unless told otherwise)"
            if kind == b"application/x-www-form-urlencoded"
            else ""
        )
        wanted = " or ".join(["application/json", *filter(None, others)])
        raise UnsupportedMediaTypeError(
            f"The content type is {shown(content_type)}{told}; send the header `Content-Type: "
            f"{wanted}`."
        )
    charset = parameters.get(b"charset", b"").decode("latin-1") or CHARSETS[0]
    if charset.lower() not in CHARSETS:
        raise UnsupportedMediaTypeError(
            f"The charset of the content type is {shown(charset)}; send JSON in utf-8."
        )


def is_json(content_type: str) -> bool:
    """Whether a content type is JSON."""
    kind = parse_options_header(content_type)[0]
    return kind == b"application/json" or (
        kind.startswith(b"application/") and kind.endswith(b"+json")
    )


def require_form(content_type: str) -> None:
    """Raise UnsupportedMediaTypeError unless the content type is that of a form with files."""
    if parse_options_header(content_type)[0] != b"multipart/form-data":
        raise UnsupportedMediaTypeError(
            f"The content type is {shown(content_type)}; send multipart/form-data, or JSON with "
            "the header `Content-Type: application/json` and images as data URLs."
        )


RequestT = TypeVar("RequestT", bound=BaseModel)


def parse(body: bytes, schema: type[RequestT]) -> RequestT:
    """Read a JSON body, in which a member that is null is absent, whatever its name.

    Raises InvalidRequestError naming the first wrong field, its value and what is allowed.
    """
    check_parts(body)
    if len(body) > LONG or b"null" in body:
        body = _without_nulls(body, schema)
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise explain(error, schema) from None


def check_parts(body: bytes) -> None:
    """Raise InvalidRequestError for a JSON body of more parts than any request needs, before it is
    read: each part takes hundreds of bytes as an object, and more if it is wrong. Texts may have
    commas, base64 has none."""
    if len(body) > LONG:
        parts = sum(body.count(mark) for mark in (b",", b"[", b"{"))
        if parts > MOST_PARTS:
            raise InvalidRequestError(
                f"The body has {parts} commas and brackets; the limit is {MOST_PARTS}.",
                code="invalid_json",
            )


async def parse_off_loop(body: bytes, schema: type[RequestT]) -> RequestT:
    """As `parse`, on another thread if the body is long."""
    return await on_thread(None, parse, body, schema) if len(body) > LONG else parse(body, schema)


def _without_nulls(body: bytes, schema: type[BaseModel]) -> bytes:
    """The body less members that are null. Raises InvalidRequestError if it has far too many
    members."""
    try:
        values = from_json(body, cache_strings="none")
    except ValueError:
        return body  # validation tells what is wrong
    if isinstance(values, dict):
        check_members(values, schema)
    return to_json(without_nulls(values)) if b"null" in body else body


def without_nulls(value: Any) -> Any:
    """JSON less the members of objects that are null, however deep they stand. Elements of arrays
    stay."""
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    return [without_nulls(element) for element in value] if isinstance(value, list) else value


def some_of(names: Sequence[str]) -> str:
    """The first of the names that a client sent, for a warning."""
    more = ["..."] if len(names) > MOST_NAMED else []
    return ", ".join([*map(shown, names[:MOST_NAMED]), *more])


def check_members(values: dict[str, Any], schema: type[BaseModel]) -> None:
    """Raise InvalidRequestError naming the first unknown one if an object has far more members than
    its model has fields."""
    if len(values) > MANY * len(schema.model_fields):
        raise _unknown(next(name for name in values if name not in schema.model_fields), schema)


def parse_form(fields: Mapping[str, str], schema: type[RequestT]) -> RequestT:
    """Read the fields of a form, whose values are all texts. One that is empty or `null` is absent:
    so OpenAI's clients for Python and for Node send null. Only of prompts `null` is a word.

    Raises as `parse` does.
    """
    given = {
        name: text for name, text in fields.items() if text and (text != NULL or name in PROMPTS)
    }
    try:
        return schema.model_validate_strings(given)
    except ValidationError as error:
        raise explain(error, schema) from None


async def parse_form_off_loop(fields: Mapping[str, str], schema: type[RequestT]) -> RequestT:
    """As `parse_form`, on another thread if a field is long, as tensors are."""
    long = any(len(text) > LONG for text in fields.values())
    return await on_thread(None, parse_form, fields, schema) if long else parse_form(fields, schema)


def explain(error: ValidationError, schema: type[BaseModel] | None = None) -> InvalidRequestError:
    """The first problem as an error; `schema` may name fields that are refused, and why."""
    problem: Any = error.errors(include_url=False)[0]
    if problem["type"] == "json_invalid":
        return InvalidRequestError(
            f"The body is not valid JSON: {problem['ctx']['error']}.", code="invalid_json"
        )
    # strings that JSON's reader accepts and UTF-8 does not (lone surrogates) have no field to blame
    place = problem["loc"]
    if (
        schema is not None
        and place
        and place[0]
        in (
            *getattr(schema, "ARGUMENTS", ()),
            *getattr(schema, "IMAGES", ()),
        )
    ):
        place = place[:1]  # without the part of a union that did not match
    param = ".".join(str(part) for part in place)[:SHOWN] or None
    if problem["type"] == "extra_forbidden":
        return refused_field(param or "", schema) or _unknown(param, schema)
    if problem["type"] == "missing":
        return InvalidRequestError(f"{param} is missing.", code="missing_field", param=param)
    if param == "size":
        return InvalidRequestError(
            f"size is {shown(problem['input'])}: say WIDTHxHEIGHT in pixels, or auto.", param=param
        )
    return InvalidRequestError(
        f"{param or 'body'} is {shown(problem['input'])}: {problem['msg']}.", param=param
    )


def refused_field(name: str, schema: type[BaseModel] | None) -> InvalidRequestError | None:
    """An error saying what to do instead if a field, or a member of it, is one that the schema
    refuses by name."""
    refused: Mapping[str, str] = getattr(schema, "REFUSED", {})
    known = re.split(r"[\[.]", name, maxsplit=1)[0]  # forms have members as `svg[model]`
    if known not in refused:
        return None
    return InvalidRequestError(
        f"{known} is not taken: {refused[known]}.", code="unsupported", param=known
    )


def _unknown(param: str | None, schema: type[BaseModel] | None) -> InvalidRequestError:
    known = [] if schema is None else list(schema.model_fields)
    if param is not None and param.startswith("lora[") and "lora" in known:
        # members of forms, as `lora[][name]`
        return InvalidRequestError(
            f"Unknown field {shown(param)}; in lora, {LORA_TEXT}.",
            code="unknown_field",
            param=param[:SHOWN],
        )
    meant = MEANT.get(param or "")
    hint = f" (did you mean {meant}?)" if meant in known else did_you_mean(param or "", known)
    if param is not None and NEVER.search(param):
        hint = "; requests send texts, numbers, flags, images and some tensors"
    return InvalidRequestError(
        f"Unknown field {shown(param)}{hint}.",
        code="unknown_field",
        param=param and param[:SHOWN],
    )
