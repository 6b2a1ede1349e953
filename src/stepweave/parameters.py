"""One generation: what is asked for, the parameters that it is resolved to, and what comes out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self, get_args

from pydantic import BaseModel, ConfigDict, Field

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


class ImageRequest(BaseModel):
    """What every surface takes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="What the image should show.")
    negative_prompt: str | None = Field(None, description="What it should not show.")
    size: Size | None = Field(
        None, description="WIDTHxHEIGHT in pixels, or `auto` for the model's own."
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Same seed, same image; drawn if absent."
    )
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="Classifier-free guidance; 1 turns it off."
    )
    scheduler: str | None = Field(
        None, description="Class name of a scheduler that `GET /v1/models` lists."
    )
    reproducible: bool = Field(
        False, description="Bitwise the pipeline's own image; it shares no step with others."
    )
    priority: PriorityName = Field("normal", description="Requests of a higher class go first.")
    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="Milliseconds from now within which the image must be made: refused with 400 "
        "if it takes longer even alone, with 429 if others are in the way, ended with "
        "504 at the first step after.",
    )
    output_format: OutputFormat = Field("png", description="File format of the image.")
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Quality of a JPEG or WebP file, 0 to 100, the best; PNG has none.",
    )
    metadata: bool = Field(True, description="Write the parameters into the file.")
    request_tag: str | None = Field(
        None,
        max_length=MAX_TAG,
        pattern=r"^[!-~]([ -~]*[!-~])?$",  # as a header may have it
        description="The client's own text, in printable ASCII; the answer and the file repeat it.",
    )


# fields of a request that decide its images as they are
PASSED = ("prompt", "negative_prompt", "reproducible", "request_tag")


@dataclass(frozen=True)
class Sources:
    """What an edit starts from: an RGB image, and an L mask of the same size, white where it is to
    be painted anew.

    `warnings` tell what was done to the files that they come from.
    """

    image: Image.Image
    mask: Image.Image | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameters:
    """Everything that decides a generation's pixels, defaults filled in, and its tag. Image i of n
    uses `seed` + i."""

    prompt: str
    negative_prompt: str | None
    width: int  # pixels
    height: int  # pixels
    n: int
    seed: int
    num_inference_steps: int
    guidance_scale: float | None  # None where the pipeline has no such argument
    reproducible: bool = False
    scheduler: str | None = None  # class name, where another than the pipeline's own was asked for
    strength: float | None = None  # of an edit, 0 to 1: how far it goes back towards noise
    sources: Sources | None = None  # of an edit
    request_tag: str | None = None  # the client's own text

    def of_image(self, index: int) -> dict[str, Any]:
        """The parameters of one of the n images, as they are echoed and written into its
        metadata."""
        values: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed + index}
        if self.negative_prompt is not None:
            values["negative_prompt"] = self.negative_prompt
        values |= {
            "size": f"{self.width}x{self.height}",
            "num_inference_steps": self.num_inference_steps,
        }
        if self.guidance_scale is not None:
            values["guidance_scale"] = self.guidance_scale
        for name in ("scheduler", "strength", "request_tag"):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        if self.reproducible:
            values["reproducible"] = True
        return values


class ResolvedParameters(Resource):
    """All parameters, defaults filled in; those that do not apply are left out."""

    prompt: str
    negative_prompt: str | None = absent()
    size: str = Field(pattern=SIZE)
    seed: int = Field(ge=0)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float | None = absent(description="Where the pipeline has one.")
    scheduler: str | None = absent()
    strength: float | None = absent(description="Of edits.")
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
        own = {"scheduler": scheduler, "n": parameters.n, "reproducible": parameters.reproducible}
        return cls(**values | own | parameters.of_image(0))


@dataclass
class Timings:
    """Seconds a job spent: waiting to start, before its first denoising step, in its steps, after
    the last one, and in encoding the image files."""

    queued: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode_image: float = 0.0
    total: float = 0.0

    def rounded(self) -> Timings:
        """To microseconds, as they are told."""
        return Timings(**{name: round(seconds, 6) for name, seconds in vars(self).items()})


@dataclass(frozen=True)
class GeneratedImages:
    """The outcome of a job: n images, first seed first, and what the pipeline returned beside
    them."""

    parameters: Parameters
    images: list[Image.Image]
    timings: Timings = field(default_factory=Timings)
    # each image, by the pipeline's safety checker
    flagged: list[bool] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)  # what else it returned, JSON-able


class Files(Protocol):
    """Where image files are stored, as far as an answer needs it (`stepweave.store.FileStore`)."""

    async def put(self, data: bytes, suffix: OutputFormat) -> str:
        """Keep a file; returns its name."""


@dataclass(eq=False)
class ImageFile:
    """One encoded image and the parameters that made it; its name in the file store, once it is
    there."""

    data: bytes
    seed: int
    values: dict[str, Any]
    output_format: OutputFormat
    name: str | None = None
    flagged: bool = False  # by the pipeline's safety checker
    _storing: asyncio.Task[str] | None = field(default=None, init=False, repr=False)

    async def stored(self, files: Files) -> str:
        """Its name in the file store, where it is put once, whoever asks. Raises what the store
        does."""
        if self.name is None:
            if self._storing is None or (
                self._storing.done() and self._storing.exception() is not None
            ):
                self._storing = asyncio.ensure_future(_put(files, self.data, self.output_format))
            self.name = await asyncio.shield(self._storing)
        return self.name


async def _put(files: Files, data: bytes, suffix: OutputFormat) -> str:
    return await files.put(data, suffix)
