"""Images that clients send: decoded within bounds, scaled, in sRGB, or refused by name."""

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
DRAFTS = ("JPEG", "MPO")  # formats that are decoded smaller, where that is wanted
# a JPEG is decoded at least so many times as large, along each side, as it is wanted
DRAFT_SCALE = 2
ORIENTATION = 0x0112  # EXIF
# of a mask, by which its sides may be off the image's proportions: they were rounded
LIKE_PIXELS = 1
LIKE_RATIO = 0.02  # and by which these may be off
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
# an image's size, and whether there is a mask, to the size that its edit makes
Fit = Callable[[Size, bool], Size]


class NotWanted(Exception):
    """What `fit` may raise to have the images let go of."""


@dataclass(frozen=True)
class _Upload:
    """An image, RGB or RGBA, of the size that is wanted; and what it was."""

    image: Image.Image
    size: Size  # as it was sent, turned
    alpha: masks.Extrema | None  # as it was sent; None if it has none
    warnings: list[str] = field(default_factory=list)


def read_sources(
    image: bytes, mask: bytes | None, *, max_pixels: int, fit: Fit | None = None
) -> Sources:
    """The images of an edit in sRGB, turned as their EXIF says, and scaled to the size that `fit`
    gives.

    Without `fit` the image keeps its size; a mask is scaled to it. `masks` has the rule of what is
    repainted.

    Raises InvalidRequestError, `param` naming the file, UnsupportedMediaTypeError for a file of
    another kind, and what `fit` does.
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
    """The size that a mask is wanted in. Raises InvalidRequestError if it has not the image's
    proportions."""
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
    """An image as viewers show it, the first frame of a stereo one; `fit` is asked for the size
    that is wanted.

    Raises UnsupportedMediaTypeError for a known format that is not read; InvalidRequestError for
    what is no still PNG, JPEG or WebP, is corrupt, has more than `max_pixels`, or costs more to
    decode than these should; and what `fit` does.
    """
    if not data:
        raise InvalidRequestError(f"{param} is empty; send a PNG, JPEG or WebP file.", param=param)
    foreign.refuse(data, param)
    scan.check(data, param, max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # of the header: nothing is decoded yet
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
    except Exception as error:  # whatever Pillow's decoders raise of bytes that are wrong
        raise InvalidRequestError(
            f"{param} is corrupt or cut short ({type(error).__name__}).", param=param
        ) from error


def _read(image: Image.Image, param: str, fit: Fit) -> _Upload:
    # what takes most is done last: scaled as it was stored, then turned, then its colours converted
    box = None
    if image.format in DRAFTS:  # has no transparency, so its size is known before it is decoded
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
    # the values of a mask are no colours, but say how much
    colours, warnings = (unconverted(pixels), []) if param == "mask" else to_srgb(pixels, param)
    return _Upload(colours, size, alpha, warnings)  # type: ignore[arg-type]


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """How its EXIF says that it is to be turned, where that can be read."""
    with contextlib.suppress(Exception):
        return _TURNS.get(image.getexif().get(ORIENTATION, 1))
    return None


def _turned_size(size: Size, turn: Image.Transpose | None) -> Size:
    return (size[1], size[0]) if turn in _QUARTERS else size


def _simple(image: Image.Image) -> Image.Image:
    """In one of the modes L, LA, RGB, RGBA and CMYK, of 8 bits a sample."""
    if image.mode.startswith("I"):
        return _eight_bits(image)
    grey = image.mode in ("1", "L", "LA")
    wanted = ("LA" if grey else "RGBA") if image.has_transparency_data else "L" if grey else "RGB"
    return image if image.mode in (wanted, "CMYK") else image.convert(wanted)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits of grey, which `convert` cuts at 255."""
    samples = np.asarray(image).clip(0, 0xFFFF).astype(np.uint16)
    grey = Image.fromarray((samples // 257 + (samples % 257 > 128)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
    grey.info = image.info
    return grey


def _flat(image: Image.Image) -> Image.Image:
    """On white, where it is transparent."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
