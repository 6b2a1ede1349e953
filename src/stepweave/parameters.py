"""A request for images, its resolved parameters, and its results."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json

from stepweave.resource import Resource, absent

if TYPE_CHECKING:  # the stores import this, and need no images
    from PIL import Image

OutputFormat = Literal["png", "jpeg", "webp"]  # a file's suffix, too
MEDIA_TYPES: dict[str, str] = {name: f"image/{name}" for name in get_args(OutputFormat)}
ResponseFormat = Literal["b64_json", "url"]
PriorityName = Literal["low", "normal", "high"]
MAX_SEED = 2**53 - 1  # the largest integer that every JSON client reads exactly
MAX_TAG = 128  # characters
MAX_DEADLINE_MS = 24 * 3600 * 1000
SIZE = r"^[1-9][0-9]*x[1-9][0-9]*$"
Size = Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", examples=["64x64"])]


# fields that name components beside the model, and the argument that says how much each counts
COMPONENTS = {
    "controlnet": "controlnet_conditioning_scale",
    "t2i_adapter": "adapter_conditioning_scale",
    "ip_adapter": "ip_adapter_scale",
    "refiner": None,
    "vae": None,
}
MOST_LORAS = 8  # of a request
MOST_LORA_SCALE = 10.0
MAX_LORA_NAME = 64  # characters
MAX_NAMED_LORA = 200 + len(":") + MAX_LORA_NAME  # with the model's name before it
# what other programs call a LoRA's scale
_SCALES = ("weight", "strength", "multiplier", "alpha")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
LORA_TEXT = 'send NAME, NAME:SCALE, or a list of {"name": NAME, "scale": SCALE}'


class LoraChoice(BaseModel):
    """An adapter of the model's weights, and how much of it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=MAX_NAMED_LORA)
    scale: float = Field(1.0, ge=-MOST_LORA_SCALE, le=MOST_LORA_SCALE)


def applied(lora: Sequence[tuple[str, float]]) -> int:
    """How many of these LoRAs are applied: those with a scale other than 0."""
    return sum(1 for _, scale in lora if scale)


def lora_text(values: Mapping[str, Any]) -> str:
    """The LoRAs of an image's parameters as one text, as requests may write them:
    `rings:0.8,chalk:1`; empty if it has none. Read again, they have the same scales."""
    return ",".join(f"{one['name']}:{plain(one['scale'])}" for one in values.get("lora", ()))


def component_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """The components of an image's parameters, and their scales, as texts of names and numbers, by
    the requests' fields."""
    found = {}
    for name in (*COMPONENTS, *filter(None, COMPONENTS.values())):
        if (value := values.get(name)) is not None:
            several = value if isinstance(value, (list, tuple)) else [value]
            found[name] = ",".join(one if isinstance(one, str) else plain(one) for one in several)
    return found


def plain(number: float) -> str:
    """A number exactly, in digits."""
    return format(Decimal(repr(float(number))), "f").removesuffix(".0")


def _loras(value: Any) -> Any:
    """LoRAs as a list of objects, however they are written: `rings`, `rings:0.8,chalk`, a list of
    such texts; in forms, JSON. An empty text is none, as in forms."""
    if isinstance(value, str):
        if not value.strip():
            return []
        if value.lstrip()[:1] in ("[", "{"):
            try:
                value = from_json(value)
            except ValueError:
                raise PydanticCustomError("lora", LORA_TEXT) from None
        else:
            value = value.split(",")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("lora", LORA_TEXT)
    if len(value) > MOST_LORAS:  # before each of them becomes an error
        raise PydanticCustomError(
            "lora", "{count} LoRAs; the limit is {limit}",
            {"count": len(value), "limit": MOST_LORAS},
        )  # fmt: skip
    return [_lora(item) for item in value]


def _lora(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        item = _lora_of_text(item)
    if not isinstance(item, dict) or not item.get("name") or item.keys() - {"name", "scale"}:
        given = item if isinstance(item, dict) else ()
        other = next((name for name in given if name in _SCALES), None)
        hint = "" if other is None else f"; {other} is called scale here"
        raise PydanticCustomError("lora", "{told}", {"told": LORA_TEXT + hint})
    return item


def _lora_of_text(text: str) -> dict[str, Any]:
    """`NAME` or `NAME:SCALE`. A name may have the model's before a colon."""
    name, colon, scale = (part.strip() for part in text.rpartition(":"))
    if colon and _NUMBER.fullmatch(scale):
        return {"name": name, "scale": float(scale)}
    return {"name": text.strip()}


_LORA_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {
            "type": "string", "minLength": 1, "maxLength": MAX_NAMED_LORA,
            "description": f"As `GET /v1/loras` lists it, up to {MAX_LORA_NAME} characters, or as "
            "`GET /v1/models` does, behind the model's name.",
        },
        "scale": {
            "type": "number", "minimum": -MOST_LORA_SCALE, "maximum": MOST_LORA_SCALE, "default": 1,
            "description": "Its share; 1 is all of it.",
        },
    },
    "required": ["name"],
    "additionalProperties": False,
}  # fmt: skip
Loras = Annotated[
    list[LoraChoice],
    BeforeValidator(_loras),
    Field(max_length=MOST_LORAS),
    WithJsonSchema(
        {
            "type": ["array", "string"],
            "items": {"anyOf": [_LORA_SCHEMA, {"type": "string", "minLength": 1}]},
            "maxItems": MOST_LORAS,
        }
    ),
]


