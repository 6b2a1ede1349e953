from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepweave.errors import InvalidRequest
from stepweave.images.uploads import read_sources

LIMIT = 64 * 64


def file_of(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    """32x16, darker above, so that it is seen which way up it is."""
    return Image.linear_gradient("L").resize((32, 16)).convert(mode)


def read(data: bytes, limit: int = LIMIT) -> Image.Image:
    picture = read_sources(data, None, max_pixels=limit).image
    assert picture.mode == "RGB"
    return picture


def refused(data: bytes, says: str, mask: bytes | None = None, param: str = "image") -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        read_sources(data, mask, max_pixels=LIMIT)
    assert caught.value.param == param
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_every_kind_of_picture_looks_as_it_does_in_a_viewer(format: str, mode: str) -> None:
    if mode == "I;16":
        grey = np.asarray(gradient("L")).astype(np.uint16) * 257
        picture = Image.fromarray(grey)
        assert picture.mode == mode
    else:
        picture = gradient(mode)
    result = read(file_of(picture, format))
    difference = np.abs(np.asarray(result, float) - np.asarray(gradient(), float))
    assert difference.mean() < (130 if mode == "1" else 6)
    assert np.asarray(result)[0].mean() < np.asarray(result)[-1].mean() - 100


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_as_their_exif_says(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    result = read(file_of(gradient(), format, exif=exif))
    assert result.size == (16, 32)
    grey = np.asarray(result, float).mean(2)
    assert grey[:, 0].mean() > grey[:, -1].mean() + 100  # what was below is on the left


def test_what_is_transparent_becomes_white() -> None:
    picture = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 128), (0, 0, 16, 16))
    assert read(file_of(picture)).getpixel((20, 8)) == (255, 255, 255)
    assert read(file_of(picture)).getpixel((4, 8)) == (127, 127, 255)
    palette = Image.new("P", (32, 16), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert read(file_of(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert read(file_of(palette)).getpixel((0, 0)) == (255, 0, 0)


def test_masks_follow_openai() -> None:
    """Transparent is painted anew; without transparency, white is."""
    image, black, white = file_of(gradient()), Image.new("L", (32, 16)), Image.new("L", (32, 16), 255)
    half = black.copy()
    half.paste(255, (16, 0, 32, 16))
    holes = Image.merge("RGBA", [black, black, black, half.point(lambda value: 255 - value)])
    opaque = Image.merge("RGBA", [half, half, half, white])
    faint = Image.merge("RGBA", [half, half, half, white.point(lambda _: 1)])
    flat = Image.new("P", (32, 16), 0)
    flat.putpalette([0, 0, 0, 255, 255, 255])
    flat.paste(1, (16, 0, 32, 16))
    for mask, options in (
        (half, {}), (half.convert("RGB"), {}), (half.convert("1"), {}), (holes, {}), (opaque, {}),
        (flat, {}), (flat, {"transparency": 1}),
    ):  # fmt: skip
        sources = read_sources(image, file_of(mask, **options), max_pixels=LIMIT)
        assert sources.mask is not None and sources.mask.mode == "L"
        assert np.array_equal(np.asarray(sources.mask), np.asarray(half)), (mask.mode, options)
    assert read_sources(image, None, max_pixels=LIMIT).mask is None
    assert read_sources(file_of(faint), None, max_pixels=LIMIT).mask is None
    own = read_sources(file_of(holes), None, max_pixels=LIMIT)
    assert own.image.mode == "RGB" and own.mask is not None
    assert np.array_equal(np.asarray(own.mask), np.asarray(half))


def test_a_mask_of_another_size_is_read_as_it_is() -> None:
    sources = read_sources(file_of(gradient()), file_of(Image.new("L", (8, 8), 255)), max_pixels=LIMIT)
    assert sources.mask is not None and sources.mask.size == (8, 8)


def test_what_is_no_still_picture_is_refused_by_name() -> None:
    frames = [gradient(), Image.new("RGB", (32, 16))]
    good = file_of(gradient())
    refused(b"", "image is empty")
    refused(b"GIF89a" + bytes(50), "image is no PNG, JPEG or WebP picture")
    refused(file_of(gradient(), "BMP"), "image is no PNG, JPEG or WebP picture")
    refused(file_of(gradient(), "TIFF"), "image is no PNG, JPEG or WebP picture")
    refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image is no PNG, JPEG or WebP picture")
    for format in ("PNG", "WEBP"):
        refused(file_of(frames[0], format, save_all=True, append_images=frames[1:]), "image has several frames")
        refused(file_of(gradient(), format)[:-60], "image is (corrupt or cut short|no PNG)")
    refused(good, "mask is no PNG", mask=b"x", param="mask")
    refused(good, "mask is 100x100, 10000 pixels; the limit is 4096", file_of(Image.new("L", (100, 100))), "mask")


def test_the_first_picture_of_a_stereo_one_is_taken() -> None:
    data = file_of(gradient(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 16), "red")])
    assert np.abs(np.asarray(read(data), float) - np.asarray(gradient(), float)).mean() < 6


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says so, and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "says"),
    [
        (65, 64, "image is 65x64, 4160 pixels; the limit is 4096"),
        (20_000, 20_000, "limit is 4096"),
        (2**31 - 1, 2**31 - 1, "limit is 4096"),
        (10_000, 9_000, "limit is 4096"),
        (0, 5, "image is"),
        (64, 64, "image is corrupt or cut short"),
    ],
)
def test_the_header_is_believed_before_anything_is_decoded(width: int, height: int, says: str) -> None:
    refused(png_of_size(width, height), says)


FILES = [
    file_of(gradient()),
    file_of(gradient("RGBA")),
    file_of(gradient("P")),
    file_of(gradient("CMYK"), "JPEG"),
    file_of(gradient(), "JPEG", progressive=True, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01"),
    file_of(gradient(), "WEBP"),
    file_of(gradient("RGBA"), "WEBP", lossless=True),
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    file=st.sampled_from(FILES),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    end=st.none() | st.integers(0, 400),
    more=st.binary(max_size=20),
)
def test_whatever_the_bytes_they_are_a_picture_or_refused(
    file: bytes, changes: list[tuple[int, int]], end: int | None, more: bytes
) -> None:
    data = bytearray(file)
    for at, value in changes:
        data[at % len(data)] = value
    damaged = bytes(data[:end]) + more
    try:
        sources = read_sources(damaged, damaged, max_pixels=LIMIT)
    except InvalidRequest as error:
        assert error.param in ("image", "mask")
    else:
        assert sources.image.mode == "RGB" and sources.mask is not None and sources.mask.mode == "L"
        assert sources.image.width * sources.image.height <= LIMIT
