"""The work of a pipeline's call, estimated from its arguments."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

from PIL import Image

from stepweave.compat.modular import call_class
from stepweave.planning.profiles import Shape

# integer arguments that are a number of repetitions; `skip_guidance_layers` has indices
_TIMES = re.compile(
    r"(?<!_)layers$|n_sample$|ensemble_size|batch_size|parallel|jump_length|_iter_|_reps$"
)


def arguments_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's call, in order."""
    return arguments_of_call(call_class(pipeline).__call__)


@functools.lru_cache(maxsize=64)
def arguments_of_call(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Of a class's call, without `self`; cached, since reading them takes 0.1 ms."""
    return dict(list(inspect.signature(call).parameters.items())[1:])


def takes(pipeline: Any, name: str) -> bool:
    """Whether the pipeline's call has an argument of that name."""
    return name in arguments_of(pipeline)


def multiplies_work(name: str) -> bool:
    """Whether an integer argument of that name is a number of repetitions, such as `layers`."""
    return _TIMES.search(name) is not None


def has_generator(pipeline: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has a generator among its arguments, by name or by position."""
    names = list(arguments_of(pipeline))[: len(args)]
    return kwargs.get("generator") is not None or "generator" in names


def shape_of(
    pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scheduler: Any, reproducible: bool
) -> tuple[Shape, Hashable, int]:
    """The shape of a call of `pipeline`; a key that is equal for calls that may share its steps;
    and its number of steps."""
    parameters = arguments_of(pipeline)
    arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    empty = inspect.Parameter.empty
    values = {name: value for name, value in defaults.items() if value is not empty} | arguments
    size, prompt, images = _size(values), values.get("prompt"), values.get("num_images_per_prompt")
    prompts = len(prompt) if isinstance(prompt, list) else 1
    kind = frozenset(
        (name, _level(name, value))
        for name, value in arguments.items()
        if value is not None and name != "generator"
    )
    pixels = size[0] * size[1] if size else 0
    if "strength" not in parameters:  # references, which are as much work as what they are for
        pixels += sum(one.width * one.height for one in _images(arguments.values()))
    times = [
        value
        for name, value in values.items()
        if isinstance(value, int) and value > 0 and multiplies_work(name)
    ]
    count = max(1, prompts * (images if isinstance(images, int) else 1)) * math.prod(times)
    shape = Shape(pixels, count, (type(pipeline), kind, type(scheduler)))
    return shape, object() if reproducible else size, _steps(values)


def _images(values: Iterable[Any]) -> Iterator[Image.Image]:
    for value in values:
        several = value if isinstance(value, (list, tuple)) else (value,)
        yield from (one for one in several if isinstance(one, Image.Image))


def _size(values: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height in pixels by the arguments, or of the image to start from; None if neither
    is given."""
    width, height = values.get("width"), values.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    image = values.get("image")
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    return first.size if isinstance(first, Image.Image) else None


def _steps(values: dict[str, Any]) -> int:
    """The number of steps that run; of an edit, the share given by its strength."""
    steps, strength = values.get("num_inference_steps"), values.get("strength")
    if steps is None:  # of pipelines with a number for each of their stages
        stages = [value for name, value in values.items() if name.endswith("num_inference_steps")]
        return sum(value for value in stages if isinstance(value, int))
    if not isinstance(steps, int):
        return 0
    if isinstance(strength, (int, float)) and 0 < strength <= 1:
        return max(1, int(steps * strength))
    return steps


def _level(name: str, value: Any) -> Hashable:
    """What an argument says about a call's work: of guidance, whether it is on, since 1 or less is
    off, and saves half of the rows or calls; of images, how many there are."""
    if isinstance(value, (int, float)) and ("guidance" in name or "cfg" in name):
        return value > 1
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        return len(value)
    return True
