"""What a call's arguments tell of its work before it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from PIL import Image

from stepweave.planning.profiles import Shape


def arguments_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's call, in order."""
    return arguments_of_call(type(pipeline).__call__)


@functools.lru_cache(maxsize=64)
def arguments_of_call(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Of a class's call, without `self`. Read once: that takes a tenth of a millisecond."""
    return dict(list(inspect.signature(call).parameters.items())[1:])


def takes(pipeline: Any, name: str) -> bool:
    """Whether the pipeline's call has an argument of that name."""
    return name in arguments_of(pipeline)


def has_generator(pipeline: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is given one, by name or by position."""
    names = list(arguments_of(pipeline))[: len(args)]
    return kwargs.get("generator") is not None or "generator" in names


def shape_of(
    pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scheduler: Any, reproducible: bool
) -> tuple[Shape, Hashable, int]:
    """The shape of a call of `pipeline`, equal for what it may share steps with, and how many steps
    it has."""
    parameters = arguments_of(pipeline)
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    values = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty
    } | given
    size, prompt, images = _size(values), values.get("prompt"), values.get("num_images_per_prompt")
    prompts = len(prompt) if isinstance(prompt, list) else 1
    kind = frozenset(
        (name, _level(name, value))
        for name, value in given.items()
        if value is not None and name != "generator"
    )
    return (
        Shape(
            size[0] * size[1] if size else 0,
            max(1, prompts * (images if isinstance(images, int) else 1)),
            (type(pipeline), kind, type(scheduler)),
        ),
        object() if reproducible else size,
        _steps(values),
    )


def _size(values: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height in pixels that are asked for, or those of the image to start from; None
    where neither tells."""
    width, height = values.get("width"), values.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    image = values.get("image")
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    return first.size if isinstance(first, Image.Image) else None


def _steps(values: dict[str, Any]) -> int:
    """Steps that run; of an edit, the share that its strength says."""
    steps, strength = values.get("num_inference_steps"), values.get("strength")
    if not isinstance(steps, int):
        return 0
    if isinstance(strength, (int, float)) and 0 < strength <= 1:
        return max(1, int(steps * strength))
    return steps


def _level(name: str, value: Any) -> bool:
    """Guidance of 1 or less is none, and saves a pipeline half of its rows or calls."""
    if isinstance(value, (int, float)) and ("guidance" in name or "cfg" in name):
        return value > 1
    return True
