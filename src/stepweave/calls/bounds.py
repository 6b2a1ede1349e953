"""How large a value of an argument may be: by the preset, by what the model's tables hold, by the
work that it means, or else by its type.

A pipeline's signature says nothing about limits. A number of steps, of pixels, of images or of
tokens multiplies the work of a call, so a request may not ask for more of it than by the fields
that the server has for that; an index beyond a table of the model breaks a GPU for all requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepweave.planning.workload import multiplies_work

LARGEST_NUMBER = 1_000.0
MOST_GUIDANCE = 100.0
MOST_TOKENS = 512  # of a prompt, if the pipeline has no default
MOST_ELEMENTS = 64  # of a list
FURTHER = 10  # times the default, where that is larger than other bounds

_STEPS = re.compile(r"(?:^|_)steps(?:_|$)")
_RESOLUTION = re.compile(r"resolution|^upsampling_|_res$")
_SIDES = re.compile(r"(?:^|_)(?:height|width|size|crop|crops|coord|coords)(?:_|$)")
_AREA = re.compile(r"(?:^|_)area$")
_TOKENS = re.compile(r"sequence_length|max_length|max_new_tokens")
_SCALE = re.compile(r"guidance|cfg|scale")
_SHARE = re.compile(
    r"strength|rescale|(?:^|_)eta$|(?:^|_)(?:start|end|stop)$|threshold|tolerance|_beta$|truncation"
    r"|ratio$"
)
_TRAIN = re.compile(r"(?:^|_)timesteps$|^noise_level$")
# of tables whose lengths are not known: reading beyond one breaks a GPU
_INDEX = re.compile(r"(?:^|_)(?:mode|type|index|level)$")


@dataclass(frozen=True)
class WorkLimits:
    """The server's and the model's limits that bound arguments."""

    steps: int
    images: int
    side: int  # pixels
    pixels: int
    characters: int  # of a text
    train_timesteps: int = 1000  # of the scheduler
    classes: int | None = None  # of a class-conditional model
    modes: int | None = None  # kinds of images that a ControlNet takes
    tables: Mapping[str, int] = field(default_factory=dict)  # lengths, by the argument with ids


@dataclass(frozen=True)
class Bounds:
    """The least and the most of a number, or of each number in a list; the most elements of a list,
    and characters of a text."""

    least: float
    most: float
    length: int = MOST_ELEMENTS
    characters: int = 0


def bounds_of(name: str, default: Any, *, integer: bool, limits: WorkLimits) -> Bounds | None:
    """The bounds of a number, or of numbers in a list, by its name, its default and its type; None
    for an index of a table whose length is not known."""
    largest = _largest(default)
    if _TRAIN.search(name):
        return Bounds(0, limits.train_timesteps - (1 if integer else 0), limits.steps)
    if name == "sigmas":
        return Bounds(0, LARGEST_NUMBER, limits.steps)
    if integer:
        if name == "class_labels":
            return Bounds(0, (limits.classes or limits.train_timesteps) - 1, 1)
        if name.startswith("original_") and _STEPS.search(name):  # a table's, not a loop's
            return Bounds(1, limits.train_timesteps)
        if _STEPS.search(name):
            return Bounds(1 if "inference" in name else 0, limits.steps)
        if multiplies_work(name):
            return Bounds(1, max(largest, limits.images))
        if _TOKENS.search(name):  # tables of positions may end at the default
            return Bounds(1, largest or MOST_TOKENS)
        if name == "control_mode" and limits.modes is not None:
            return Bounds(0, limits.modes - 1)
        if _INDEX.search(name):
            return None
        if _RESOLUTION.search(name):
            return Bounds(0, max(largest, math.isqrt(limits.pixels)))
        if _AREA.search(name):
            return Bounds(1, max(largest, limits.pixels))
        if _SIDES.search(name):
            least = -limits.side if "crops" in name or "coord" in name else 0
            return Bounds(least, max(largest, limits.side))
        return Bounds(0, max(FURTHER * largest, LARGEST_NUMBER))
    if _SHARE.search(name) and largest <= 1:
        return Bounds(0, 1)
    if _SCALE.search(name):
        return Bounds(0, max(FURTHER * largest, MOST_GUIDANCE) if largest > 10 else MOST_GUIDANCE)
    most = max(FURTHER * largest, LARGEST_NUMBER)
    return Bounds(-most, most)


def _largest(default: Any) -> float:
    """The largest magnitude in a default; 0 if it has no numbers."""
    if isinstance(default, (list, tuple)):
        return max(map(_largest, default), default=0)
    return abs(default) if isinstance(default, (int, float)) else 0
