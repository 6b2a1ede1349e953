from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from stepweave.errors import InvalidRequestError
from stepweave.images import uploads
from stepweave.images.uploads import ORIENTATION, Upload
from tests.support.uploads import read_sources

LIMIT = 64 * 64


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    """32x16, darker above, so that it is seen which way up it is."""
    return Image.linear_gradient("L").resize((32, 16)).convert(mode)


def read(data: bytes, limit: int = LIMIT) -> Image.Image:
    image = read_sources(data, None, max_pixels=limit).image
    assert image.mode == "RGB"
    return image


def refused(data: bytes, says: str, mask: bytes | None = None, param: str = "image") -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
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
def test_every_kind_of_image_looks_as_it_does_in_a_viewer(format: str, mode: str) -> None:
    if mode == "I;16":
        grey = np.asarray(gradient("L")).astype(np.uint16) * 257
        image = Image.fromarray(grey)
        assert image.mode == mode
    else:
        image = gradient(mode)
    result = read(file_of(image, format))
    difference = np.abs(np.asarray(result, float) - np.asarray(gradient(), float))
    assert difference.mean() < (130 if mode == "1" else 6)
    assert np.asarray(result)[0].mean() < np.asarray(result)[-1].mean() - 100


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_images_are_turned_as_their_exif_says(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    result = read(file_of(gradient(), format, exif=exif))
    assert result.size == (16, 32)
    grey = np.asarray(result, float).mean(2)
    assert grey[:, 0].mean() > grey[:, -1].mean() + 100  # what was below is on the left


def test_what_is_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    image.paste((0, 0, 255, 128), (0, 0, 16, 16))
    assert read(file_of(image)).getpixel((20, 8)) == (255, 255, 255)
    assert read(file_of(image)).getpixel((4, 8)) == (127, 127, 255)
    palette = Image.new("P", (32, 16), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert read(file_of(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert read(file_of(palette)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(16, 8), (128, 64), (64, 32), (127, 64), (90, 45)])
def test_a_mask_of_the_image_s_proportions_is_scaled_with_it(size: tuple[int, int]) -> None:
    mask = Image.new("L", size, 0)
    mask.paste(255, (size[0] // 2, 0, *size))
    sources = read_sources(
        file_of(gradient().resize((64, 32))), file_of(mask), max_pixels=4 * LIMIT
    )
    assert sources.mask is not None and sources.mask.size == sources.image.size == (64, 32)
    found = np.asarray(sources.mask)
    assert (found[:, :30] < 30).all() and (found[:, -30:] > 225).all()
    told = f"mask: it is {size[0]}x{size[1]}, and was scaled to 64x32 with the image."
    assert sources.warnings == (() if size == (64, 32) else (told,))


@pytest.mark.parametrize("size", [(8, 8), (32, 64), (64, 34), (63, 30), (640, 324), (1, 1), (3, 1)])
def test_a_mask_of_other_proportions_is_refused_by_both_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(
        InvalidRequestError,
        match=f"mask is {size[0]}x{size[1]} and image 64x32, .* same proportions",
    ) as caught:
        read_sources(
            file_of(gradient().resize((64, 32))), file_of(Image.new("L", size)), max_pixels=1 << 20
        )
    assert caught.value.param == "mask"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_are_turned_each_as_its_exif_says_before_they_are_compared(
    orientation: int,
) -> None:
    """A phone's portrait is stored lying; a mask that was drawn on it stands."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    marked = Image.new("L", (64, 32), 0)
    marked.paste(255, (0, 0, 16, 8))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(file_of(marked, exif=exif))))
    for image, own in ((marked, exif), (turned, Image.Exif())):
        for mask, its in ((marked, exif), (turned, Image.Exif())):
            for fit in (None, lambda size, masked: (size[0] // 2, size[1] // 2)):
                files = file_of(image.convert("RGB"), "JPEG", exif=own), file_of(mask, exif=its)
                sources = read_sources(*files, max_pixels=LIMIT, fit=fit)
                assert sources.mask is not None
                wanted = (
                    turned
                    if fit is None
                    else turned.resize((turned.width // 2, turned.height // 2))
                )
                for found in (sources.image.convert("L"), sources.mask):
                    assert found.size == wanted.size
                    assert np.abs(np.asarray(found, float) - np.asarray(wanted, float)).mean() < 4
    if orientation >= 5:
        with pytest.raises(
            InvalidRequestError, match="mask is 64x32 and image 32x64, turned as their EXIF says"
        ):
            read_sources(file_of(marked, "JPEG", exif=exif), file_of(marked), max_pixels=LIMIT)


def exif_of(*entries: bytes) -> bytes:
    """EXIF data of these entries, big-endian."""
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + bytes(4)


ODD = {
    **{str(value): struct.pack(">HHIHH", ORIENTATION, 3, 1, value, 0) for value in (0, 9, 65535)},
    "text": struct.pack(">HHI4s", ORIENTATION, 2, 2, b"6\0"),
    "fraction": struct.pack(">HHII", ORIENTATION, 5, 1, 8),
    "several": struct.pack(">HHIHH", ORIENTATION, 3, 2, 6, 6),
    "beyond its end": struct.pack(">HHII", ORIENTATION, 4, 1 << 20, 1 << 20),
}


@pytest.mark.filterwarnings("ignore:Tag data larger than file:UserWarning")  # Pillow's
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_orientation_that_there_is_not_turns_nothing(kind: str, format: str) -> None:
    assert read(file_of(gradient(), format, exif=exif_of(ODD[kind]))).size == (32, 16)


def test_an_image_is_turned_though_the_rest_of_its_exif_is_broken() -> None:
    """As after an editor that moved its parts: only the orientation is to be read."""
    exif = exif_of(
        struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0), struct.pack(">HHII", 0x8769, 4, 1, 0xFFFFFF)
    )
    assert read(file_of(gradient(), "JPEG", exif=exif)).size == (16, 32)


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """With structures of many sizes, so that scaling does something."""
    generator = np.random.default_rng(1)
    layers = [
        Image.fromarray(
            generator.integers(0, 256, (size[1] // by, size[0] // by, 4), dtype=np.uint8)
        ).resize(size)
        for by in (4, 16, 64)
    ]
    return Image.fromarray(
        np.mean([np.asarray(one) for one in layers], 0).astype(np.uint8)
    ).convert(mode)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("by", [1.5, 2, 3.4, 8, 20])
def test_a_large_image_is_scaled_as_if_it_had_been_decoded_whole(format: str, by: float) -> None:
    """Also where a JPEG is decoded in part."""
    file = file_of(noise((640, 400)), format, **({"quality": 95} if format != "PNG" else {}))
    size = (round(640 / by), round(400 / by))
    asked: list[Any] = []

    def fit(source: tuple[int, int], masked: bool) -> tuple[int, int]:
        asked.append((source, masked))
        return size

    sources = read_sources(file, None, max_pixels=640 * 400, fit=fit)
    with Image.open(io.BytesIO(file)) as whole:
        expected = whole.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    apart = np.abs(np.asarray(sources.image, float) - np.asarray(expected, float))
    assert sources.image.size == size and apart.mean() < 1.5 and np.quantile(apart, 0.99) <= 6
    assert asked == [((640, 400), False)]
    assert sources.warnings == (f"image: it is 640x400, and was scaled to {size[0]}x{size[1]}.",)


def test_transparent_pixels_lend_no_colour_to_their_neighbours() -> None:
    image = Image.new("RGBA", (64, 32), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 33, 32))
    sources = read_sources(file_of(image), None, max_pixels=LIMIT, fit=lambda size, masked: (16, 8))
    pixels = np.asarray(sources.image).astype(int)
    assert (pixels[..., 1] <= pixels[..., 0]).all(), "no green"
    assert sources.mask is not None and sources.mask.size == (16, 8)


def test_the_size_is_asked_for_with_the_mask_that_there_will_be() -> None:
    asked = []

    def fit(size: tuple[int, int], masked: bool) -> tuple[int, int]:
        asked.append(masked)
        return size

    holes, white = Image.new("RGBA", (32, 16)), file_of(Image.new("L", (32, 16), 255))
    holes.paste((1, 2, 3, 255), (0, 0, 8, 8))
    for image, mask in ((gradient(), None), (holes, None), (gradient(), white), (holes, white)):
        found = read_sources(file_of(image), mask, max_pixels=LIMIT, fit=fit).mask
        assert asked.pop() == (found is not None)


def test_what_refuses_the_size_is_raised() -> None:
    def fit(size: tuple[int, int], masked: bool) -> tuple[int, int]:
        raise InvalidRequestError("of no such size", param="size")

    for format in ("PNG", "JPEG"):
        with pytest.raises(InvalidRequestError, match="of no such size"):
            read_sources(file_of(gradient(), format), None, max_pixels=LIMIT, fit=fit)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (4096, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_images_of_one_pixel_s_width_are_read(size: tuple[int, int], format: str) -> None:
    sources = read_sources(file_of(Image.new("RGB", size, "red"), format), None, max_pixels=LIMIT)
    assert sources.image.size == size
    scaled = read_sources(
        file_of(Image.new("RGB", size, "red"), format),
        None,
        max_pixels=LIMIT,
        fit=lambda *_: (8, 8),
    )
    assert scaled.image.size == (8, 8) and scaled.image.getpixel((4, 4))[0] > 240


def ultra_hdr() -> bytes:
    """A JPEG with a second one, the map of its gains, after its end, as phones write it."""
    base = file_of(gradient(), "MPO", save_all=True, append_images=[gradient("L")])
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version="1.0"/>'
    return base[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + base[2:]


def test_jpegs_as_phones_write_them_are_read() -> None:
    motion = file_of(gradient(), "JPEG") + b"\0\0\0\x18ftypmp42" + bytes(5000)
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    thumbnail = file_of(gradient(), "JPEG", exif=exif.tobytes() + bytes(60_000))
    extended = file_of(gradient(), "JPEG")
    parts = b"\xff\xe1\xff\xff" + b"http://ns.adobe.com/xmp/extension/\0".ljust(0xFFFF - 2, b"x")
    for data in (ultra_hdr(), motion, thumbnail, extended[:2] + 20 * parts + extended[2:]):
        assert np.abs(np.asarray(read(data), float) - np.asarray(gradient(), float)).mean() < 6
        small = read_sources(data, None, max_pixels=LIMIT, fit=lambda *_: (8, 4)).image
        assert small.size == (8, 4)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGB"])
def test_a_colour_that_is_transparent_is(mode: str) -> None:
    """A PNG's tRNS, in each kind of PNG that may have one."""
    image = Image.new("L", (32, 16), 0)
    image.paste(255, (16, 0, 32, 16))
    holes = image.point(lambda value: 255 - value)
    if mode == "LA":
        file = file_of(Image.merge("LA", (image, image)))
    else:
        transparent = {"RGB": (0, 0, 0)}.get(mode, 0)
        image = image.quantize(2) if mode == "P" else image.convert(mode)
        if mode == "P":
            transparent = image.getpixel((0, 0))
        file = file_of(image, transparency=transparent)
    found = read_sources(file, None, max_pixels=LIMIT).mask
    assert found is not None and np.array_equal(np.asarray(found), np.asarray(holes))


def test_what_is_no_still_image_is_refused_by_name() -> None:
    frames = [gradient(), Image.new("RGB", (32, 16))]
    good = file_of(gradient())
    refused(b"", "image is empty")
    refused(b"no image at all", "image is no PNG, JPEG or WebP image")
    for format in ("PNG", "WEBP"):
        refused(
            file_of(frames[0], format, save_all=True, append_images=frames[1:]),
            "image has several frames",
        )
        refused(file_of(gradient(), format)[:-60], "image is (corrupt or cut short|no PNG)")
    refused(good, "mask is no PNG", mask=b"x", param="mask")
    refused(
        good,
        "mask is 100x100, 10000 pixels; the limit is 4096",
        file_of(Image.new("L", (100, 100))),
        "mask",
    )


def test_the_first_image_of_a_stereo_one_is_taken() -> None:
    data = file_of(
        gradient(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 16), "red")]
    )
    assert np.abs(np.asarray(read(data), float) - np.asarray(gradient(), float)).mean() < 6


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says so, and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

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
def test_the_header_is_believed_before_anything_is_decoded(
    width: int, height: int, says: str
) -> None:
    refused(png_of_size(width, height), says)


FILES = [
    file_of(gradient()),
    file_of(gradient("RGBA")),
    file_of(gradient("P")),
    file_of(gradient("CMYK"), "JPEG"),
    file_of(
        gradient(), "JPEG", progressive=True, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01"
    ),
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
def test_whatever_the_bytes_they_are_an_image_or_refused(
    file: bytes, changes: list[tuple[int, int]], end: int | None, more: bytes
) -> None:
    data = bytearray(file)
    for at, value in changes:
        data[at % len(data)] = value
    damaged = bytes(data[:end]) + more
    try:
        sources = read_sources(damaged, damaged, max_pixels=LIMIT)
    except InvalidRequestError as error:
        assert error.param in ("image", "mask")
    else:
        assert sources.image.mode == "RGB" and sources.mask is not None and sources.mask.mode == "L"
        assert sources.image.width * sources.image.height <= LIMIT


# --- several images ---


def uploads_of(**files: Image.Image) -> list[Upload]:
    return [
        Upload(name.rstrip("0123456789"), file_of(image), is_mask=name == "mask")
        for name, image in files.items()
    ]


def test_images_of_one_name_stay_in_their_order_and_size() -> None:
    files = uploads_of(
        image0=Image.new("RGB", (8, 4), "red"),
        guide=Image.new("RGB", (4, 4), "lime"),
        image1=Image.new("RGB", (4, 8), "blue"),
    )
    asked: list[tuple[str, Any, bool]] = []

    def fit(name: str, size: Any, masked: bool) -> Any:
        asked.append((name, size, masked))
        return size if name == "image" else (2, 2)

    found = uploads.read_sources(files, leading="image", max_pixels=LIMIT, fit=fit)
    assert [image.getpixel((0, 0)) for image in found.images["image"]] == [(255, 0, 0), (0, 0, 255)]
    assert [image.size for image in found.images["image"]] == [(8, 4), (4, 8)]
    assert found.images["guide"][0].size == (2, 2)
    assert found.warnings == ("guide: it is 4x4, and was scaled to 2x2.",)
    assert asked == [("image", (8, 4), False), ("image", (4, 8), False), ("guide", (4, 4), False)]


def test_all_images_together_have_no_more_pixels_than_one_may() -> None:
    half = Image.new("RGB", (64, 32))
    files = uploads_of(image0=half, image1=half, guide=Image.new("RGB", (1, 1)))
    assert uploads.read_sources(files[:2], leading="image", max_pixels=64 * 64).images
    with pytest.raises(InvalidRequestError, match="guide is 1x1, 1 pixels; the limit is 0"):
        uploads.read_sources(files, leading="image", max_pixels=64 * 64)


def test_a_mask_is_of_the_leading_image() -> None:
    files = uploads_of(
        image=Image.new("RGB", (8, 8)),
        original_image=Image.new("RGB", (32, 16)),
        mask=Image.new("L", (64, 32), 255),
    )
    found = uploads.read_sources(files, leading="original_image", max_pixels=LIMIT)
    assert found.mask is not None and found.mask.size == (32, 16)
    with pytest.raises(InvalidRequestError, match="of the same proportions"):
        uploads.read_sources(files, leading="image", max_pixels=LIMIT)


def test_transparency_is_kept_for_a_model_that_takes_it() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    files = uploads_of(image0=clear, image1=Image.new("RGB", (8, 8), "blue"))
    found = uploads.read_sources(files, leading="image", max_pixels=LIMIT, alpha=True)
    assert found.mask is None
    assert [image.mode for image in found.images["image"]] == ["RGBA", "RGBA"]
    assert [image.getpixel((0, 0))[3] for image in found.images["image"]] == [0, 255]
    assert uploads.read_sources(files, leading="image", max_pixels=LIMIT).mask is None
    one = uploads_of(image=clear)
    assert uploads.read_sources(one, leading="image", max_pixels=LIMIT).mask is not None


def test_the_transparency_of_a_hint_is_black_and_no_mask() -> None:
    outline = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    outline.paste((255, 255, 255, 255), (0, 0, 2, 2))
    files = [Upload("control_image", file_of(outline), is_hint=True), *uploads_of(image=outline)]
    for some, alpha in ((files[:1], False), (files, False), (files, True)):
        found = uploads.read_sources(
            some, leading="control_image", max_pixels=LIMIT, alpha=alpha, stencils=False
        )
        assert found.mask is None
        (hint,) = found.images["control_image"]
        assert hint.mode == "RGB"
        assert (hint.getpixel((0, 0)), hint.getpixel((7, 7))) == ((255, 255, 255), (0, 0, 0))
    found = uploads.read_sources(files, leading="image", max_pixels=LIMIT)
    assert found.mask is not None, "of the image that is edited"
    assert found.images["image"][0].getpixel((7, 7)) == (255, 255, 255)
