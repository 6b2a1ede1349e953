"""Describes a pipeline's call from its class, before weights are read: what requests may send, what
it needs, what it makes, and which member of its result holds the images."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stepweave.calls.argument import Argument, descriptions_of, read_argument
from stepweave.compat.modular import call_class
from stepweave.images.outputs import IMAGES

Kind = Literal["image", "video", "audio", "text", "3d", "other"]

_OTHERS: dict[str, Kind] = {
    "frames": "video",
    "video": "video",
    "videos": "video",
    "audios": "audio",
    "audio": "audio",
    "texts": "text",
    "sequences": "text",
}
_OUTPUTS = {"rgb": "np", "prediction": "np"}  # output types of results that are arrays
# arguments that show what is made if the result is also called `images`
_MAKING: dict[str, Kind] = {"video_length": "video", "num_frames": "video", "frame_size": "3d"}
# arguments that requests set by the fields that all models have
FIELDS = frozenset(
    ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale")
    + ("guidance_rescale", "strength", "num_images_per_prompt", "batch_size")
)
CONTROL_IMAGE = "control_image"  # how requests call the image that a ControlNet is guided by
# names of diffusers' pipelines that need an image, although its default is None
_NEEDS_IMAGES = re.compile(
    r"Img2Img|I2I|Inpaint|Upscal|SuperResolution|Control|Adapter|Fill|Depth2Img|Pix2Pix|Refiner"
    r"|Layered|Variation|DiffEdit|CycleDiffusion|LongCatImageEdit|VisualCloze"
)
_MAY_NEED_IMAGES = re.compile(r"Edit")  # unless the image is documented to be optional
# what calls fail without, although its default is None
_NEEDED = {
    "QwenImageControlNetInpaintPipeline": ("control_mask",),
    "StableDiffusion3ControlNetInpaintingPipeline": ("control_mask",),
    "StableDiffusionDiffEditPipeline": ("image_latents",),
    "StableDiffusionGLIGENPipeline": ("gligen_phrases", "gligen_boxes"),
    "VisualClozeGenerationPipeline": ("task_prompt", "content_prompt"),
    "VisualClozePipeline": ("task_prompt", "content_prompt"),
}
_NEVER_NEEDED = re.compile(r"reference|gligen|control_mask")


@dataclass(frozen=True, eq=False)
class CallDescription:
    """A pipeline class's call.

    `arguments` are those that requests may send by the pipeline's names, beside the fields that all
    models have; `images` are its image and mask arguments by name, of which `needs` cannot be left
    out; `takes` are all names of its call.
    """

    pipeline: str
    kind: Kind
    why: str  # how the kind was recognised
    result: str  # the member of its result with the images
    takes: frozenset[str] = frozenset()
    arguments: Mapping[str, Argument] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Argument] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    output_type: str | None = None  # None: the call has no such argument
    one_generator: bool = False  # whether its annotation has no list of them
    begins: bool = False  # whether it begins with its image where no mask is given

    @property
    def count(self) -> str | None:
        """The argument with the number of images; of pipelines that take images, `batch_size` is
        something else."""
        if "num_images_per_prompt" in self.takes:
            return "num_images_per_prompt"
        return "batch_size" if "batch_size" in self.takes and not self.images else None

    @property
    def image(self) -> str | None:
        """The argument that requests mean by `image`; None if there is none."""
        names = [name for name, argument in self.images.items() if argument.type == "image"]
        return "image" if "image" in names else names[0] if names else None

    @property
    def control(self) -> str | None:
        """The argument that requests mean by `control_image`: the image that guides a ControlNet or
        a T2I-Adapter; None if there is none."""
        if CONTROL_IMAGE in self.images:
            return CONTROL_IMAGE
        guided = {"controlnet_conditioning_scale", "adapter_conditioning_scale"} & self.takes
        return self.image if guided and "strength" not in self.takes else None

    @property
    def mask(self) -> str | None:
        """The argument that requests mean by `mask`; None if there is none."""
        names = [name for name, argument in self.images.items() if argument.type == "mask"]
        return next((name for name in ("mask_image", "mask") if name in names), None)

    @property
    def scaled(self) -> str | None:
        """The image argument that has the size of the result, since the call begins with it,
        repaints it, or takes the size from it; None if images are references of any size."""
        sized = {"width", "height"} <= self.takes
        starts = self.begins or (self.mask is not None and self.mask in self.needs)
        if sized and not starts:
            return None
        return "original_image" if "original_image" in self.images else self.image

    @property
    def draws_for_images(self) -> bool:
        """Whether a call draws random numbers for the image that it begins with: then it needs one
        for each result, else all but the first have other numbers. Pipelines that need tensors make
        several results of one image themselves."""
        known = self.arguments
        tensors = any(name in known and known[name].type == "tensor" for name in self.needs)
        return ("strength" in self.takes or self.mask is not None) and not tensors

    @property
    def steps(self) -> tuple[str, ...]:
        """Arguments with numbers of denoising steps."""
        names = (name for name in self.takes if name.endswith("num_inference_steps"))
        return tuple(sorted(names, key=lambda name: (name != "num_inference_steps", name)))

    @property
    def needs_images(self) -> tuple[str, ...]:
        """The images that cannot be left out."""
        return tuple(name for name in self.needs if name in self.images)

    @property
    def unknown_needs(self) -> tuple[str, ...]:
        """What a call cannot do without, and requests cannot send: functions, modules and some
        tensors."""
        return tuple(
            name for name in self.needs if name not in self.images and name not in self.arguments
        )

    def name_of(self, image: str) -> str | None:
        """The pipeline's name of an image that a request calls `image`, `mask`, `control_image` or
        as the pipeline does; None if there is none."""
        known = {"image": self.image, "mask": self.mask, CONTROL_IMAGE: self.control}
        return image if image in self.images else known.get(image)


def described(pipeline: Any) -> CallDescription:
    """The description of the call of a pipeline, or of its class; of a modular one's class, with
    its default blocks."""
    return _described(call_class(pipeline))


@functools.cache
def _described(pipeline: Any) -> CallDescription:
    name = pipeline.__name__
    parameters = _parameters_of(pipeline)
    if parameters is None:
        return CallDescription(name, "other", "its class has no call", "")
    members = _members_of(pipeline)
    result = next((member for member in IMAGES if member in members), "")
    if members and not result:
        kinds = [_OTHERS[member] for member in members if member in _OTHERS]
        kind, why = (kinds[0] if kinds else "other"), f"its results are {', '.join(members)}"
        return CallDescription(name, kind, why, "")
    for told, making in _MAKING.items():
        if told in parameters:
            return CallDescription(name, making, f"it takes {told}", "")
    call = inspect.unwrap(pipeline.__call__)
    texts = descriptions_of(call)
    found = {
        parameter.name: argument
        for parameter in parameters.values()
        if (argument := read_argument(call, parameter, texts.get(parameter.name, ""))) is not None
    }
    images = {name: argument for name, argument in found.items() if argument.is_file}
    modular = hasattr(pipeline, "declared_outputs")
    output_type = parameters.get("output_type")
    return CallDescription(
        pipeline=name,
        kind="image",
        why="",
        result=result or "images",
        takes=frozenset(parameters),
        arguments={
            name: argument
            for name, argument in found.items()
            if not argument.is_file
            and name not in FIELDS
            and not (modular and argument.type == "tensor")  # its blocks make them
        },
        images=images,
        needs=_needed(pipeline, parameters, images),
        output_type=None if output_type is None else _OUTPUTS.get(result, "pil"),
        one_generator="generator" in parameters
        and re.fullmatch(r".*\bGenerator\b.*", str(parameters["generator"].annotation)) is not None
        and "list" not in str(parameters["generator"].annotation).lower(),
        begins=getattr(pipeline, "begins_with_image", "strength" in parameters),
    )


def _parameters_of(pipeline: type[Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a class's `__call__`; None if it has none (then the attribute is the
    metaclass's)."""
    if not any("__call__" in vars(base) for base in pipeline.__mro__):
        return None
    parameters = dict(list(inspect.signature(pipeline.__call__).parameters.items())[1:])
    return parameters


