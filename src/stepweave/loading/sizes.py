"""The sizes of images that a pipeline can make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from stepweave.compat.modular import call_class, is_modular
from stepweave.compat.turn_taking import code_matches
from stepweave.errors import InvalidRequestError, shown

# limit of a side if the model has none, in sides of the largest square
NARROW = 4


@dataclass(frozen=True)
class SizeLimits:
    """Sides in pixels are multiples of `multiple`, at least `min_side`, and at most `max_side`
    unless that is None; their product is at most `max_pixels`. With `only`, there is one size,
    (width, height). The size `native` is always allowed. With `area`, only the proportions of a
    size count: all images have about as many pixels. With `square`, both sides are equal."""

    multiple: int
    max_side: int | None
    max_pixels: int
    min_side: int = 1
    only: tuple[int, int] | None = None
    native: tuple[int, int] | None = None
    area: int | None = None
    square: bool = False

    def __str__(self) -> str:
        if self.square:
            return f"Squares whose side is a multiple of {self.multiple}, at most {self.longest}."
        if self.area is not None:
            return f"The proportions count: the model makes images of about {self.area} pixels."
        if self.only is not None:
            return "{}x{} only.".format(*self.only)
        return (
            f"Both sides are multiples of {self.multiple}, at least {self.min_side} and at most "
            f"{self.longest}."
        )

    def read(self, size: str) -> tuple[int, int]:
        """Width and height of WIDTHxHEIGHT. Raises InvalidRequestError naming value and limit."""
        width, height = (int(side) for side in size.split("x"))
        if problem := self._problem(width, height):
            raise InvalidRequestError(f"size is {shown(size)}{problem}.", param="size")
        return width, height

    def _problem(self, width: int, height: int) -> str | None:
        """Why a size is not allowed, with the limit; None if it is."""
        if (width, height) in (self.native, self.only):
            return None
        if self.only is not None:
            return "; the model makes images of {}x{} only".format(*self.only)
        if self.square and width != height:
            return "; the model makes squares only"
        if width % self.multiple or height % self.multiple or not width or not height:
            return f"; both sides must be positive multiples of {self.multiple}"
        if min(width, height) < self.min_side:
            return f"; the model makes images of at least {self.min_side} a side"
        if max(width, height) > self.longest:
            return f"; the model's limit is {self.longest} a side"
        short, long = sorted((width, height))
        if self.area is not None and self.area * short < long * self.multiple**2:
            return (
                f"; with such proportions, a side of about {self.area} pixels in all is less than "
                f"{self.multiple}"
            )
        if width * height > self.max_pixels:
            return f", {width * height} pixels; the limit is {self.max_pixels}"
        return None

    def of_edit(self, source: tuple[int, int], native: int | None = None) -> tuple[int, int]:
        """The size of an edit of an image of size `source`: the same, or the nearest allowed one.

        If the source is too large, the edit has at most `native` pixels, those of the model's
        native size, unless None: with more, most models make worse images, more slowly.

        Raises InvalidRequestError for a source that is too long and narrow.
        """
        if self.only is not None:
            return self.only
        if self.square:
            source = (min(source), min(source))
        width, height = source
        scale = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        if self.max_side is None and max(source) * scale > self.longest:
            raise InvalidRequestError(
                f"image is {width}x{height}; unless size is given, the limit is {self.longest} a "
                f"side.",
                param="image",
            )
        larger = scale < 1 or max(source) > self.longest
        pixels = min(self.max_pixels, native) if native is not None and larger else self.max_pixels
        return nearest_size(source, self.multiple, self.longest, pixels, self.min_side)

    def like(self, source: tuple[int, int], pixels: int) -> tuple[int, int]:
        """The allowed size with the proportions of `source`, and about as many `pixels`."""
        if self.only is not None:
            return self.only
        if self.square:
            source = (min(source), min(source))
        scale = math.sqrt(min(pixels, self.max_pixels) / math.prod(source))
        wanted = tuple(max(1, round(side * scale)) for side in source)
        return nearest_size(
            (wanted[0], wanted[1]), self.multiple, self.longest, self.max_pixels, self.min_side
        )

    @property
    def longest(self) -> int:
        """The longest allowed side; if the model has no limit, that of a narrow image."""
        side = NARROW * math.isqrt(self.max_pixels) if self.max_side is None else self.max_side
        return side // self.multiple * self.multiple


def _denoiser_config(pipeline: Any) -> Any:
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    return getattr(denoiser, "config", None)


def _vae_scale(pipeline: Any) -> int:
    """Pixels per latent pixel, along one axis."""
    return int(getattr(pipeline, "vae_scale_factor", 8))


def _patch_size(pipeline: Any) -> int:
    """Latent pixels per token of the denoiser, along one axis; the larger if the axes differ."""
    config = _denoiser_config(pipeline)
    patch = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", None) or 1
    return int(max(patch) if isinstance(patch, (list, tuple)) else patch)


def knows_multiple(pipeline: Any) -> bool:
    """Whether the pipeline has a denoiser whose configuration says of what sides are multiples."""
    return _denoiser_config(pipeline) is not None


def size_multiple(pipeline: Any) -> int:
    """The number of which both sides must be multiples: the VAE's scale times the denoiser's patch
    (packed latents included)."""
    patch = _patch_size(pipeline)
    if patch == 1 and (hasattr(pipeline, "_pack_latents") or _packs(pipeline)):
        patch = 2
    return _vae_scale(pipeline) * patch


def _packs(pipeline: Any) -> bool:
    """Whether the blocks of a modular pipeline pack 2x2 latent pixels into one."""
    return is_modular(pipeline) and code_matches(
        call_class(pipeline), r"_pack_latents\(|pachifier\.pack_latents\("
    )


def latent_positions(pipeline: Any, width: int, height: int) -> int:
    """The number of latent positions of an image of this size in pixels, before they are packed or
    divided into patches."""
    scale = _vae_scale(pipeline)
    return -(-width // scale) * -(-height // scale)


def max_side(pipeline: Any) -> int | None:
    """The longest side in pixels that the denoiser's tables of positions cover; None without such a
    table. On a GPU more must never be tried: reading beyond a table breaks the device."""
    config = _denoiser_config(pipeline)
    positions = getattr(config, "pos_embed_max_size", None)
    lengths = getattr(config, "axes_lens", None)  # of frames or tokens, rows and columns
    if isinstance(positions, int):
        embed = getattr(getattr(pipeline, "transformer", None), "pos_embed", None)
        table = getattr(embed, "pos_embed", None)
        if isinstance(table, torch.Tensor) and table.ndim == 3:
            # AuraFlow's configuration has the positions of a square, others those of a side
            positions = min(positions, math.isqrt(table.shape[1]))
    elif isinstance(lengths, (list, tuple)) and len(lengths) == 3:
        positions = min(lengths[1:])
    if not isinstance(positions, int):
        return None
    return positions * _patch_size(pipeline) * _vae_scale(pipeline)


def native_size(pipeline: Any) -> tuple[int, int]:
    """The width and height in pixels that the pipeline makes by default."""
    side = getattr(pipeline, "default_sample_size", None) or getattr(
        _denoiser_config(pipeline), "sample_size", None
    )
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    scale = _vae_scale(pipeline)
    return int(width or 64) * scale, int(height or 64) * scale


def nearest_size(
    size: tuple[int, int], multiple: int, max_side: int | None, max_pixels: int, min_side: int = 1
) -> tuple[int, int]:
    """The allowed size, in pixels, nearest to an image's: never larger, with its proportions except
    for rounding. Sides are multiples of `multiple`, at least `min_side` and at most `max_side`;
    their product is at most `max_pixels`."""
    width, height = size
    scale = min(
        1.0, math.sqrt(max_pixels / (width * height)), (max_side or math.inf) / max(width, height)
    )
    ideal = [side * scale / multiple for side in size]
    least = max(1, -(-min_side // multiple))
    most, room = (max_side or multiple * max_pixels) // multiple, max_pixels // multiple**2
    columns, rows = (
        [max(least, math.floor(count)), max(least, math.ceil(count))] for count in ideal
    )
    allowed = [(a, b) for a in columns for b in rows if max(a, b) <= most and a * b <= room]
    if not allowed:  # too narrow for the least side
        long = min(max(columns[0], rows[0]), most, room // least)
        allowed = [(long, least) if width > height else (least, long)]
    best = min(
        allowed,
        key=lambda size: (
            _apart(size[0] * height, size[1] * width),
            _apart(math.prod(size), math.prod(ideal)),
        ),
    )
    return best[0] * multiple, best[1] * multiple


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b))
