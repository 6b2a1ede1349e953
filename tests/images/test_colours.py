"""Uploads in other colour spaces: what they are in sRGB is computed by hand, in
tests/support/colour_profiles.py."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from stepweave.errors import InvalidRequestError
from stepweave.images import scan
from stepweave.parameters import Sources
from tests.support import colour_profiles as profiles
from tests.support.uploads import read_sources

LIMIT = 1024 * 1024
EXACT = 2.0  # of 255
PATCH = 16  # pixels; so large that JPEG keeps them
COLOURS = np.array(
    [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (0, 0, 0),
        (128, 128, 128),
        (200, 100, 50),
        (30, 180, 90),
        (60, 70, 220),
        (250, 240, 10),
        (12, 15, 20),
        (180, 40, 160),
    ],
    np.uint8,
)
INKS = np.array(
    [
        (0, 0, 0, 0),
        (0, 0, 0, 255),
        (40, 30, 20, 10),
        (90, 0, 60, 0),
        (0, 100, 60, 20),
        (60, 60, 60, 60),
        (10, 20, 130, 0),
        (120, 90, 10, 40),
    ],
    np.uint8,
)


def patches(colours: np.ndarray, mode: str | None = None) -> Image.Image:
    """A row of patches, one of each colour."""
    return Image.fromarray(np.repeat(np.repeat(colours[None], PATCH, 0), PATCH, 1), mode)


def centres(image: Image.Image) -> np.ndarray:
    return np.asarray(image, float)[PATCH // 2, PATCH // 2 :: PATCH]


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    exact = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
    }.get(format, {})
    image.save(buffer, format, **{**exact, **options})
    return buffer.getvalue()


def read(data: bytes, **options: Any) -> Sources:
    return read_sources(data, None, max_pixels=LIMIT, **options)


def apart(sources: Sources, expected: np.ndarray) -> float:
    return float(np.abs(centres(sources.image) - expected).max())


def stored(data: bytes) -> np.ndarray:
    """The samples of the patches as they are in the file, which JPEG rounds."""
    with Image.open(io.BytesIO(data)) as image:
        return centres(image.convert("RGB") if image.mode == "P" else image)


WIDE: dict[str, tuple[bytes, Callable[[np.ndarray], np.ndarray]]] = {
    "display p3": (
        profiles.P3,
        lambda it: profiles.in_srgb(it, profiles.DISPLAY_P3, profiles.linear),
    ),
    "adobe rgb": (
        profiles.ADOBE,
        lambda it: profiles.in_srgb(it, profiles.ADOBE_RGB, profiles.power(profiles.ADOBE_GAMMA)),
    ),
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_gamuts_become_srgb(name: str, format: str) -> None:
    profile, convert = WIDE[name]
    assert np.abs(convert(COLOURS) - COLOURS).max() > 20, "else nothing is tested"
    data = file_of(patches(COLOURS), format, icc_profile=profile)
    sources = read(data)
    assert apart(sources, convert(stored(data))) <= EXACT
    assert sources.warnings == ()


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_other_modes_with_a_profile_become_srgb_and_keep_their_alpha(mode: str) -> None:
    profile, convert = WIDE["display p3"]
    expected, image = convert(COLOURS), patches(COLOURS)
    if mode == "P":
        image = image.quantize(32)
    else:
        image.putalpha(patches(np.array([*[255] * (len(COLOURS) - 1), 0], np.uint8)))
        expected = np.concatenate([expected[:-1], [[255, 255, 255]]])
    sources = read(file_of(image, icc_profile=profile))
    assert apart(sources, expected) <= EXACT
    assert (sources.mask is not None) == (mode == "RGBA")
    if sources.mask is not None:
        assert centres(sources.mask).tolist() == [*[0] * (len(COLOURS) - 1), 255]


def png_of_16_bits(samples: np.ndarray, *chunks: bytes) -> bytes:
    """RGB or grey, of `samples` of 16 bits."""
    height, width = samples.shape[:2]
    kind = 2 if samples.ndim == 3 else 0
    rows = b"".join(b"\0" + row.tobytes() for row in samples.astype(">u2"))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(image: Image.Image, *chunks: bytes) -> bytes:
    data = file_of(image)
    return data[:33] + b"".join(chunks) + data[33:]


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))


def test_sixteen_bits_with_a_profile_become_srgb() -> None:
    profile, convert = WIDE["display p3"]
    deep = np.asarray(patches(COLOURS)).astype(np.uint16) * 257
    assert apart(read(png_of_16_bits(deep, iccp(profile))), convert(COLOURS)) <= EXACT
    assert apart(read(png_of_16_bits(deep)), COLOURS) == 0
    # and the 8 bits that are nearest, not those above
    assert (
        apart(
            read(png_of_16_bits(np.asarray(patches(GREYS)).astype(np.uint16) * 257)), GREYS[:, None]
        )
        == 0
    )


def test_a_colour_of_16_bits_that_is_transparent_is() -> None:
    deep = np.asarray(patches(COLOURS)).astype(np.uint16) * 257
    for samples, colour, at in (
        (deep, COLOURS[6], 6),
        (deep, COLOURS[5], 5),
        (deep[..., 0], COLOURS[6, :1], 6),
    ):
        transparent = chunk(b"tRNS", (colour.astype(">u2") * 257).tobytes())
        mask = read(png_of_16_bits(samples, transparent)).mask
        assert mask is not None
        assert centres(mask).tolist() == [255 * (one == at) for one in range(len(COLOURS))]


GREYS = np.array([0, 10, 60, 128, 200, 255], np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "LA", "1", "I;16"])
def test_greys_with_a_profile_become_srgb(kind: str) -> None:
    """Of a linear profile: what is half as light is not half of 255."""
    greys, image = GREYS, patches(GREYS)
    if kind == "1":
        greys = np.array([0, 255], np.uint8)
        image = patches(greys).convert("1")
    if kind == "LA":
        image.putalpha(255)
    if kind == "I;16":
        data = png_of_16_bits(np.asarray(image).astype(np.uint16) * 257, iccp(profiles.GREY))
    else:
        data = file_of(image, "JPEG" if kind == "JPEG" else "PNG", icc_profile=profiles.GREY)
    sources = read(data)
    assert apart(sources, profiles.encoded(greys / 255)[:, None]) <= EXACT
    assert sources.warnings == ()


def test_cmyk_goes_by_its_profile() -> None:
    image = patches(INKS, "CMYK")
    data = file_of(image, "JPEG", icc_profile=profiles.PRESS)
    sources = read(data)
    assert apart(sources, profiles.inks_in_srgb(stored(data))) <= EXACT
    assert sources.warnings == ()
    plain = read(file_of(image, "JPEG"))
    assert apart(plain, centres(image.convert("RGB"))) <= EXACT
    (warning,) = plain.warnings
    assert warning == "image: it is CMYK without a colour profile; its colours are approximate."


def test_what_is_srgb_stays_exactly_as_it_is() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for profile in (
        profiles.PLAIN_SRGB,
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ):
        sources = read(file_of(noise, icc_profile=profile))
        assert (
            np.array_equal(np.asarray(sources.image), np.asarray(noise)) and sources.warnings == ()
        )
    usual, light = (chunk(b"gAMA", struct.pack(">I", gamma)) for gamma in (45_455, 100_000))
    for chunks in ((usual,), (chunk(b"sRGB", b"\0"), light)):
        assert np.array_equal(np.asarray(read(png_with(noise, *chunks)).image), np.asarray(noise))


def test_a_scaled_image_becomes_srgb_and_a_turned_one_too() -> None:
    profile, convert = WIDE["adobe rgb"]
    exif = Image.Exif()
    exif[0x0112] = 3
    image = patches(COLOURS).resize((4 * PATCH * len(COLOURS), 4 * PATCH), Image.Resampling.NEAREST)
    data = file_of(image, "JPEG", icc_profile=profile, exif=exif)
    sources = read(data, fit=lambda size, masked: (size[0] // 4, size[1] // 4))
    assert apart(sources, convert(COLOURS)[::-1]) <= 2 * EXACT  # JPEG's rounding comes with it


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_png_of_another_gamma_becomes_srgb(gamma: float, mode: str) -> None:
    image = (
        patches(COLOURS).convert("L").convert(mode) if mode in ("L", "RGBA") else patches(COLOURS)
    )
    samples = centres(image.convert("RGB"))
    if mode == "P":
        image = image.quantize(32)
    sources = read(png_with(image, chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))))
    assert apart(sources, profiles.encoded((samples / 255) ** (1 / gamma))) <= EXACT
    assert sources.warnings == ()


def test_an_icc_profile_goes_before_a_gamma() -> None:
    profile, convert = WIDE["adobe rgb"]
    data = png_with(patches(COLOURS), iccp(profile), chunk(b"gAMA", struct.pack(">I", 100_000)))
    assert apart(read(data), convert(COLOURS)) <= EXACT


def test_primaries_without_a_profile_are_warned_of() -> None:
    def of(*values: float) -> bytes:
        return chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in values)))

    gamma = chunk(b"gAMA", struct.pack(">I", 45455))
    assert (
        read(
            png_with(patches(COLOURS), gamma, of(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))
        ).warnings
        == ()
    )
    (warning,) = read(
        png_with(patches(COLOURS), gamma, of(0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    ).warnings
    assert "image" in warning and "cHRM" in warning


def of_elements(count: int) -> bytes:
    """All of them are the same three curves, so that few bytes ask for much work."""
    curve = (
        b"curf\0\0\0\0"
        + struct.pack(">HH4sIHHfff", 1, 0, b"parf", 0, 0, 0, 1.0001, 1, 0)
        + bytes(4)
    )
    element = (
        b"cvst\0\0\0\0" + struct.pack(">HH", 3, 3) + struct.pack(">II", 36, len(curve)) * 3 + curve
    )
    table = struct.pack(">II", 16 + 8 * count, len(element)) * count
    tag = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, count) + table + element
    return profiles.profile(b"RGB ", {b"D2B0": tag, b"D2B1": tag}, version=4)


def of_class(kind: bytes) -> bytes:
    return profiles.P3[:12] + kind + profiles.P3[16:]


UNUSABLE = {
    "of inks": (profiles.PRESS, "it is for 'CMYK', the image is 'RGB'"),
    "of greys": (profiles.GREY, "it is for 'GRAY', the image is 'RGB'"),
    "of links": (of_class(b"link"), "it is of class 'link'"),
    "of names": (of_class(b"nmcl"), "it is of class 'nmcl'"),
    "short": (profiles.P3[:100], "it is damaged"),
    "of header alone": (profiles.P3[:128], "it is damaged"),
    "cut": (profiles.P3[:300], "it is damaged"),
    "of no profile": (b"x" * 500, "it is damaged"),
    "of tags beyond its end": (profiles.P3[:128] + b"\xff" * 400, "it is damaged"),
    "of elements that take minutes": (of_elements(20_000), "it is of multi-process elements"),
    "without tags": (profiles.profile(b"RGB ", {}), "it is damaged"),
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_warning(kind: str, format: str) -> None:
    profile, says = UNUSABLE[kind]
    sources = read(file_of(patches(COLOURS), format, icc_profile=profile))
    assert apart(sources, COLOURS) <= EXACT
    (warning,) = sources.warnings
    assert warning.startswith("image: its colour profile is ignored") and says in warning


def test_a_profile_whose_parts_are_missing_or_cannot_be_inflated_is_ignored_with_a_warning() -> (
    None
):
    jpeg = file_of(patches(COLOURS), "JPEG", icc_profile=profiles.P3)
    part = jpeg.index(b"ICC_PROFILE\0") + 12
    for data in (
        jpeg[: part + 1] + b"\x02" + jpeg[part + 2 :],  # 1 of 2
        png_with(patches(COLOURS), chunk(b"iCCP", b"x\0\0" + b"no zlib")),
    ):
        sources = read(data)
        assert apart(sources, COLOURS) <= EXACT
        assert "its colour profile is ignored: it is damaged" in sources.warnings[0]


def test_a_profile_of_rgb_on_a_grey_image_is_ignored_with_a_warning() -> None:
    sources = read(file_of(patches(GREYS), "JPEG", icc_profile=profiles.P3))
    assert apart(sources, GREYS[:, None]) <= EXACT
    assert "it is for 'RGB', the image is 'GRAY'" in sources.warnings[0]


def test_warnings_name_the_mask_that_they_are_of() -> None:
    width, height = patches(COLOURS).size
    mask = patches(GREYS).resize((2 * width, 2 * height))
    sources = read_sources(file_of(patches(COLOURS)), file_of(mask), max_pixels=4 * LIMIT)
    assert [warning[:11] for warning in sources.warnings] == ["mask: it is"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    which=st.sampled_from(
        [
            ("RGB", profiles.P3),
            ("RGB", profiles.ADOBE),
            ("L", profiles.GREY),
            ("CMYK", profiles.PRESS),
        ]
    ),
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8),
    end=st.none() | st.integers(0, 600),
)
def test_whatever_a_profile_holds_the_image_is_read(
    which: tuple[str, bytes], changes: list[tuple[int, int]], end: int | None
) -> None:
    mode, profile = which
    damaged = bytearray(profile)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    image = Image.new(mode, (16, 16), 77)
    sources = read(file_of(image, "JPEG", icc_profile=bytes(damaged[:end])))
    assert sources.image.mode == "RGB" and sources.image.size == (16, 16)
    assert all(warning.startswith("image: ") for warning in sources.warnings)


def test_the_bytes_of_a_profile_are_bounded() -> None:
    big = profiles.P3 + bytes(scan.MAX_PROFILE_BYTES)
    for format in ("JPEG", "WEBP"):
        with pytest.raises(
            InvalidRequestError,
            match=r"image has \d+ bytes of colour profile; the limit is 4194304",
        ) as caught:
            read(file_of(patches(COLOURS), format, icc_profile=big))
        assert (caught.value.code, caught.value.param) == (scan.CODE, "image")
    with pytest.raises(
        InvalidRequestError, match="compressed text or colour profile of more than 1048576 bytes"
    ) as caught:
        read(file_of(patches(COLOURS), icc_profile=big))
    assert (caught.value.code, caught.value.param) == (scan.CODE, "image")
    usual = profiles.P3 + bytes(900_000)
    for format in ("JPEG", "WEBP", "PNG"):
        data = file_of(patches(COLOURS), format, icc_profile=usual)
        assert apart(read(data), WIDE["display p3"][1](stored(data))) <= EXACT
