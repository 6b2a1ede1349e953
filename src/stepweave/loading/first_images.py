"""Checks the first images, before the server is ready, for signs of a model with wrong weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepweave.errors import LoadError

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.float64]

# Largest mean difference of pixels, in [0, 1], between a job alone and the same job in shared
# forwards; 100 times the difference that merging allows
MOST_APART = 0.01
MOST_APART_IN_HALF_PRECISION = 0.1


def check_images(
    alone: Any,
    together: Sequence[Any],
    dtype: torch.dtype,
    more: Callable[[], Sequence[Any]] = tuple,
) -> None:
    """Check images of different jobs made together, and the first one's image made `alone`.

    `more` makes others; it is called if there is only one, and that is constant. None stands for an
    image that a safety checker has blacked out, which is skipped. Raises LoadError if the two runs
    of a job differ, if pixels are not finite, or if all images are constant; some that are constant
    are only logged.
    """
    if alone is None or together[0] is None:
        logger.warning(
            "self-check: a safety checker flagged the first image, so two runs were not compared"
        )
        return
    together = [image for image in together if image is not None]
    first, *others = (_pixels(image) for image in (alone, *together))
    constant = [_is_constant(image) for image in others]
    if len(others) == 1 and all(constant):
        constant += [_is_constant(_pixels(image)) for image in more() if image is not None]
    if all(constant):
        raise LoadError(
            f"all {len(constant)} first images, of different prompts and seeds, are of one colour: "
            f"the weights are not those of a trained model, or {str(dtype).removeprefix('torch.')} "
            "is not precise enough for them (STEPWEAVE_DTYPE)"
        )
    if any(constant):
        logger.warning("%d of %d first images are of one colour", sum(constant), len(constant))
    apart = _apart(first, others[0])
    if apart > _most_apart(dtype):
        raise LoadError(
            f"two runs of one job with one seed differ by {apart:.1%} of the pixels' range: "
            "something in the pipeline draws random numbers that do not depend on the seed, such "
            "as a module in training mode or a scheduler with noise of its own"
        )
    logger.info(
        "self-check: two runs of a job agree (their pixels differ by %.2g on average), %d images "
        "are finite, %d of one colour",
        apart, len(others), sum(constant),
    )  # fmt: skip


def agree(image: Any, other: Any, dtype: torch.dtype) -> bool:
    """Whether two images are the same, but for rounding: an image of other noise in a part of the
    call only is another one."""
    return _apart(_pixels(image), _pixels(other)) <= _most_apart(dtype) / 10


def _apart(pixels: Pixels, others: Pixels) -> float:
    return float(np.abs(pixels - others).mean()) if pixels.shape == others.shape else 1.0


def _most_apart(dtype: torch.dtype) -> float:
    return MOST_APART if torch.finfo(dtype).bits >= 32 else MOST_APART_IN_HALF_PRECISION


def _pixels(image: Any) -> Pixels:
    """The pixels of an image in [0, 1]. Raises LoadError if they are not finite."""
    values = np.asarray(image.cpu().float() if isinstance(image, torch.Tensor) else image)
    pixels = np.atleast_3d(values.astype(np.float64) / (255 if values.dtype == np.uint8 else 1))
    if not np.isfinite(pixels).all():
        raise LoadError("the first images have pixels that are not finite; see STEPWEAVE_DTYPE")
    return pixels


def _is_constant(pixels: Pixels) -> bool:
    """Whether each channel has a single level, except for rounding."""
    return bool((np.ptp(pixels.reshape(-1, pixels.shape[-1]), axis=0) <= 1.01 / 255).all())
