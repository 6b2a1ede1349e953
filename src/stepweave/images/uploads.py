"""Decodes uploaded images within limits, scaled and in sRGB, or refuses them with a reason."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import MAX_TEXT_CHUNK

from stepweave.errors import InvalidRequestError, RequestError
from stepweave.images import foreign, masks, scan
from stepweave.images.colours import to_srgb, unconverted
from stepweave.parameters import Sources

FORMATS = ("PNG", "JPEG", "WEBP")
DRAFTS = ("JPEG", "MPO")  # formats that can be decoded at a smaller size
# sides of a decoded JPEG are at least this many times those wanted
DRAFT_SCALE = 2
ORIENTATION = 0x0112  # EXIF
# tolerances of a mask's proportions: pixels of a side, for rounding; ratio of the proportions
LIKE_PIXELS = 1
LIKE_RATIO = 0.02
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTERS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}  # those that swap the sides

Size = tuple[int, int]
# maps an image's size, and whether there is a mask, to the size of its edit
Fit = Callable[[Size, bool], Size]


class NotWanted(Exception):
    """Raised by `fit` to refuse the images."""


@dataclass(frozen=True)
class _Upload:
    """A decoded image in RGB or RGBA, of the wanted size, with properties of the original."""

    image: Image.Image
    size: Size  # of the original, after its rotation
    alpha: masks.Extrema | None  # of the original; None if it has no alpha
    warnings: list[str] = field(default_factory=list)


def read_sources(
    image: bytes, mask: bytes | None, *, max_pixels: int, fit: Fit | None = None
) -> Sources:
    """Decode the images of an edit: in sRGB, rotated by their EXIF orientation, and scaled to the
    size that `fit` returns; without `fit` the image keeps its size. A mask is scaled to the image's
    size. The module `masks` has the rule of what is repainted.

    Raises InvalidRequestError, with the file in `param`, UnsupportedMediaTypeError for another
    format, and errors of `fit`.
    """

    def fitted(size: Size, holes: bool) -> Size:
        return size if fit is None else fit(size, holes or mask is not None)

    source = _decode(image, "image", max_pixels, fitted)
    size, flat = source.image.size, _flat(source.image)
    warnings = [*source.warnings]
    if size != source.size:
        warnings.append(f"image: it is {_by(source.size)}, and was scaled to {_by(size)}.")
    if mask is None:
        stencil = masks.of_alpha(source.image) if masks.has_holes(source.alpha) else None
    else:
        sent = _decode(mask, "mask", max_pixels, lambda own, _: _like(own, source.size, size))
        stencil = masks.of_mask(sent.image, sent.alpha)
        warnings += sent.warnings
        if sent.size != source.size:
            warnings.append(
                f"mask: it is {_by(sent.size)}, and was scaled to {_by(size)} with the image."
            )
    if stencil is not None and not masks.repaints(stencil):
        warnings.append(
            "mask: nothing is repainted: no pixel is at least half transparent, or else at least "
            "half white."
        )
    return Sources(flat, stencil, tuple(warnings))


def _like(mask: Size, image: Size, wanted: Size) -> Size:
    """The `wanted` size. Raises InvalidRequestError if a mask has not the image's proportions."""
    (width, height), (image_width, image_height) = mask, image
    ratio = (width * image_height) / (height * image_width)
    pixels = min(abs(width - width / ratio), abs(height - height * ratio))
    if pixels > LIKE_PIXELS or abs(math.log(ratio)) > LIKE_RATIO:
        raise InvalidRequestError(
            f"mask is {_by(mask)} and image {_by(image)}, turned as their EXIF says; they must be "
            "of one size, or of the same proportions.",
            param="mask",
        )
    return wanted


def _by(size: Size) -> str:
    return "{}x{}".format(*size)


