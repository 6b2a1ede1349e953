"""Finds by its class, before weights are read, what a pipeline makes, and whether it needs more
than a prompt."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import diffusers

from stepweave.errors import LoadError
from stepweave.planning.workload import arguments_of_call

Kind = Literal["text_to_image", "edit", "video", "audio", "text", "3d", "other"]
SERVED: frozenset[Kind] = frozenset({"text_to_image"})

# members of a call's result
_IMAGES = ("images", "image")
_RESULTS: dict[str, Kind] = {
    "frames": "video",
    "video": "video",
    "videos": "video",
    "audios": "audio",
    "audio": "audio",
    "texts": "text",
    "sequences": "text",
}
# arguments that show what is made if the result is also called `images`
_MAKING: dict[str, Kind] = {"video_length": "video", "num_frames": "video", "frame_size": "3d"}

_TAKES_IMAGES = re.compile(r"(?:^|_)(?:images?|masks?|hint)$")
# embeddings, and masks of tokens
_NO_SOURCE = re.compile(r"ip_adapter|attention_mask|embeds_mask|phrases_mask")
# names of pipelines that need an image, although its default is None
_NEEDS_IMAGES = re.compile(
    r"Img2Img|I2I|Inpaint|Upscal|SuperResolution|Control|Adapter|Fill|Depth2Img|Pix2Pix|Refiner|Layered|Variation|DiffEdit|CycleDiffusion|LongCatImageEdit"
)
_MAY_NEED_IMAGES = re.compile(r"Edit")  # unless the image is documented to be optional


@dataclass(frozen=True)
class Makes:
    """What a pipeline class makes, and how that was recognised."""

    kind: Kind
    why: str = ""


def kind_of(pipeline: type[Any], given: Collection[str] = ()) -> Makes:
    """Find what a pipeline class makes of a prompt; if unknown, text to image is assumed. `given`
    are arguments that every call has, from a preset."""
    arguments = _arguments_of(pipeline)
    if arguments is None:
        return Makes("other", "its class has no call")
    members = _results_of(pipeline)  # type: ignore[arg-type]
    results = ", ".join(members)
    if members and not set(members) & set(_IMAGES):
        kinds = [_RESULTS[name] for name in members if name in _RESULTS]
        return Makes(kinds[0] if kinds else "other", f"its results are {results}")
    for name, kind in _MAKING.items():
        if name in arguments:
            return Makes(kind, f"it takes {name}")
    for name in ("prompt", "num_inference_steps", "generator"):
        if name not in arguments:
            return Makes("other", f"it takes no argument {name!r}")
    images = [
        name for name in arguments if _TAKES_IMAGES.search(name) and not _NO_SOURCE.search(name)
    ]
    needed = [
        name
        for name, argument in arguments.items()
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        and name != "prompt"
        and name not in given
    ]
    if needed:
        edits = set(needed) & set(images) or _NEEDS_IMAGES.search(pipeline.__name__)
        return Makes("edit" if edits else "other", f"it needs {', '.join(needed)}")
    if images and (_NEEDS_IMAGES.search(pipeline.__name__) or _edits_only(pipeline, images)):
        return Makes("edit", f"it needs {', '.join(images)}")
    return Makes("text_to_image")


_SAID: dict[Kind, str] = {
    "edit": "makes images from images, not from a prompt alone",
    "video": "makes videos, not images",
    "audio": "makes sound, not images",
    "text": "writes text, and makes no images",
    "3d": "makes three-dimensional shapes, not images",
    "other": "makes no images of prompts",
}


def check_served(pipeline: type[Any], given: Collection[str] = ()) -> None:
    """Raise LoadError, naming the class and why, for a pipeline that makes none of `SERVED`."""
    makes = kind_of(pipeline, given)
    if makes.kind not in SERVED:
        raise LoadError(
            f"{pipeline.__name__} {_SAID[makes.kind]} ({makes.why}); this server serves "
            f"text-to-image pipelines only"
        )


def _arguments_of(pipeline: type[Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a class's `__call__`; None if it has none (then the attribute is the
    metaclass's)."""
    if not any("__call__" in vars(base) for base in pipeline.__mro__):
        return None
    return arguments_of_call(pipeline.__call__)


@functools.cache
def _results_of(pipeline: type[Any]) -> tuple[str, ...]:
    """The members of a call's result, by its code or else its docstring; empty if unknown."""
    call = inspect.unwrap(pipeline.__call__)
    try:
        code = re.sub(r'r?"""[\s\S]*?"""', "", inspect.getsource(call))
    except (OSError, TypeError):
        code = ""
    names = [
        *re.findall(r"return (\w+Output)\(", code),
        *re.findall(r"\b(\w+Output)`", inspect.getdoc(call) or ""),
    ]
    for name in names:
        kind = getattr(call, "__globals__", {}).get(name) or getattr(diffusers, name, None)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return tuple(field.name for field in dataclasses.fields(kind))
    return ()


def _edits_only(pipeline: type[Any], images: Collection[str]) -> bool:
    """Whether a class is named for edits, and does not document its images as optional."""
    if not _MAY_NEED_IMAGES.search(pipeline.__name__):
        return False
    text = inspect.getdoc(pipeline.__call__) or ""
    return not re.search(rf"^\s*({'|'.join(images)}) \(.*\*optional\*", text, re.MULTILINE)
