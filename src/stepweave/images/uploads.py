"""Decodes uploaded images within limits, scaled and in sRGB, or refuses them with a reason."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
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
# maps an image's name and size, and whether there is a mask, to the size that is wanted of it
Fit = Callable[[str, Size, bool], Size]


class NotWanted(Exception):
    """Raised by `fit` to refuse the images."""


@dataclass(frozen=True)
class Upload:
    """A file, by the name that the request gives it; several may have one name."""

    name: str
    data: bytes
    is_mask: bool = False
    is_hint: bool = False


@dataclass(frozen=True)
class _Decoded:
    """A decoded image in RGB or RGBA, of the wanted size, with properties of the original."""

    image: Image.Image
    size: Size  # of the original, after its rotation
    alpha: masks.Extrema | None  # of the original; None if it has no alpha
    warnings: list[str] = field(default_factory=list)


def read_sources(
    files: Sequence[Upload],
    *,
    leading: str,
    max_pixels: int,
    fit: Fit | None = None,
    alpha: bool = False,
    stencils: bool = True,
) -> Sources:
    """Decode the images of a request: in sRGB, rotated by their EXIF orientation, and scaled to the
    size that `fit` returns; without `fit` they keep their size. Masks are scaled to the size of the
    image named `leading`, whose transparency is the mask if there is no other, one such image, and
    `stencils`. The module `masks` has the rule of what is repainted. With `alpha`, images are RGBA,
    and their transparency is no mask. What is transparent in a hint is black, as its background is,
    and white in other images.

    Raises InvalidRequestError, with the file in `param`, UnsupportedMediaTypeError for another
    format, and errors of `fit`; also if all images together have more than `max_pixels`.
    """
    counts = Counter(file.name for file in files)
    masked = any(file.is_mask for file in files)
    repaints = any(file.is_mask and file.name == "mask" for file in files)
    found: dict[str, tuple[Image.Image, ...]] = {}
    warnings: list[str] = []
    lead: _Decoded | None = None
    stencils = stencils and not alpha and not masked
    stencil: Image.Image | None = None
    left = max_pixels
    for file in sorted(files, key=lambda file: (file.is_mask, file.name != leading)):
        place = len(found.get(file.name, ()))
        label = file.name if counts[file.name] == 1 else f"{file.name}[{place}]"
        if file.is_mask:
            found[file.name] = (_mask(file, lead, max_pixels, warnings),)
            continue
        leads, one = lead is None and file.name == leading, counts[file.name] == 1

        def fitted(
            size: Size, holes: bool, name: str = file.name, leads: bool = leads, one: bool = one
        ) -> Size:
            return (
                size
                if fit is None
                else fit(name, size, repaints or (leads and one and holes and stencils))
            )

        decoded = _decode(file.data, label, left, fitted)
        left -= math.prod(decoded.size)
        warnings += decoded.warnings
        if decoded.image.size != decoded.size:
            warnings.append(
                f"{label}: it is {_by(decoded.size)}, and was scaled to {_by(decoded.image.size)}."
            )
        if leads:
            lead = decoded
            # of several references none is repainted
            if stencils and one and masks.has_holes(decoded.alpha):
                stencil = masks.of_alpha(decoded.image)
        if alpha and not file.is_hint:
            image = decoded.image.convert("RGBA")
        else:
            image = _flat(decoded.image, "black" if file.is_hint else "white")
        found[file.name] = (*found.get(file.name, ()), image)
    if stencil is not None:
        found["mask"] = (stencil,)
        _warn_of_nothing(stencil, "mask", warnings)
    return Sources(found, tuple(warnings))


def _mask(file: Upload, lead: _Decoded | None, max_pixels: int, warnings: list[str]) -> Image.Image:
    """A mask, scaled to the size of the image that it is of; of its own without one."""

    def like(own: Size, holes: bool) -> Size:
        return own if lead is None else _like(own, lead.size, lead.image.size, file.name)

    sent = _decode(file.data, file.name, max_pixels, like, is_mask=True)
    stencil = masks.of_mask(sent.image, sent.alpha, file.name)
    warnings += sent.warnings
    if lead is not None and sent.size not in (lead.size, lead.image.size):
        warnings.append(
            f"{file.name}: it is {_by(sent.size)}, and was scaled to {_by(lead.image.size)} with "
            "the image."
        )
    _warn_of_nothing(stencil, file.name, warnings)
    return stencil


def _warn_of_nothing(stencil: Image.Image, name: str, warnings: list[str]) -> None:
    if not masks.repaints(stencil):
        warnings.append(
            f"{name}: nothing is repainted: no pixel is at least half transparent, or else at "
            "least half white."
        )


def _like(mask: Size, image: Size, wanted: Size, name: str) -> Size:
    """The `wanted` size. Raises InvalidRequestError if a mask has not the image's proportions."""
    (width, height), (image_width, image_height) = mask, image
    ratio = (width * image_height) / (height * image_width)
    pixels = min(abs(width - width / ratio), abs(height - height * ratio))
    if pixels > LIKE_PIXELS or abs(math.log(ratio)) > LIKE_RATIO:
        raise InvalidRequestError(
            f"{name} is {_by(mask)} and image {_by(image)}, turned as their EXIF says; they must "
            "be of one size, or of the same proportions.",
            param=name,
        )
    return wanted


def _by(size: Size) -> str:
    return "{}x{}".format(*size)


def _decode(
    data: bytes,
    param: str,
    max_pixels: int,
    fit: Callable[[Size, bool], Size],
    *,
    is_mask: bool = False,
) -> _Decoded:
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
            return _read(image, param, fit, is_mask=is_mask)
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


def _read(
    image: Image.Image, param: str, fit: Callable[[Size, bool], Size], *, is_mask: bool
) -> _Decoded:
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
    colours, warnings = (unconverted(pixels), []) if is_mask else to_srgb(pixels, param)
    return _Decoded(colours, size, alpha, warnings)  # type: ignore[arg-type]


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


def _flat(image: Image.Image, background: str) -> Image.Image:
    """The image in RGB, on a background of this colour."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
