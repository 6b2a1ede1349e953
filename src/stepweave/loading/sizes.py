"""Which sizes of images a pipeline makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from stepweave.errors import InvalidRequestError, shown

# sides of the largest square that an image's side may have, where the model itself has no limit
NARROW = 4


@dataclass(frozen=True)
class SizeLimits:
    """Both sides are multiples of `multiple`, at least `min_side`, and at most `max_side`, if there
    is one.

    Their product is at most `max_pixels`. Or there is `only` one size, width and height. `native`
    is allowed whatever it is.
    """

    multiple: int
    max_side: int | None
    max_pixels: int
    min_side: int = 1
    only: tuple[int, int] | None = None
    native: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.only is not None:
            return "{}x{} only.".format(*self.only)
        return (
            f"Both sides are multiples of {self.multiple}, at least {self.min_side} and at most "
            f"{self.longest}."
        )

    def read(self, size: str) -> tuple[int, int]:
        """Width and height of WIDTHxHEIGHT. Raises InvalidRequestError naming value and limit."""
        width, height = (int(side) for side in size.split("x"))
        if (width, height) in (self.native, self.only):
            return width, height
        if self.only is not None:
            only = "{}x{}".format(*self.only)
            raise InvalidRequestError(
                f"size is {shown(size)}; the model makes images of {only} only.", param="size"
            )
        if width % self.multiple or height % self.multiple or not width or not height:
            raise InvalidRequestError(
                f"size is {shown(size)}; both sides must be positive multiples of {self.multiple}.",
                param="size",
            )
        if min(width, height) < self.min_side:
            raise InvalidRequestError(
                f"size is {shown(size)}; the model makes images of at least {self.min_side} a "
                f"side.",
                param="size",
            )
        if max(width, height) > self.longest:
            raise InvalidRequestError(
                f"size is {shown(size)}; the model's limit is {self.longest} a side.", param="size"
            )
        if width * height > self.max_pixels:
            raise InvalidRequestError(
                f"size is {shown(size)}, {width * height} pixels; the limit is {self.max_pixels}.",
                param="size",
            )
        return width, height

    def of_edit(self, source: tuple[int, int], native: int | None = None) -> tuple[int, int]:
        """The size of an image that starts from one of the size `source`: its own, or the nearest.

        Where the source is larger than may be, it has at most `native` pixels, those of the model's
        own size: beyond these most models make worse images, and take longer. None for as many as
        may be.

        Raises InvalidRequestError for a source so long that its edit would be a thread.
        """
        if self.only is not None:
            return self.only
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

    @property
    def longest(self) -> int:
        """The longest side; where the model itself has no limit, so long that an image is a narrow
        band."""
        side = NARROW * math.isqrt(self.max_pixels) if self.max_side is None else self.max_side
        return side // self.multiple * self.multiple


def _denoiser_config(pipeline: Any) -> Any:
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    return getattr(denoiser, "config", None)


def _vae_scale(pipeline: Any) -> int:
    """Pixels to a latent pixel, along one axis."""
    return int(getattr(pipeline, "vae_scale_factor", 8))


def _patch_size(pipeline: Any) -> int:
    """Latent pixels to a token of the denoiser, along one axis; the largest where the axes
    differ."""
    config = _denoiser_config(pipeline)
    patch = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", None) or 1
    return int(max(patch) if isinstance(patch, (list, tuple)) else patch)


def size_multiple(pipeline: Any) -> int:
    """What both sides must be a multiple of: the VAE's scale times the denoiser's patch (packed
    latents included)."""
    patch = _patch_size(pipeline)
    if patch == 1 and hasattr(pipeline, "_pack_latents"):
        patch = 2
    return _vae_scale(pipeline) * patch


def latent_positions(pipeline: Any, width: int, height: int) -> int:
    """Positions of the latents of an image of so many pixels: height x width by the VAE's scale,
    before they are packed or made into the denoiser's patches."""
    scale = _vae_scale(pipeline)
    return -(-width // scale) * -(-height // scale)


def max_side(pipeline: Any) -> int | None:
    """The longest side in pixels that the denoiser's tables of positions cover, None where there is
    no such table.

    On a GPU what lies beyond must not be tried: a table that is read past its end breaks the device
    for good.
    """
    config = _denoiser_config(pipeline)
    positions = getattr(config, "pos_embed_max_size", None)
    lengths = getattr(config, "axes_lens", None)  # of frames or tokens, rows and columns
    if isinstance(positions, int):
        embed = getattr(getattr(pipeline, "transformer", None), "pos_embed", None)
        table = getattr(embed, "pos_embed", None)
        if isinstance(table, torch.Tensor) and table.ndim == 3:
            # it is of a square; AuraFlow's configuration counts its positions, others those of a
            # side
            positions = min(positions, math.isqrt(table.shape[1]))
    elif isinstance(lengths, (list, tuple)) and len(lengths) == 3:
        positions = min(lengths[1:])
    return (
        positions * _patch_size(pipeline) * _vae_scale(pipeline)
        if isinstance(positions, int)
        else None
    )


def native_size(pipeline: Any) -> tuple[int, int]:
    """Width and height in pixels that the pipeline makes when asked for none."""
    side = getattr(pipeline, "default_sample_size", None) or getattr(
        _denoiser_config(pipeline), "sample_size", None
    )
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    scale = _vae_scale(pipeline)
    return int(width or 64) * scale, int(height or 64) * scale


def nearest_size(
    size: tuple[int, int], multiple: int, max_side: int | None, max_pixels: int, min_side: int = 1
) -> tuple[int, int]:
    """The allowed size nearest to an image's: as large if it may be, else smaller, in proportion
    but for rounding.

    Sides are multiples of `multiple`, at least `min_side` and at most `max_side`; their product is
    at most `max_pixels`.
    """
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
    if not allowed:  # it is so narrow that the least is too wide
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
