"""Tries which sizes, guidance, numbers of images and long prompts a pipeline really accepts.

The limits in a pipeline's configuration (multiples of sizes, lengths of tables, arguments) are
often wrong. So jobs of a few steps, with images as small as possible, are run at the ends of each
range, and the ranges are reduced to those that work.
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

SLIGHT = 1.01  # the least guidance for pipelines that need some
# a pipeline whose image has this many times the requested pixels, near its native number, ignores
# the requested size
LARGER = 4
WIDE = 0.75  # how near to the proportions that were asked for those of an image are
FINER = 16  # multiples are tried up to this many times that of the configuration
SHORT = 10  # characters of a prompt that is known to work


@dataclass(frozen=True)
class Limits:
    """The limits of requests of one kind. `guidance` is (least, most)."""

    sizes: SizeLimits
    guidance: tuple[float, float]
    images: int
    prompt_characters: int

    def as_json(self) -> dict[str, object]:
        """The form in which clients see them."""
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
    """Why a job did not give the requested images; `made` is the size of those that it gave."""

    reason: str
    made: Size | None = None


class Attempt(Protocol):
    """Runs a job of a few steps. Returns None if it gave the requested number and size of images.
    `guidance` None is the pipeline's default; `characters` is the length of the prompt."""

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
    """Reduce a pipeline's limits to those with which jobs succeed, and log changes with its `name`.
    `native` and `guidance` are its defaults. Raises LoadError if its native size fails.

    `like` are limits of another pipeline of the same modules. Then guidance and prompts are not
    tried again, its sizes are tried first, and no size is the only one, since edits may depend on
    the shape of their source: instead, sizes near the native one are allowed.
    """
    own = attempt(native) if like is None else None  # edits of the native size have just been run
    if own is not None and own.made is None:
        raise LoadError(
            f"{name} fails with an image of its own size, {native[0]}x{native[1]}: {own.reason}"
        )

    def fails(size: Size, **what: Any) -> bool:
        """Whether a job fails for another reason than the size of its images."""
        fault = attempt(size, **what)
        return fault is not None and fault.made is None

    sizes = limits.sizes
    if own is None:  # otherwise it makes images of sizes of its own
        same = like is not None and like.sizes.only is None and _same_sizes(like.sizes, attempt)
        sizes = like.sizes if like is not None and same else _sizes(limits.sizes, native, attempt)
    if like is not None and sizes.only is not None:
        sizes = _about(limits.sizes, native)
    free = sizes.only is None and sizes.area is None and own is None and not sizes.square
    small = (sizes.min_side, sizes.min_side) if free else native
    uneven = _uneven(sizes) if free else native  # where a wrong size would show
    if math.prod(uneven) > sizes.max_pixels or max(uneven) > sizes.longest:
        uneven = native

    def makes(count: int) -> bool:
        if own:
            return not fails(small, images=count)
        fault = attempt(uneven, images=count)
        # a wrong size speaks against several only if one alone has the right one
        return fault is None or (fault.made is not None and attempt(uneven) == fault)

    images = _most(limits.images, 1, makes)
    if like is None:
        scales = _guidance(limits.guidance, guidance, lambda one: not fails(small, guidance=one))
        longest = _most(
            limits.prompt_characters, SHORT, lambda count: not fails(small, characters=count)
        )
        like = replace(limits, guidance=scales, prompt_characters=longest)
        several = images > 1 and guidance is not None
        if several and fails(small, images=2, guidance=like.guidance[0]):
            images = 1  # not without guidance
    found = replace(like, sizes=sizes, images=images)
    before, after = limits.as_json(), found.as_json()
    for key, value in after.items():
        if value != before[key]:
            logger.warning(
                "%s: %s is %s, not %s as it seems: a trial beyond failed",
                name, key, value, before[key],
            )  # fmt: skip
    return found


def _same_sizes(sizes: SizeLimits, attempt: Attempt) -> SizeLimits | None:
    """These sizes, if an image near the smallest works, and a long one."""
    works = attempt(_uneven(sizes)) is None and attempt((_longest(sizes), sizes.min_side)) is None
    return sizes if works else None


def _uneven(sizes: SizeLimits) -> Size:
    """A size near the smallest, not square, whose sides are odd multiples of `multiple`."""
    return sizes.min_side + sizes.multiple, sizes.min_side + 3 * sizes.multiple


def _longest(sizes: SizeLimits) -> int:
    """The longest side of the narrowest image."""
    return min(sizes.longest, sizes.max_pixels // sizes.min_side) // sizes.multiple * sizes.multiple


def _about(sizes: SizeLimits, native: Size) -> SizeLimits:
    """Sizes from half to twice the native sides, so that no image is a narrow band."""
    least = max(sizes.multiple, min(native) // 2 // sizes.multiple * sizes.multiple)
    return replace(sizes, min_side=least, max_side=min(sizes.longest, 2 * max(native)))


def _sizes(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits:
    return (
        _multiples(sizes, native, attempt)
        or _wider(sizes, native, attempt)
        or replace(sizes, only=native)
    )


def _multiples(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits | None:
    """Sizes in multiples of a number like that of the configuration; None if none of them works, or
    if the pipeline ignores the size."""
    multiple = sizes.multiple
    while multiple <= min(FINER * sizes.multiple, *native):
        side = multiple
        while side <= min(native):
            fault = attempt((side, side))
            if fault is None:
                break
            made = 0 if fault.made is None else math.prod(fault.made)
            if made >= LARGER * side * side and 2 * made >= math.prod(native):
                return None  # it ignores the requested size
            side *= 2
        else:
            return None
        tried = replace(sizes, multiple=multiple, min_side=side)
        if attempt(_uneven(tried)) is None:
            return _long_sides(tried, native, attempt)
        multiple *= 2
    return None


def _wider(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits | None:
    """Sizes in multiples of the native one, if twice its width works, or squares if it fails or
    comes out upright; or of which only the proportions count, if such an image has those, though
    not the size."""
    side, wide = math.gcd(*native), (2 * native[0], native[1])
    if side < sizes.multiple or wide[0] > sizes.longest or math.prod(wide) > sizes.max_pixels:
        return None
    fault = attempt(wide)
    multiples = replace(sizes, multiple=side, min_side=side)
    if fault is None:
        return _long_sides(multiples, native, attempt)
    if fault.made in (None, wide[::-1]) and native[0] == native[1]:
        large = (2 * side, 2 * side)
        fits = math.prod(large) <= sizes.max_pixels
        return replace(multiples, square=True) if fits and attempt(large) is None else None
    if fault.made is None:
        return None
    share = fault.made[0] * wide[1] / (fault.made[1] * wide[0])
    return replace(sizes, area=math.prod(native)) if WIDE <= share <= 1 / WIDE else None


def _long_sides(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits:
    """Limit the sides to the longest that work in the narrowest images, both ways."""
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
    """The least and the most guidance that work, of few that are tried. Default None means 1."""
    default = 1.0 if default is None else default
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
    """The largest number that works, within a sixteenth; `least` is assumed to work."""
    if most <= least or works(most):
        return most
    while most - least > max(1, least // 16):
        middle = (least + most) // 2
        least, most = (middle, most) if works(middle) else (least, middle)
    return least