def _decode(data: bytes, param: str, max_pixels: int, fit: Fit) -> _Upload:
    """Decode an image as viewers show it, a stereo one's first frame, in the size that `fit`
    returns.

    Raises UnsupportedMediaTypeError for a known format that is not supported; InvalidRequestError
    for any but a still PNG, JPEG or WebP, a corrupt one, one of more than `max_pixels`, or one that
    costs too much to decode; and errors of `fit`.
    """
    if not data:
        raise InvalidRequestError(f"{param} is empty; send a PNG, JPEG or WebP file.", param=param)
    foreign.refuse(data, param)
    scan.check(data, param, max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # by the header: nothing is decoded yet
            scan.check_pixels(*image.size, max_pixels, param)
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise InvalidRequestError(
                    f"{param} has several frames; send a still image.", param=param
                )
            return _read(image, param, fit)
    except (RequestError, NotWanted):
        raise
    except MemoryError:
        message = (
            f"{param} takes more memory to decode than an image of {max_pixels} pixels should."
        )
        raise InvalidRequestError(message, code=scan.CODE, param=param) from None
    except ValueError as error:
        if "MAX_TEXT_CHUNK" in str(error):
            message = (
                f"{param} has a compressed text or colour profile of more than {MAX_TEXT_CHUNK} "
                f"bytes, the limit."
            )
            raise InvalidRequestError(message, code=scan.CODE, param=param) from None
        raise InvalidRequestError(
            f"{param} is corrupt or cut short (ValueError).", param=param
        ) from error
    except UnidentifiedImageError:
        raise InvalidRequestError(f"{param} is no PNG, JPEG or WebP image.", param=param) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+", str(error))
        count = found[0] if found else "too many"
        raise InvalidRequestError(
            f"{param} has {count} pixels; the limit is {max_pixels}.", param=param
        ) from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors for wrong bytes
        raise InvalidRequestError(
            f"{param} is corrupt or cut short ({type(error).__name__}).", param=param
        ) from error


def _read(image: Image.Image, param: str, fit: Fit) -> _Upload:
    # scaled first, then rotated, then converted, so that the slow parts have few pixels
    box = None
    if image.format in DRAFTS:  # without transparency, its size can be chosen before decoding
        turn = _turn_of(image)
        size = _turned_size(image.size, turn)
        wanted = fit(size, False)
        width, height = _turned_size(wanted, turn)
        drafted = image.draft(None, (DRAFT_SCALE * width, DRAFT_SCALE * height))
        box = None if drafted is None else drafted[1]
        image.load()
        scan.check_exif(len(image.info.get("exif") or b""), param)
        pixels, alpha = _simple(image), None
    else:
        image.load()
        scan.check_exif(len(image.info.get("exif") or b""), param)
        turn = _turn_of(image)  # a PNG may have its EXIF at its end
        pixels = _simple(image)
        alpha = pixels.getchannel("A").getextrema() if pixels.mode in ("LA", "RGBA") else None
        size = _turned_size(image.size, turn)
        wanted = fit(size, masks.has_holes(alpha))  # type: ignore[arg-type]
    stored = _turned_size(wanted, turn)
    if pixels.size != stored:
        pixels = pixels.resize(stored, Image.Resampling.LANCZOS, box=box)
    if turn is not None:
        pixels = pixels.transpose(turn)
    # the values of a mask are not colours
    colours, warnings = (unconverted(pixels), []) if param == "mask" else to_srgb(pixels, param)
    return _Upload(colours, size, alpha, warnings)  # type: ignore[arg-type]


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """The rotation by its EXIF orientation; None if that cannot be read."""
    with contextlib.suppress(Exception):
        return _TURNS.get(image.getexif().get(ORIENTATION, 1))
    return None


def _turned_size(size: Size, turn: Image.Transpose | None) -> Size:
    return (size[1], size[0]) if turn in _QUARTERS else size


def _simple(image: Image.Image) -> Image.Image:
    """Convert an image to one of the modes L, LA, RGB, RGBA and CMYK, of 8 bits per sample."""
    if image.mode.startswith("I"):
        return _eight_bits(image)
    grey = image.mode in ("1", "L", "LA")
    wanted = ("LA" if grey else "RGBA") if image.has_transparency_data else "L" if grey else "RGB"
    return image if image.mode in (wanted, "CMYK") else image.convert(wanted)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image of 16-bit grey, which `convert` would cut at 255."""
    samples = np.asarray(image).clip(0, 0xFFFF).astype(np.uint16)
    grey = Image.fromarray((samples // 257 + (samples % 257 > 128)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
    grey.info = image.info
    return grey


def _flat(image: Image.Image) -> Image.Image:
    """The image in RGB, on a white background."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
