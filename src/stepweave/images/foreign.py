"""Recognises unsupported file formats by their first bytes, so that errors can name them.

None of them is decoded, not even AVIF, which Pillow could read: every decoder can be attacked.
"""

from __future__ import annotations

import re
from typing import Final

from stepweave.errors import UnsupportedMediaTypeError

CODE: Final = "unsupported_image"
_READ = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_HEAD = 1024  # bytes that are examined
_HEIF = set(b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1".split())
_AVIF = {b"avif", b"avis"}
_IPHONE = "; iPhones take JPEG with Settings > Camera > Formats > Most Compatible"
_MAGIC = (  # a pattern at the start of the file, and the name of the format
    (rb"GIF8[79]a", "a GIF image"),
    (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", "a BMP image"),
    (rb"II[*+]\x00|MM\x00[*+]", "a TIFF or camera raw image"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    (rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
    (rb"8BPS", "a Photoshop document"),
    (rb"\x00\x00[\x01\x02]\x00[^\x00]\x00", "a Windows icon"),
    (rb"\x76\x2f\x31\x01", "an OpenEXR image"),
    (rb"#\?RADIANCE|#\?RGBE", "a Radiance HDR image"),
    (rb".{0,1000}%PDF-", "a PDF document"),
    (rb"%!PS", "a PostScript document"),
    (rb"(\xef\xbb\xbf)?\s*<(?:.{0,1000}<)??svg[\s>]", "an SVG drawing"),
    (rb"\x1a\x45\xdf\xa3|RIFF....AVI ", "a video"),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), name) for pattern, name in _MAGIC)


def refuse(data: bytes, param: str) -> None:
    """Raise UnsupportedMediaTypeError, code `unsupported_image`, for a file of a known format that
    is not supported; the message says what to send."""
    if data.startswith(_READ):
        return
    name = _name(data[:_HEAD])
    if name is not None:
        hint = _IPHONE if "HEIC" in name else ""
        message = (
            f"{param} is {name}, which is not read here. Convert it to PNG, JPEG or WebP and send "
            f"that{hint}."
        )
        raise UnsupportedMediaTypeError(message, code=CODE, param=param)


def _name(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    return next((name for pattern, name in _PATTERNS if pattern.match(head)), None)


def _of_brands(head: bytes) -> str:
    """The format of an MPEG-4 container (ISO 14496-12), by its major and compatible brands."""
    end = min(int.from_bytes(head[:4]), len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}
    if brands & _AVIF:
        return "an AVIF image"
    if brands & _HEIF:
        return "an HEIC (HEIF) image"
    return "a Canon raw image" if b"crx " in brands else "a video"
