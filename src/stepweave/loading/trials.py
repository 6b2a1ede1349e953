"""What a pipeline takes of what it seems to take: sizes, guidance, numbers of images, long prompts,
tried before it is offered.

A pipeline's configuration tells the multiples of its sizes, the length of its tables and what its
call accepts, and often not the whole truth. So jobs of a few steps are run at the ends of each
range, of images as small as may be, and what fails is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stepweave.errors import LoadError
from stepweave.loading.sizes import SizeLimits

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # width and height in pixels

SLIGHT = 1.01  # guidance that is hardly any: where pipelines compute it but not without any
# times the pixels asked for: from there on, near its native number, a pipeline goes by a size of
# its own
LARGER = 4
FINER = 16  # times the multiple that the configuration tells, up to which multiples are tried
SHORT = 10  # characters of a prompt that the warm-up has shown to work


@dataclass(frozen=True)
class Limits:
    """What requests of one kind may ask for. `guidance` is least and most."""

    sizes: SizeLimits
    guidance: tuple[float, float]
    images: int
    prompt_characters: int

    def as_json(self) -> dict[str, object]:
        """As they are told to clients."""
        only = self.sizes.only
        return {
            "size_multiple": self.sizes.multiple,
            "min_side": self.sizes.min_side if only is None else min(only),
            "max_side": self.sizes.longest if only is None else max(only),
            "only_size": None if only is None else "{}x{}".format(*only),
            "guidance_range": list(self.guidance),
            "max_images": self.images,
            "max_prompt_characters": self.prompt_characters,
        }


@dataclass(frozen=True)
class Fault:
    """Why a job did not give what was asked for; the size of the images that it gave, if it gave
    any."""

    reason: str
    made: Size | None = None


class Attempt(Protocol):
    """Runs a job of a few steps. None if it gave as many images as were asked for; Fault.made tells
    of those of another size.

    `guidance` is the pipeline's default where it is None, `characters` the length of the prompt.
    """

    def __call__(
        self,
        size: Size,
        *,
        images: int = 1,
        guidance: float | None = None,
        characters: int | None = None,
    ) -> Fault | None: ...


def narrowed(
    limits: Limits,
    native: Size,
    guidance: float | None,
    attempt: Attempt,
    name: str,
    like: Limits | None = None,
) -> Limits:
    """Of a pipeline's limits those that jobs bear out. `native` and `guidance` are its defaults,
    which work.

    Those of another pipeline of the same modules may be known: `like`. Then guidance and prompts
    are not tried again, its sizes are tried first, and no size is the only one, since edits may go
    by the shape of their source: then sizes are about the native one. What is left out is logged,
    with the `name` of the pipeline.
    """
    own = attempt(native) if like is None else None  # edits of the native size have just been run
    if own is not None and own.made is None:
        raise LoadError(
            f"{name} fails with an image of its own size, {native[0]}x{native[1]}: {own.reason}"
        )

    def fails(size: Size, **what: Any) -> bool:
        """Whether it fails at what is no question of sizes."""
        fault = attempt(size, **what)
        return fault is not None and fault.made is None

    sizes = limits.sizes
    if own is None:  # else all of its sizes are its own, and are told with the images
        same = like is not None and like.sizes.only is None and _same_sizes(like.sizes, attempt)
        sizes = like.sizes if like is not None and same else _sizes(limits.sizes, native, attempt)
    if like is not None and sizes.only is not None:
        sizes = _about(limits.sizes, native)
    free = sizes.only is None and own is None
    small = (sizes.min_side, sizes.min_side) if free else native
    uneven = _uneven(sizes) if free else native  # where a wrong size would show
    images = _most(
        limits.images,
        1,
        lambda count: (
            not fails(small, images=count) if own else attempt(uneven, images=count) is None
        ),
    )
    if like is None:
        like = replace(
            limits,
            guidance=_guidance(
                limits.guidance, guidance, lambda value: not fails(small, guidance=value)
            ),
            prompt_characters=_most(
                limits.prompt_characters, SHORT, lambda count: not fails(small, characters=count)
            ),
        )
        if (
            images > 1
            and guidance is not None
            and fails(small, images=2, guidance=like.guidance[0])
        ):
            images = 1  # not without guidance
    found = replace(like, sizes=sizes, images=images)
    before, after = limits.as_json(), found.as_json()
    for key, value in after.items():
        if value != before[key]:
            logger.warning(
                "%s: %s is %s, not %s as it seems: what was tried beyond fails",
                name,
                key,
                value,
                before[key],
            )
    return found


def _same_sizes(sizes: SizeLimits, attempt: Attempt) -> SizeLimits | None:
    """The same, if an image near the smallest works, and a long one."""
    works = attempt(_uneven(sizes)) is None and attempt((_longest(sizes), sizes.min_side)) is None
    return sizes if works else None


def _uneven(sizes: SizeLimits) -> Size:
    """Near the smallest, not square, and no multiples of twice as much."""
    return sizes.min_side + sizes.multiple, sizes.min_side + 3 * sizes.multiple


def _longest(sizes: SizeLimits) -> int:
    """The longest side of an image as narrow as may be."""
    return min(sizes.longest, sizes.max_pixels // sizes.min_side) // sizes.multiple * sizes.multiple


def _about(sizes: SizeLimits, native: Size) -> SizeLimits:
    """From half to twice the native sides: whatever size is made of them, its shape is no band."""
    least = max(sizes.multiple, min(native) // 2 // sizes.multiple * sizes.multiple)
    return replace(sizes, min_side=least, max_side=min(sizes.longest, 2 * max(native)))


def _sizes(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits:
    fixed = replace(sizes, only=native)
    multiple = sizes.multiple
    while multiple <= min(FINER * sizes.multiple, *native):
        side = multiple
        while side <= min(native):
            fault = attempt((side, side))
            if fault is None:
                break
            made = 0 if fault.made is None else math.prod(fault.made)
            if made >= LARGER * side * side and 2 * made >= math.prod(native):
                return fixed  # it goes by a size of its own, however small the one asked for
            side *= 2
        else:
            return fixed
        tried = replace(sizes, multiple=multiple, min_side=side)
        if attempt(_uneven(tried)) is None:
            return _long_sides(tried, native, attempt)
        multiple *= 2
    return fixed


def _long_sides(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits:
    """With the longest sides that work, both ways, in images as narrow as may be."""
    least, multiple = sizes.min_side, sizes.multiple
    first = longest = _longest(sizes)
    while longest > min(native):
        if attempt((longest, least)) is None and attempt((least, longest)) is None:
            return sizes if longest == first else replace(sizes, max_side=longest)
        longest = longest // 2 // multiple * multiple
    side = min(native)
    while least < side and (
        attempt((side, least)) is not None or attempt((least, side)) is not None
    ):
        least *= 2
    return replace(sizes, min_side=min(least, side), max_side=side)


def _guidance(
    limits: tuple[float, float], default: float | None, works: Callable[[float], bool]
) -> tuple[float, float]:
    """From the least to the most that works, of few that are tried. Without a default it is taken
    to be 1."""
    if default is None:
        default = 1.0
    least, most = limits
    low, high = min(default, most), most
    for value in (1.0, least):
        if value < low:
            if works(value):
                low = value
            else:
                low = SLIGHT if value < SLIGHT < low and low == default and works(SLIGHT) else low
                break
    while high > default and not works(high):
        high = high / 2 if high > 2 * default and high > 1 else default
    if default < 1 < high and not works(1.0):
        high = default
    return low, high


def _most(most: int, least: int, works: Callable[[int], bool]) -> int:
    """The most that works, but for a sixteenth of it; `least`, which is taken to work, if no more
    does."""
    if most <= least or works(most):
        return most
    while most - least > max(1, least // 16):
        middle = (least + most) // 2
        least, most = (middle, most) if works(middle) else (least, middle)
    return least
