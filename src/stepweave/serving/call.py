"""The arguments of a pipeline's call: defaults, checks, and keyword arguments for a request."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from stepweave.adapters.ip_adapters import attention_arguments
from stepweave.calls import described, has_scalar
from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import InvalidRequestError, LoadError, shown
from stepweave.loading.sizes import SizeLimits, knows_multiple
from stepweave.loading.trials import Size
from stepweave.parameters import OPTIONAL_ARGUMENTS, Parameters, Sources
from stepweave.planning.workload import arguments_of, takes
from stepweave.serving.kinds import IP_ADAPTER_IMAGE, IP_ADAPTER_MASK, IP_ADAPTER_SCALE
from stepweave.serving.tensors import passed_tensors

LANCZOS = "lanczos"  # as image processors call the server's filter
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


def check_texts(texts: Mapping[str, Any], longest: int) -> None:
    """Raise InvalidRequestError if a text has NUL, or is over `longest` characters."""
    for name, text in texts.items():
        for one in text if isinstance(text, (list, tuple)) else (text,):
            if not isinstance(one, str):
                continue
            if len(one) > longest:
                raise InvalidRequestError(
                    f"{name} has {len(one)} characters; the limit is {longest}.", param=name
                )
            if "\0" in one:
                raise InvalidRequestError(
                    f"{name} is {shown(one)}; it must not contain the character NUL.", param=name
                )


def check_prompt(prompt: str | None) -> None:
    """Raise InvalidRequestError if a prompt is missing or empty."""
    if prompt is None:
        raise InvalidRequestError("prompt is missing.", code="missing_field", param="prompt")
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


def check_call(pipeline: Any, preset: Preset, others: Collection[Any] = ()) -> None:
    """Raise LoadError if the preset sets an argument that the call of the pipeline does not have,
    nor that of `others`, with components beside the model."""
    kind = type(pipeline).__name__
    arguments = {
        name: None for each in (pipeline, *others) for name in arguments_of(each)
    }  # in order
    for member in ("call", "limits"):
        for name in getattr(preset, member):
            if name not in arguments:
                close = difflib.get_close_matches(name, arguments, n=1)
                hint = (
                    f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(arguments)}"
                )
                raise LoadError(
                    f"{preset.source(f'{member}.{name}')}: {member}.{name}: {kind} takes no "
                    f"argument {name!r} ({hint})"
                )
    calls = [described(each) for each in (*others, pipeline)]
    images = {name for call in calls for name in call.images}
    known = {name: argument for call in calls for name, argument in call.arguments.items()}
    for name, limit in preset.limits.items():
        source = f"{preset.source(f'limits.{name}')}: limits.{name}"
        if name not in known and name not in images:
            raise LoadError(f"{source}: {name} is not an argument that it can limit")
        if limit is False:
            continue
        if name in images or has_scalar(known[name].value, str):
            raise LoadError(f"{source} is {list(limit)}; {name} is no number: it may be false")
        if limit[0] > limit[1]:
            raise LoadError(f"{source} is {list(limit)}; the first is the least")
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
        if side % limits.multiple and knows_multiple(pipeline):
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


def default_arguments(pipeline: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's arguments of the calls of a pipeline. One that is null is left to the pipeline, or
    is None where the pipeline's default is something else."""
    found = {}
    known = described(pipeline).arguments
    for name, parameter in arguments_of(pipeline).items():
        if name in call and (call[name] is not None or parameter.default is not None):
            value = call[name]
            if isinstance(value, dict) and _has_numbers(parameter.default):
                value = {int(key): one for key, one in value.items()}  # JSON has only texts
            found[name] = known[name].passed(value) if name in known else value
    return found


def _has_numbers(default: Any) -> bool:
    return isinstance(default, dict) and all(isinstance(key, int) for key in default)


