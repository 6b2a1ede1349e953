"""Files of other kinds: named, with what to send."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from stepweave.errors import InvalidRequestError, UnsupportedMediaTypeError
from tests.support.uploads import read_sources

LIMIT = 64 * 64


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    content = major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", len(content) + 8) + b"ftyp" + content + b"\0\0\0\x10meta" + bytes(400)


GRADIENT = Image.linear_gradient("L").resize((32, 16)).convert("RGB")

OTHERS = {
    "heic of an iphone": (
        ftyp(b"heic", b"mif1", b"MiHB", b"MiHE", b"MiPr", b"miaf", b"heic", b"tmap"),
        "an HEIC",
    ),
    "heif": (ftyp(b"mif1", b"mif1", b"heic"), "an HEIC"),
    "heif sequence": (ftyp(b"msf1", b"hevc"), "an HEIC"),
    "heif of 10 bits": (ftyp(b"heix", b"mif1"), "an HEIC"),
    "avif": (file_of(GRADIENT, "AVIF"), "an AVIF image"),
    "avif by its compatible brands": (ftyp(b"mif1", b"avif", b"miaf"), "an AVIF image"),
    "animated avif": (
        file_of(GRADIENT, "AVIF", save_all=True, append_images=[GRADIENT.rotate(180)]),
        "an AVIF image",
    ),
    "canon raw": (ftyp(b"crx ", b"crx ", b"isom"), "a Canon raw image"),
    "mp4": (ftyp(b"isom", b"iso2", b"avc1", b"mp41"), "a video"),
    "quicktime": (ftyp(b"qt  "), "a video"),
    "webm": (b"\x1a\x45\xdf\xa3" + bytes(50), "a video"),
    "gif": (file_of(GRADIENT, "GIF"), "a GIF image"),
    "animated gif": (
        file_of(GRADIENT, "GIF", save_all=True, append_images=[GRADIENT.rotate(180)]),
        "a GIF image",
    ),
    "bmp": (file_of(GRADIENT, "BMP"), "a BMP image"),
    "bmp with alpha": (file_of(GRADIENT.convert("RGBA"), "BMP"), "a BMP image"),
    "tiff": (file_of(GRADIENT, "TIFF"), "a TIFF"),
    "big-endian tiff": (b"MM\0*\0\0\0\x08" + bytes(50), "a TIFF"),
    "big tiff": (b"II+\0\x08\0\0\0" + bytes(50), "a TIFF"),
    "jpeg xl": (b"\xff\x0a\xfa\x1f\x01\x90" + bytes(50), "a JPEG XL image"),
    "jpeg xl in its box": (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "a JPEG XL image"),
    "jpeg 2000": (file_of(GRADIENT, "JPEG2000"), "a JPEG 2000 image"),
    "jpeg 2000 codestream": (file_of(GRADIENT, "JPEG2000", no_jp2=True), "a JPEG 2000 image"),
    "psd": (b"8BPS\0\x01" + bytes(50), "a Photoshop document"),
    "ico": (file_of(GRADIENT, "ICO", sizes=[(16, 16)]), "a Windows icon"),
    "pdf": (file_of(GRADIENT, "PDF"), "a PDF document"),
    "pdf after junk": (b"\r\n junk %PDF-1.7", "a PDF document"),
    "postscript": (file_of(GRADIENT, "EPS"), "a PostScript document"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    "svg with a prologue": (
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a <comment> -->\n<!DOCTYPE svg>\n<svg "
        b"width='1'/>",
        "an SVG drawing",
    ),
    "exr": (b"\x76\x2f\x31\x01" + bytes(50), "an OpenEXR image"),
    "hdr": (b"#?RADIANCE\n", "a Radiance HDR image"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_files_are_named_with_what_to_send(kind: str) -> None:
    data, name = OTHERS[kind]
    good = file_of(GRADIENT, "PNG")
    for param, files in (("image", (data, None)), ("mask", (good, data))):
        with pytest.raises(UnsupportedMediaTypeError) as caught:
            read_sources(*files, max_pixels=LIMIT)
        error = caught.value
        assert (error.status, error.code, error.param) == (415, "unsupported_image", param)
        assert (
            error.message.startswith(f"{param} is {name}") and "PNG, JPEG or WebP" in error.message
        )
        assert ("Most Compatible" in error.message) == (name == "an HEIC")
        assert len(error.message) < 200


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"garbage" * 100,
        b"BM",
        b"BM" + b"x" * 60,
        b"\0" * 100,
        b"<html></html>",
        b"ftyp",
        b"\0\0\0\x08fty",
    ],
)
def test_what_is_nothing_known_is_400(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="image is no PNG, JPEG or WebP image"):
        read_sources(data, None, max_pixels=LIMIT)


def test_what_is_read_may_hold_whatever_others_begin_with() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "%PDF-1.7 <svg > ftypheic GIF89a")
    for data in (
        file_of(GRADIENT, "PNG", pnginfo=text),
        file_of(GRADIENT, "JPEG", comment=b"%PDF-1.7 <svg >"),
    ):
        assert read_sources(data, None, max_pixels=LIMIT).image.size == (32, 16)
