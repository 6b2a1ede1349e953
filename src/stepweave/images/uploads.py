"""Pictures that clients send: decoded within bounds, or refused by name."""

from __future__ import annotations

import contextlib
import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stepweave.errors import InvalidRequest
from stepweave.generation import Sources
from stepweave.images import scan

FORMATS = ("PNG", "JPEG", "WEBP")
SIXTEEN_BITS = 257  # of a sample, for one of 8 bits


def read_sources(image: bytes, mask: bytes | None, *, max_pixels: int) -> Sources:
    """The pictures of an edit, by OpenAI's rules.

    A mask's transparent pixels are painted anew, or the white ones if none of it is transparent. Without a mask those of the
    image are, if it has any. Raises InvalidRequest, `param` naming the file.
    """
    picture = _decode(image, "image", max_pixels)
    if mask is None:
        return Sources(_flat(picture), _holes(picture))
    stencil = _decode(mask, "mask", max_pixels)
    return Sources(_flat(picture), _holes(stencil) or _flat(stencil).convert("L"))


def _decode(data: bytes, param: str, max_pixels: int) -> Image.Image:
    """A picture in RGB or RGBA as viewers show it: turned as its EXIF says, the first frame of a stereo one.

    Raises InvalidRequest for what is no still PNG, JPEG or WebP, is corrupt, has more than `max_pixels`, or costs more to decode
    than these should.
    """
    if not data:
        raise InvalidRequest(f"{param} is empty; send a PNG, JPEG or WebP file.", param=param)
    scan.check(data, param, max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            scan.check_pixels(*picture.size, max_pixels, param)  # of the header: nothing is decoded yet
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                raise InvalidRequest(f"{param} has several frames; send a still picture.", param=param)
            picture.load()
            scan.check_exif(len(picture.info.get("exif") or b""), param)
            return _in_colours(_turned(picture))
    except InvalidRequest:
        raise
    except MemoryError:
        message = f"{param} takes more memory to decode than an image of {max_pixels} pixels should."
        raise InvalidRequest(message, code=scan.CODE, param=param) from None
    except UnidentifiedImageError:
        raise InvalidRequest(f"{param} is no PNG, JPEG or WebP picture.", param=param) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+", str(error))
        count = found[0] if found else "too many"
        raise InvalidRequest(f"{param} has {count} pixels; the limit is {max_pixels}.", param=param) from None
    except Exception as error:  # whatever Pillow's decoders raise of bytes that are wrong
        raise InvalidRequest(f"{param} is corrupt or cut short ({type(error).__name__}).", param=param) from error


def _turned(picture: Image.Image) -> Image.Image:
    """As its EXIF says, where that can be read."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(picture)
    return picture


def _in_colours(picture: Image.Image) -> Image.Image:
    """In RGBA if it has transparency, else in RGB."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` cuts at 255
        picture = Image.fromarray((np.asarray(picture) / SIXTEEN_BITS).round().clip(0, 255).astype(np.uint8))
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _flat(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _holes(picture: Image.Image) -> Image.Image | None:
    """A mask that is white where the picture is wholly transparent; None if it is so nowhere."""
    if picture.mode == "RGB":
        return None
    alpha = picture.getchannel("A")
    return None if alpha.getextrema()[0] else alpha.point([255] + [0] * 255)
