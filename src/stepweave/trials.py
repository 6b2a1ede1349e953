"""What a pipeline takes of what it seems to take: sizes, guidance, numbers of images, long prompts, tried before it is offered.

A pipeline's configuration tells the multiples of its sizes, the length of its tables and what its call accepts, and often not the
whole truth. So jobs of a few steps are run at the ends of each range, of images as small as may be, and what fails is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from stepweave.loading.sizes import SizeLimits

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # width and height in pixels

SLIGHT = 1.01  # guidance that is hardly any: where pipelines compute it but not without any
LARGER = 4  # times the number of pixels asked for, from which on a pipeline goes by a size of its own
FINER = 16  # times the multiple that the configuration tells, up to which multiples are tried
FEW_STEPS = 3  # that a pipeline has been seen to take
SHORT = 64  # characters of a prompt that every pipeline has been seen to take


@dataclass(frozen=True)
class Limits:
    """What requests for a pipeline may ask for. `guidance` is least and most, `least_steps` of denoising."""

    sizes: SizeLimits
    guidance: tuple[float, float]
    least_steps: int
    images: int
    prompt_characters: int

    def as_json(self) -> dict[str, object]:
        """As they are told to clients."""
        return {
            "size_multiple": self.sizes.multiple,
            "min_side": self.sizes.min_side,
            "max_side": self.sizes.longest,
            "only_size": None if self.sizes.only is None else "{}x{}".format(*self.sizes.only),
            "min_num_inference_steps": self.least_steps,
            "guidance_range": list(self.guidance),
            "max_images": self.images,
            "max_prompt_characters": self.prompt_characters,
        }


@dataclass(frozen=True)
class Fault:
    """Why a job did not give what was asked for; the size of the images that it gave, if it gave any."""

    reason: str
    made: Size | None = None


class Attempt(Protocol):
    """Runs a job of a few steps. None if it gave as many images as were asked for, of that size.

    `guidance` is the pipeline's default where it is None, `characters` the length of the prompt. With few `steps` it runs those.
    """

    def __call__(
        self,
        size: Size,
        *,
        images: int = 1,
        guidance: float | None = None,
        characters: int | None = None,
        steps: int | None = None,
    ) -> Fault | None: ...


def narrowed(
    limits: Limits, native: Size, guidance: float | None, attempt: Attempt, name: str, like: Limits | None = None
) -> Limits:
    """Of a pipeline's limits those that jobs bear out. `native` and `guidance` are its defaults, which work.

    Another pipeline of the same modules may have shown what works: `like`. Then steps, guidance and prompts are not tried again,
    and its sizes are tried first. What is left out is logged, with the `name` of the pipeline.
    """
    sizes = _same_sizes(like.sizes, attempt) if like is not None and like.sizes.only is None else None
    sizes = sizes or _sizes(limits.sizes, native, attempt)
    small = sizes.only or (sizes.min_side, sizes.min_side)
    images = _most(limits.images, 1, lambda count: attempt(small, images=count))
    if like is None:
        like = replace(
            limits,
            least_steps=next((steps for steps in (1, 2) if attempt(small, steps=steps) is None), FEW_STEPS),
            guidance=limits.guidance if guidance is None else _guidance(limits.guidance, guidance, small, attempt),
            prompt_characters=_most(limits.prompt_characters, SHORT, lambda count: attempt(small, characters=count)),
        )
    found = replace(like, sizes=sizes, images=images)
    before, after = limits.as_json(), found.as_json()
    for key, value in after.items():
        if value != before[key] and key != "min_side":
            logger.warning(
                "%s: %s is %s, not %s as it seems: the rest was tried and fails", name, key, value, before[key]
            )
    return found


def _same_sizes(sizes: SizeLimits, attempt: Attempt) -> SizeLimits | None:
    """The same, if an image near the smallest works, and a long one."""
    least, multiple = sizes.min_side, sizes.multiple
    longest = min(sizes.longest, sizes.max_pixels // least) // multiple * multiple
    works = attempt((least + multiple, least + 3 * multiple)) is None and attempt((longest, least)) is None
    return sizes if works else None


def _sizes(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits:
    fixed = replace(sizes, only=native)
    multiple = sizes.multiple
    while multiple <= min(FINER * sizes.multiple, *native):
        side = multiple
        while side <= min(native):
            fault = attempt((side, side))
            if fault is None:
                break
            if fault.made is not None and math.prod(fault.made) >= LARGER * side * side:
                return fixed  # it goes by a size of its own, however small the one asked for
            side *= 2
        else:
            return fixed
        if attempt((side + multiple, side + 3 * multiple)) is None:  # no multiples of twice as much
            return _long_sides(replace(sizes, multiple=multiple, min_side=side), native, attempt)
        multiple *= 2
    return fixed


def _long_sides(sizes: SizeLimits, native: Size, attempt: Attempt) -> SizeLimits:
    """With the longest sides that work, both ways, in images as narrow as may be."""
    least, multiple = sizes.min_side, sizes.multiple
    first = longest = min(sizes.longest, sizes.max_pixels // least) // multiple * multiple
    while longest > max(native):
        if attempt((longest, least)) is None and attempt((least, longest)) is None:
            return sizes if longest == first else replace(sizes, max_side=longest)
        longest = longest // 2 // multiple * multiple
    return replace(sizes, max_side=max(native))


def _guidance(limits: tuple[float, float], default: float, size: Size, attempt: Attempt) -> tuple[float, float]:
    def works(value: float) -> bool:
        return attempt(size, guidance=value) is None

    least, most = limits
    low, high = default, max(default, most)
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


def _most(most: int, least: int, attempt: Callable[[int], Fault | None]) -> int:
    """The largest of `most`, its half, its quarter and so on that works, `least` if none does."""
    while most > least and attempt(most) is not None:
        most = max(least, most // 2)
    return most