def call_arguments(
    pipeline: Any,
    always: Mapping[str, Any],
    parameters: Parameters,
    *,
    enlargement: int = 1,
    copies: bool = True,
) -> dict[str, Any]:
    """The keyword arguments of a pipeline's call, for n RGB images of height x width; `always` are
    the preset's, for what the request does not set. The image that the call begins with has a side
    of 1 / `enlargement` of the result's; with `copies`, there is one for each result."""
    arguments, call = arguments_of(pipeline), described(pipeline)
    # always on the CPU: a seed then gives the same noise on every device
    generators = [
        torch.Generator("cpu").manual_seed(parameters.seed + i) for i in range(parameters.n)
    ]
    given = {
        "prompt": parameters.prompt or None,
        "num_inference_steps": parameters.num_inference_steps,
        "generator": generators[0] if call.one_generator and parameters.n == 1 else generators,
        **({} if call.output_type is None else {"output_type": call.output_type}),
        **{name: getattr(parameters, name) for name in OPTIONAL_ARGUMENTS},
        "width": parameters.width,
        "height": parameters.height,
        **({} if call.count is None else {call.count: parameters.n}),
        "strength": parameters.strength,
        **passed_tensors(parameters.arguments, pipeline),
        **_images(pipeline, parameters, enlargement, copies=copies),
    }
    return {
        **_schedules(pipeline, parameters.num_inference_steps),
        **default_arguments(pipeline, always),
        **{
            name: call.arguments[name].passed(value) if name in call.arguments else value
            for name, value in given.items()
            if value is not None and name in arguments
        },
    }


def _schedules(pipeline: Any, steps: int) -> dict[str, Any]:
    """The arguments whose default has a number for each of the pipeline's own number of steps, with
    as many as there are `steps`, over the same course."""
    usual = default_of(pipeline, "num_inference_steps")
    if not usual or steps == usual:
        return {}
    defaults = {name: one.default for name, one in described(pipeline).arguments.items()}
    return {
        name: type(default)(default[i * usual // steps] for i in range(steps))
        for name, default in defaults.items()
        if isinstance(default, (list, tuple)) and len(default) == usual > 1
    }


def ip_adapter_arguments(pipeline: Any, parameters: Parameters) -> dict[str, Any]:
    """The arguments of a call with an IP-Adapter: its image, scale and mask."""
    assert parameters.sources is not None
    images = parameters.sources.images
    # as Stable Diffusion's pipelines batch the two halves of guidance
    guidance = parameters.guidance_scale
    halves = 2 if guidance is not None and guidance > 1 else 1
    scale = parameters.arguments.get(IP_ADAPTER_SCALE)
    masks = images.get(IP_ADAPTER_MASK)
    return {
        IP_ADAPTER_IMAGE: [images[IP_ADAPTER_IMAGE][0]],
        "cross_attention_kwargs": attention_arguments(
            1.0 if scale is None else scale,
            None if masks is None else masks[0],
            (parameters.width, parameters.height),
            halves * parameters.n,
            getattr(pipeline, "_execution_device", "cpu"),
        ),
    }


def scales_images(pipeline: Any) -> bool:
    """Whether a diffusers pipeline scales images itself to the width and height that it takes, and
    with another filter than most, whose image processor has the server's."""
    sized = {"width", "height"} <= described(pipeline).takes
    config = getattr(getattr(pipeline, "image_processor", None), "config", {})
    usual = hasattr(pipeline, "image_processor") and config.get("resample", LANCZOS) == LANCZOS
    return sized and isinstance(pipeline, DiffusionPipeline) and not usual


def _images(
    pipeline: Any, parameters: Parameters, enlargement: int, *, copies: bool
) -> dict[str, Any]:
    """The image arguments of a call. The image that has the size of the result, and masks, are
    resized to the requested size; others, which are references, stay as they are."""
    if parameters.sources is None:
        return {}
    call, size = (
        described(pipeline),
        (
            parameters.width // enlargement,
            parameters.height // enlargement,
        ),
    )
    scaled = None if scales_images(pipeline) else call.scaled
    found: dict[str, Any] = {}
    for given, images in parameters.sources.images.items():
        name = call.name_of(given)
        if name is None:
            continue
        argument = call.images[name]
        if name == scaled or (argument.type == "mask" and scaled is not None):
            images = tuple(_resized(image, size) for image in images)
        if copies and name == (call.scaled or call.image) and len(images) == 1:
            images *= parameters.n
        found[name] = images[0] if len(images) == 1 else list(images)
    return found


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
