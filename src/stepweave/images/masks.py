"""Where an edit repaints: masks of what clients send.

Alpha decides where it is not the same throughout an image, and where all of it is transparent: what
is at least half transparent is repainted. Else what is at least half white is, of a mask. Masks are
soft: 255 repaints, 0 keeps, edges are between; most of diffusers' pipelines cut them at a half.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from stepweave.errors import InvalidRequestError

HALF = 128  # of 255, from which on a mask repaints, as diffusers' pipelines cut it
COLOURED = 32  # of 255, that the channels of a grey pixel may be apart
COLOURED_SHARE = 0.001  # of pixels that may be coloured in a mask

Extrema = tuple[int, int]  # least and largest alpha of an image


def has_holes(alpha: Extrema | None) -> bool:
    """Whether an image without a mask tells by its own alpha what to repaint: some of it, or
    all."""
    return alpha is not None and _alpha_decides(alpha) and alpha[0] <= 255 - HALF


def of_alpha(image: Image.Image) -> Image.Image:
    """The mask of an RGBA image's transparency, mode L."""
    return image.getchannel("A").point(list(range(255, -1, -1)))


def of_mask(image: Image.Image, alpha: Extrema | None) -> Image.Image:
    """The mask of an image, RGB or RGBA, that was sent as one; `alpha` are the extrema of its
    alpha, None if it has none.

    Raises InvalidRequestError for an opaque image in colours.
    """
    if alpha is not None and _alpha_decides(alpha):
        return of_alpha(image)
    colours = image.convert("RGB")  # as they are, without the alpha
    share = _coloured(colours)
    if share > COLOURED_SHARE:
        raise InvalidRequestError(
            f"mask is opaque and in colours ({100 * share:.1f}% of its pixels). Send one that is "
            "transparent where the image is to be repainted, or a black and white one, white "
            "there.",
            param="mask",
        )
    return colours.convert("L")


def repaints(mask: Image.Image) -> bool:
    """Whether any of it does."""
    _, most = mask.getextrema()
    return bool(most >= HALF)  # type: ignore[operator]


def _alpha_decides(alpha: Extrema) -> bool:
    return alpha[0] != alpha[1] or alpha[1] == 0


def _coloured(image: Image.Image) -> float:
    """The share of pixels that are in colour."""
    pixels = np.asarray(image)
    return float((pixels.max(2) - pixels.min(2) > COLOURED).mean())
