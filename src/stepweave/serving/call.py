"""The arguments of a pipeline's call: defaults, checks, and keyword arguments for a request."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import InvalidRequestError, LoadError, shown
from stepweave.loading.sizes import SizeLimits
from stepweave.loading.trials import Size
from stepweave.parameters import OPTIONAL_ARGUMENTS, Parameters, Sources
from stepweave.planning.workload import arguments_of, takes

DEFAULT_STRENGTH = 0.8  # of pipelines without a default of their own


def default_of(pipeline: Any, name: str) -> Any:
    """The default of an argument of the pipeline's call; None if there is none."""
    parameters = arguments_of(pipeline)
    default = parameters[name].default if name in parameters else None
    return None if default is inspect.Parameter.empty else default


def default_strength(pipeline: Any) -> float | None:
    """Of an edit; None where the pipeline's call has none."""
    if not takes(pipeline, "strength"):
        return None
    default = default_of(pipeline, "strength")
    return float(DEFAULT_STRENGTH if default is None else default)


def check_prompts(prompt: str, negative_prompt: str | None, longest: int) -> None:
    """Raise InvalidRequestError if a prompt is empty, has NUL, or over `longest` characters."""
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if text is not None and len(text) > longest:
            raise InvalidRequestError(
                f"{name} has {len(text)} characters; the limit is {longest}.", param=name
            )
        if text is not None and "\0" in text:
            raise InvalidRequestError(
                f"{name} is {shown(text)}; it must not contain the character NUL.", param=name
            )
    if not prompt.strip():
        raise InvalidRequestError(
            f"prompt is empty: {shown(prompt)}. Describe the image.", param="prompt"
        )


def resolve_strength(
    strength: float | None, steps: int, pipeline: Any, sources: Sources | None
) -> float | None:
    """The strength of an edit, the pipeline's default if `strength` is None; None if the request
    is no edit or the pipeline has no strength. Raises InvalidRequestError if it is not allowed."""
    default = None if sources is None else default_strength(pipeline)
    if default is None:
        if strength is None:
            return None
        reason = (
            "no image is given" if sources is None else f"{type(pipeline).__name__} has no strength"
        )
        raise InvalidRequestError(f"strength is {strength}, but {reason}.", param="strength")
    value = default if strength is None else float(strength)
    if not 0 < value <= 1:
        raise InvalidRequestError(
            f"strength is {value}; it must be more than 0 and at most 1.", param="strength"
        )
    if int(steps * value) < 1:
        raise InvalidRequestError(
            f"strength is {value} and num_inference_steps is {steps}; their product, the steps "
            "that run, must be at least 1.",
            param="strength",
        )
    return value


def check_call(pipeline: Any, preset: Preset) -> None:
    """Raise LoadError if the preset sets an argument that the pipeline's call does not have."""
    kind, arguments = type(pipeline).__name__, arguments_of(pipeline)
    for name in preset.call:
        if name not in arguments:
            close = difflib.get_close_matches(name, arguments, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(arguments)}"
            raise LoadError(
                f"{preset.source(f'call.{name}')}: call.{name}: {kind} takes no argument {name!r} "
                f"({hint})"
            )
    if preset.guidance_scale is not None and "guidance_scale" not in arguments:
        raise LoadError(
            f"{preset.source('guidance_scale')}: guidance_scale is {preset.guidance_scale:g}, but "
            f"{kind} has no guidance_scale"
        )


def check_size(pipeline: Any, preset: Preset, size: Size, native: Size, limits: SizeLimits) -> None:
    """Raise LoadError if the preset's `size` is not the pipeline's `native` one and not allowed."""
    kind, arguments = type(pipeline).__name__, arguments_of(pipeline)
    for name, side, native_side in zip(("width", "height"), size, native, strict=True):
        if side == native_side:
            continue
        value, source = f"{name} is {side}", preset.source(name)
        if name not in arguments:
            raise LoadError(
                f"{source}: {value}, but {kind} has no {name}: it is always {native_side}"
            )
        if side % limits.multiple:
            raise LoadError(f"{source}: {value}; it must be a multiple of {limits.multiple}")
        if side > limits.longest:
            raise LoadError(f"{source}: {value}; the model's limit is {limits.longest} a side")


def check_defaults(settings: Settings, steps: int, pixels: int) -> None:
    """Raise LoadError if the model's default is over a limit of the settings."""
    for setting, limit, default in (
        ("MAX_STEPS", settings.max_steps, steps),
        ("MAX_PIXELS", settings.max_pixels, pixels),
    ):
        if default > limit:
            raise LoadError(
                f"STEPWEAVE_{setting}={limit} is less than the model's default, {default}"
            )


def call_arguments(
    pipeline: Any, always: Mapping[str, Any], parameters: Parameters
) -> dict[str, Any]:
    """The keyword arguments of a pipeline's call, for n RGB images of height x width; `always` are
    the preset's, used only if the pipeline takes them."""
    arguments = arguments_of(pipeline)
    # always on the CPU: a seed then gives the same noise on every device
    generators = [
        torch.Generator("cpu").manual_seed(parameters.seed + i) for i in range(parameters.n)
    ]
    optional = {
        **{name: getattr(parameters, name) for name in OPTIONAL_ARGUMENTS},
        "width": parameters.width,
        "height": parameters.height,
        "num_images_per_prompt": parameters.n,
        "strength": parameters.strength,
        **_images(parameters),
    }
    return {
        **{name: value for name, value in always.items() if name in arguments},
        "prompt": parameters.prompt,
        "num_inference_steps": parameters.num_inference_steps,
        "generator": generators,
        "output_type": "pil",
        **{
            name: value
            for name, value in optional.items()
            if value is not None and name in arguments
        },
    }


def _images(parameters: Parameters) -> dict[str, Any]:
    """The arguments with the images of an edit, resized to the requested size."""
    sources, size = parameters.sources, (parameters.width, parameters.height)
    if sources is None:
        return {}
    image = _resized(sources.image, size)
    # a copy for each output: with a single one, pipelines use only the first generator, or fail
    resized: dict[str, Any] = {"image": image if parameters.n == 1 else [image] * parameters.n}
    if sources.mask is not None:
        resized["mask_image"] = _resized(sources.mask, size)
    return resized


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
