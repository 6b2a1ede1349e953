"""Makes the masks of edits from uploads.

If an image's alpha varies, or all of it is transparent, its pixels that are at least half
transparent are repainted; otherwise those of a mask that are at least half white. Masks are soft:
255 repaints, 0 keeps, edges are in between; most of diffusers' pipelines cut them at a half.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from stepweave.errors import InvalidRequestError

HALF = 128  # of 255: the threshold of a mask, as in diffusers' pipelines
COLOURED = 32  # of 255: the largest difference between channels of a grey pixel
COLOURED_SHARE = 0.001  # the largest share of coloured pixels in a mask

Extrema = tuple[int, int]  # smallest and largest alpha of an image


def has_holes(alpha: Extrema | None) -> bool:
    """Whether an image's alpha says what to repaint, so that it needs no mask."""
    return alpha is not None and _alpha_decides(alpha) and alpha[0] <= 255 - HALF


def of_alpha(image: Image.Image) -> Image.Image:
    """The mask of an RGBA image's transparency, mode L."""
    return image.getchannel("A").point(list(range(255, -1, -1)))


def of_mask(image: Image.Image, alpha: Extrema | None, name: str = "mask") -> Image.Image:
    """The mask (mode L) of an uploaded mask in RGB or RGBA; `alpha` are the extrema of its alpha,
    or None. Raises InvalidRequestError for an opaque image in colours."""
    if alpha is not None and _alpha_decides(alpha):
        return of_alpha(image)
    colours = image.convert("RGB")  # as they are, without the alpha
    pixels = np.asarray(colours)
    share = float((pixels.max(2) - pixels.min(2) > COLOURED).mean())
    if share > COLOURED_SHARE:
        raise InvalidRequestError(
            f"{name} is opaque and in colours ({100 * share:.1f}% of its pixels). Send one that is "
            "transparent where the image is to be repainted, or a black and white one, white "
            "there.",
            param=name,
        )
    return colours.convert("L")


def repaints(mask: Image.Image) -> bool:
    """Whether a mask repaints any pixel."""
    _, most = mask.getextrema()
    return bool(most >= HALF)  # type: ignore[operator]


def _alpha_decides(alpha: Extrema) -> bool:
    return alpha[0] != alpha[1] or alpha[1] == 0