def _needed(
    pipeline: type[Any], parameters: Mapping[str, inspect.Parameter], images: Collection[str]
) -> tuple[str, ...]:
    """The arguments without which a call fails, `prompt` included only if it has no default."""
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in ("prompt", *FIELDS)
    ]
    name = pipeline.__name__
    needed += _NEEDED.get(name, ())
    named = any(base.__module__.startswith("diffusers.") for base in pipeline.__mro__)
    if hasattr(pipeline, "declared_outputs"):  # a modular one's blocks declare what they need
        named = False
    if named and (
        _NEEDS_IMAGES.search(name) or (_MAY_NEED_IMAGES.search(name) and not _optional(pipeline))
    ):
        needed += [
            image for image in images if image not in needed and not _NEVER_NEEDED.search(image)
        ]
    return tuple(needed)


def _optional(pipeline: type[Any]) -> bool:
    """Whether a call's image is documented to be optional."""
    text = inspect.getdoc(pipeline.__call__) or ""
    return re.search(r"^\s*images? \(.*\*optional\*", text, re.MULTILINE) is not None


@functools.cache
def _members_of(pipeline: Any) -> tuple[str, ...]:
    """The members of a call's result, by its code or else its docstring; empty if unknown."""
    if hasattr(pipeline, "declared_outputs"):
        return tuple(pipeline.declared_outputs)
    call = inspect.unwrap(pipeline.__call__)
    try:
        code = re.sub(r'r?"""[\s\S]*?"""', "", inspect.getsource(call))
    except (OSError, TypeError):
        code = ""
    names = [
        *re.findall(r"return (\w+Output)\(", code),
        *re.findall(r"\b(\w+Output)`", inspect.getdoc(call) or ""),
    ]
    library = sys.modules.get("diffusers")  # importing it takes seconds
    for name in names:
        kind = getattr(call, "__globals__", {}).get(name) or getattr(library, name, None)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return tuple(field.name for field in dataclasses.fields(kind))
    return ()
