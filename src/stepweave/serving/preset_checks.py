"""Checks that a pipeline supports the values of its preset."""

from __future__ import annotations

import difflib
from typing import Any

from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import LoadError
from stepweave.loading.sizes import SizeLimits
from stepweave.planning.workload import arguments_of

Size = tuple[int, int]  # width and height in pixels


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
