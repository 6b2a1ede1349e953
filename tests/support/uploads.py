"""Uploads of an edit: an image, and perhaps a mask."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image

from stepweave.images import uploads
from stepweave.images.decoders import UploadedFile
from stepweave.images.uploads import Fit, Size, Upload
from stepweave.parameters import Sources


def sources_of(image: Image.Image, mask: Image.Image | None = None) -> Sources:
    """An edit's images, decoded."""
    return Sources({"image": (image,)} | ({} if mask is None else {"mask": (mask,)}))


def whatever_its_name(fit: Callable[[Size, bool], Size]) -> Fit:
    return lambda name, size, masked: fit(size, masked)


def files_of(image: bytes | BinaryIO, mask: bytes | BinaryIO | None = None) -> list[UploadedFile]:
    """An edit's files, for a process to decode."""
    masks = [] if mask is None else [UploadedFile("mask", mask, is_mask=True)]
    return [UploadedFile("image", image), *masks]


def read_sources(
    image: bytes,
    mask: bytes | None = None,
    *,
    max_pixels: int,
    fit: Callable[[Size, bool], Size] | None = None,
) -> Sources:
    """Decode an edit's files in this process."""
    files = [Upload("image", image)]
    if mask is not None:
        files.append(Upload("mask", mask, is_mask=True))
    named = None if fit is None else whatever_its_name(fit)
    return uploads.read_sources(files, leading="image", max_pixels=max_pixels, fit=named)


def url_of(image: Image.Image) -> str:
    """An image as a data URL of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