class ImageRequest(BaseModel):
    """The fields of a request on every HTTP surface. Subclasses add the `ARGUMENTS` of a model's
    pipelines, and its `IMAGES`, by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    ARGUMENTS: ClassVar[tuple[str, ...]] = ()
    IMAGES: ClassVar[tuple[str, ...]] = ()

    prompt: str = Field(min_length=1, description="Description of the image.")
    negative_prompt: str | None = Field(None, description="What the image should not show.")
    size: Size | None = Field(
        None, description="WIDTHxHEIGHT in pixels, or `auto` for the model's own."
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Same seed, same image; random if absent."
    )
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="Classifier-free guidance; 1 turns it off."
    )
    guidance_rescale: float | None = Field(
        None, ge=0, le=1, description="Rescales guidance against overexposure; 0 is off."
    )
    scheduler: str | None = Field(
        None, description="Class name of a scheduler that `GET /v1/models` lists."
    )
    lora: Loras | None = Field(
        None,
        description="LoRAs for this image, in order: objects of `name` and `scale`, or texts as "
        "`rings` and `rings:0.8`.",
        examples=[[{"name": "rings", "scale": 0.8}]],
    )
    reproducible: bool = Field(
        False, description="Bitwise the pipeline's own image, without batching."
    )
    priority: PriorityName = Field("normal", description="Requests of a higher class run first.")
    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="Milliseconds until the image must be done. Refused with 400 if even an idle "
        "server is too slow, with 429 if this one is too busy; ended with 504 at the first step "
        "after the deadline.",
    )
    output_format: OutputFormat = Field("png", description="File format of the image.")
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Quality of a JPEG or WebP file, 0 to 100 (best); not for PNG.",
    )
    metadata: bool = Field(True, description="Write the parameters into the file.")
    request_tag: str | None = Field(
        None,
        max_length=MAX_TAG,
        pattern=r"^[!-~]([ -~]*[!-~])?$",  # allowed in a header
        description="The client's own text in printable ASCII; the answer and the file repeat it.",
    )

    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline that it sets, by the pipeline's names."""
        given = {name: getattr(self, name) for name in self.ARGUMENTS}
        return {name: value for name, value in given.items() if value is not None}


# fields of a request that are copied to `Parameters` unchanged
PASSED = ("prompt", "negative_prompt", "guidance_rescale", "reproducible", "request_tag")
# fields that the pipeline's call takes by the same name, if it has such an argument; else the
# request is refused
OWN_TIMES = ("sigmas", "timesteps")  # arguments that are as many steps as they are long
OPTIONAL_ARGUMENTS = ("negative_prompt", "guidance_scale", "guidance_rescale")


