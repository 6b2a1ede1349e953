"""Reads a pipeline's output: images, flags of a safety checker, and other members."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from PIL import Image

from stepweave.errors import NoImagesError

# names of the member with the images, in order of preference
IMAGES = ("images", "image", "rgb", "prediction")
_FLAG = re.compile(r"nsfw|unsafe|harmful|flagged|blocked|detected", re.IGNORECASE)
_SAFE = re.compile(r"^(is_)?safe$", re.IGNORECASE)  # with the opposite meaning
LARGEST = 2**53 - 1  # integers that every JSON client can read
MOST = 1000  # entries of a list, and characters of a text, that are passed on


@dataclass(frozen=True)
class Outputs:
    """`flags` has for each image the names of members that flag it; `others` are JSON values."""

    flags: list[list[str]]
    others: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def flagged(self) -> list[bool]:
        return [bool(names) for names in self.flags]


def images_of(output: Any, pipeline: str = "The pipeline") -> list[Image.Image]:
    """The images in a pipeline's output, in order; of several for each requested one, such as
    layers, all of the first come first. Maps of numbers are made images: see `images_of_map`.

    Raises NoImagesError, naming the class `pipeline` and its results, if there are none.
    """
    images = _images_member(output)
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        flat = [
            image
            for entry in images
            for image in (entry if isinstance(entry, (list, tuple)) else (entry,))
        ]
        if all(isinstance(image, Image.Image) for image in flat):
            return flat
    if images is not None and len(getattr(images, "shape", ())) == 4:
        return images_of_map(images)
    members = _members(output).items()
    kinds = [f"{name} ({type(value).__name__})" for name, value in members if value is not None]
    raise NoImagesError(
        f"{pipeline} makes no images: it returned "
        f"{', '.join(kinds) or type(output).__name__}, "
        "and no list of images; this server serves pipelines that make images"
    )


def images_each(output: Any, images: Sequence[Image.Image], count: int) -> int:
    """How many of an output's `images` there are for each of `count` requested ones; 0 if they do
    not divide so. More than one only in a list of lists, as a stack of layers is, or in maps."""
    each, left = divmod(len(images), count)
    member = _images_member(output)
    nested = isinstance(member, (list, tuple)) and any(
        isinstance(entry, (list, tuple)) for entry in member
    )
    return 0 if left or (each > 1 and not nested and not hasattr(member, "shape")) else each


def _images_member(output: Any) -> Any:
    return next(
        (value for name in IMAGES if (value := getattr(output, name, None)) is not None), None
    )


def images_of_map(values: Any) -> list[Image.Image]:
    """Maps of numbers, such as depth, normals or albedo, as images of 8 bits a channel.

    `values` is an array (maps, height, width, channels), or a tensor (maps, channels, height,
    width). Numbers from 0 to 1 become 0 to 255; where some are negative, as in normals, those from
    -1 to 1 do.
    """
    if callable(detach := getattr(values, "detach", None)):
        values = detach().cpu().float().permute(0, 2, 3, 1).numpy()
    if (values < 0).any():
        values = (values + 1) / 2
    pixels = (values.clip(0, 1) * 255).round().astype("uint8")
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]


def outputs_of(output: Any, count: int) -> Outputs:
    """The members of an output besides its `count` images. Warnings name those that are neither
    flags nor JSON values."""
    outputs = Outputs([[] for _ in range(count)])
    for name, value in _members(output).items():
        if name in IMAGES or value is None:
            continue
        plain = _plain(value)
        verdicts = _verdicts(name, plain, count)
        if verdicts is not None:
            for names, verdict in zip(outputs.flags, verdicts, strict=True):
                if verdict:
                    names.append(name)
        elif _fits(plain):
            outputs.others[name] = plain
            if _FLAG.search(name) and plain != []:
                outputs.warnings.append(
                    f"The pipeline also returned {name!r}, which does not belong to single images; "
                    f"see outputs."
                )
        else:
            kind = type(value).__name__
            outputs.warnings.append(
                f"The pipeline also returned {name!r} ({kind}), which is not passed on."
            )
    for index, names in enumerate(outputs.flags):
        if names:
            outputs.warnings.append(
                f"image {index} was flagged by the pipeline ({', '.join(names)}); it may have been "
                f"blacked out."
            )
    return outputs


def is_constant(image: Image.Image) -> bool:
    """Whether all pixels of an image have one colour."""
    extrema: Any = image.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)


def _members(output: Any) -> Mapping[str, Any]:
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name, None) for field in fields(output)}
    return output if isinstance(output, Mapping) else getattr(output, "__dict__", {})


def _plain(value: Any) -> Any:
    """Convert numbers of numpy and torch, tensors, and sequences of them to Python's types."""
    # without an import of torch, which is loaded later
    if callable(tolist := getattr(value, "tolist", None)):
        return tolist() if math.prod(getattr(value, "shape", ())) <= MOST else value
    if isinstance(value, (list, tuple)) and len(value) <= MOST:
        return [_plain(item) for item in value]
    return value


def _verdicts(name: str, value: Any, count: int) -> list[bool] | None:
    """Whether each image is flagged; None if the member is not a flag."""
    safe = _SAFE.search(name) is not None
    if not safe and not _FLAG.search(name):
        return None
    verdicts = [_single(item) for item in value] if isinstance(value, list) else [value] * count
    if len(verdicts) != count or not all(isinstance(item, int | float | None) for item in verdicts):
        return None
    return [verdict is not None and bool(verdict) != safe for verdict in verdicts]


def _single(value: Any) -> Any:
    """The entry of a list of one; other values unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _fits(value: Any) -> bool:
    """Whether a value is small, and a JSON value that every client can read."""
    if isinstance(value, str):
        return len(value) <= MOST and not any("\ud800" <= item <= "\udfff" for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= LARGEST
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    if isinstance(value, list):
        return all(_fits(item) for item in value)
    return isinstance(value, (bool, int, type(None)))