@dataclass(frozen=True)
class Sources:
    """The images that a request starts from, by the request's names: `image` and `mask`, or as the
    pipeline calls them. They are RGB; masks are L, white where the image is repainted. `warnings`
    are about changes made to the uploaded files."""

    images: Mapping[str, tuple[Image.Image, ...]]
    warnings: tuple[str, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The one that decides about the size of the result: `image`, or the first."""
        return self.images.get("image", next(iter(self.images.values())))[0]

    @property
    def mask(self) -> Image.Image | None:
        """What is repainted."""
        masks = self.images.get("mask")
        return None if masks is None else masks[0]


@dataclass(frozen=True)
class Parameters:
    """The parameters that determine the images, and the tag. Image i of n uses `seed` + i."""

    prompt: str  # empty if the pipeline takes none
    negative_prompt: str | None
    width: int  # pixels
    height: int  # pixels
    n: int
    seed: int
    num_inference_steps: int  # of all stages, if the pipeline has no such argument
    guidance_scale: float | None  # None if the pipeline has no such argument
    guidance_rescale: float | None = None  # 0 to 1; None leaves it to the pipeline
    reproducible: bool = False
    scheduler: str | None = None  # class name, if not the pipeline's own
    strength: float | None = None  # of an edit, 0 to 1, which is pure noise
    sources: Sources | None = None  # of an edit
    request_tag: str | None = None  # the client's own text
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of the pipeline
    lora: tuple[tuple[str, float], ...] = ()  # names and scales, in order
    # names of components beside the model, by the request's field
    components: tuple[tuple[str, tuple[str, ...]], ...] = ()
    scales: tuple[tuple[str, Any], ...] = ()  # of these, where the request sets none

    def of_image(self, index: int) -> dict[str, Any]:
        """The parameters of image `index`, for answers and metadata of files."""
        values: dict[str, Any] = {"prompt": self.prompt} if self.prompt else {}
        values["seed"] = self.seed + index
        if self.negative_prompt is not None:
            values["negative_prompt"] = self.negative_prompt
        values["size"] = f"{self.width}x{self.height}"
        values["num_inference_steps"] = self.num_inference_steps
        if self.guidance_scale is not None:
            values["guidance_scale"] = self.guidance_scale
        for name in ("guidance_rescale", "scheduler", "strength", "request_tag"):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        if self.reproducible:
            values["reproducible"] = True
        if self.lora:
            values["lora"] = [{"name": name, "scale": scale} for name, scale in self.lora]
        for name, names in self.components:
            values[name] = names[0] if len(names) == 1 else list(names)
        values.update(self.scales)
        given = self.arguments.items()
        # of what JSON has no value for, such as a tensor, a text about it
        return values | {
            name: value if isinstance(value, (bool, int, float, str, list, tuple)) else str(value)
            for name, value in given
        }


class ResolvedLora(Resource):
    """A LoRA of an image, and how much of it."""

    name: str
    scale: float


class ResolvedParameters(Resource):
    """All parameters of a request, defaults filled in, without those that do not apply; those of
    the pipeline by its names."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = absent(description="If the pipeline takes one.")
    negative_prompt: str | None = absent()
    size: str = Field(pattern=SIZE)
    seed: int = Field(ge=0)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float | None = absent(description="If the pipeline has one.")
    guidance_rescale: float | None = absent(ge=0, le=1, description="As it was sent.")
    scheduler: str | None = absent()
    strength: float | None = absent(description="Of edits.")
    lora: list[ResolvedLora] | None = absent()
    reproducible: bool | None = absent()
    request_tag: str | None = absent(description="As it was sent.")
    n: int = Field(ge=1)
    priority: PriorityName | None = absent()
    deadline_ms: int | None = absent(ge=1)
    output_format: OutputFormat | None = absent()
    output_compression: int | None = absent(ge=0, le=100)

    @classmethod
    def of(cls, request: ImageRequest, parameters: Parameters, scheduler: str | None) -> Self:
        """`scheduler` is the pipeline's own."""
        values = {name: getattr(request, name, None) for name in cls.model_fields}
        values |= {"scheduler": scheduler, "n": parameters.n, "lora": None}
        values["reproducible"] = parameters.reproducible
        return cls(**values | parameters.of_image(0))


@dataclass
class Timings:
    """Seconds of a job: waiting, before the steps, in the steps, after them, encoding files."""

    queued: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode_image: float = 0.0
    total: float = 0.0

    def rounded(self) -> Timings:
        """Rounded to microseconds, for answers."""
        return Timings(**{name: round(seconds, 6) for name, seconds in vars(self).items()})


@dataclass(frozen=True)
class GeneratedImages:
    """The result of a job: n images in order of seeds, and the pipeline's other outputs."""

    parameters: Parameters
    images: list[Image.Image]
    timings: Timings = field(default_factory=Timings)
    flagged: list[bool] = field(default_factory=list)  # by the pipeline's safety checker
    outputs: dict[str, Any] = field(default_factory=dict)  # other outputs, as JSON


class Files(Protocol):
    """The part of `stepweave.store.FileStore` that answers need."""

    async def put(self, data: bytes, suffix: OutputFormat) -> str:
        """Store a file; returns its name."""


@dataclass(eq=False)
class ImageFile:
    """An encoded image, its parameters, and its name in the file store once it is stored."""

    data: bytes
    seed: int
    values: dict[str, Any]
    output_format: OutputFormat
    name: str | None = None
    flagged: bool = False  # by the pipeline's safety checker
    _storing: asyncio.Task[str] | None = field(default=None, init=False, repr=False)

    async def stored(self, files: Files) -> str:
        """Store the file, once for all callers; returns its name. Raises what the store raises."""
        if self.name is None:
            if self._storing is None or (
                self._storing.done() and self._storing.exception() is not None
            ):
                self._storing = asyncio.ensure_future(files.put(self.data, self.output_format))
            self.name = await asyncio.shield(self._storing)
        return self.name
