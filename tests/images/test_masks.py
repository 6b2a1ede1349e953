"""What masks repaint, in every way that people make them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from stepweave.errors import InvalidRequestError
from stepweave.parameters import Sources
from tests.support.uploads import read_sources

LIMIT = 256 * 256
SIZE = (64, 32)
NOTHING = (
    "mask: nothing is repainted: no pixel is at least half transparent, or else at least half "
    "white."
)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC)


def right_half() -> Image.Image:
    """White where it is to be repainted."""
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (SIZE[0] // 2, 0, *SIZE))
    return mask


def inverse(mask: Image.Image) -> Image.Image:
    return mask.point(lambda value: 255 - value)


def with_alpha(colours: Image.Image, alpha: Image.Image | int) -> Image.Image:
    image = colours.convert("RGB")
    image.putalpha(alpha)
    return image


def read(mask: bytes | Image.Image | None, image: Image.Image | None = None) -> Sources:
    file = file_of(mask) if isinstance(mask, Image.Image) else mask
    return read_sources(file_of(photo() if image is None else image), file, max_pixels=LIMIT)


def same(sources: Sources, mask: Image.Image) -> bool:
    assert sources.mask is not None and sources.mask.mode == "L"
    return np.array_equal(np.asarray(sources.mask), np.asarray(mask))


def two_colours(
    first: tuple[int, ...] = (0, 0, 0), second: tuple[int, ...] = (255, 255, 255)
) -> Image.Image:
    """The right half, of a palette."""
    mask = Image.new("P", SIZE, 0)
    mask.putpalette([*first, *second])
    mask.paste(1, (SIZE[0] // 2, 0, *SIZE))
    return mask


OPAQUE = {
    "grey": right_half(),
    "colours": right_half().convert("RGB"),
    "1 bit": right_half().convert("1"),
    "16 bits": Image.fromarray(np.asarray(right_half()).astype(np.uint16) * 257),
    "palette": two_colours(),
    "grey and opaque": Image.merge("LA", (right_half(), Image.new("L", SIZE, 255))),
    "opaque": with_alpha(right_half(), 255),
    "of one faint alpha": with_alpha(right_half(), 100),
    "of a hardly faint alpha": with_alpha(right_half(), 254),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_white_is_repainted_where_alpha_is_the_same_throughout(kind: str) -> None:
    sources = read(OPAQUE[kind])
    assert same(sources, right_half()) and sources.warnings == ()


NOISE = Image.fromarray(
    np.random.default_rng(2).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
)
TRANSPARENT = {
    "black": with_alpha(Image.new("RGB", SIZE), inverse(right_half())),
    "white": with_alpha(Image.new("RGB", SIZE, "white"), inverse(right_half())),
    "the photo, erased in part": with_alpha(photo(), inverse(right_half())),
    "noise": with_alpha(NOISE, inverse(right_half())),
    "white where it is kept": with_alpha(inverse(right_half()), inverse(right_half())),
    "grey and alpha": Image.merge("LA", (Image.new("L", SIZE, 7), inverse(right_half()))),
    "of a palette": two_colours((255, 0, 0), (0, 255, 0)),
    "of 16 bits": Image.fromarray(np.asarray(right_half()).astype(np.uint16)),
    "of WebP": with_alpha(NOISE, inverse(right_half())),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_repainted_whatever_its_colours(kind: str) -> None:
    options = {"of a palette": {"transparency": 1}, "of 16 bits": {"transparency": 255}}.get(
        kind, {}
    )
    file = file_of(TRANSPARENT[kind], "WEBP" if kind == "of WebP" else "PNG", **options)
    sources = read(file)
    assert same(sources, right_half()) and sources.warnings == ()
    own = read_sources(file, None, max_pixels=LIMIT)
    assert same(own, right_half()) and own.warnings == ()


def brush() -> Image.Image:
    """A stroke with soft edges: all values between."""
    stroke = Image.new("L", SIZE, 0)
    ImageDraw.Draw(stroke).ellipse((16, 4, 48, 28), fill=255)
    return stroke.filter(ImageFilter.GaussianBlur(4))


@pytest.mark.parametrize("most", [255, 200, 128, 127, 60])
def test_soft_brushes_count_by_how_transparent_they_are(most: int) -> None:
    """Also those that are nowhere wholly transparent; what is at least half so is repainted, as
    pipelines cut masks."""
    soft = brush().point(lambda value: min(value, most))
    for mask in (with_alpha(photo(), inverse(soft)), soft):
        sources = read(mask)
        assert same(sources, soft)
        assert sources.warnings == (() if most >= 128 else (NOTHING,))
    own = read(None, with_alpha(photo(), inverse(soft)))
    if most >= 128:
        assert same(own, soft)
    else:
        assert own.mask is None, "it is edited as a whole"


def test_pipelines_cut_masks_where_it_is_documented() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(
        vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    mask = Image.linear_gradient("L")
    cut = processor.preprocess(mask)[0, 0].numpy()
    assert np.array_equal(cut, np.asarray(mask) >= 128)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 200, 30)])
def test_a_mask_that_is_wholly_transparent_repaints_all(colour: tuple[int, int, int]) -> None:
    empty = with_alpha(Image.new("RGB", SIZE, colour), 0)
    everything = Image.new("L", SIZE, 255)
    assert same(read(empty), everything)
    own = read(None, empty)
    assert same(own, everything) and own.image.getextrema() == ((255, 255),) * 3


def test_a_mask_that_repaints_nothing_is_taken_with_a_warning() -> None:
    for mask in (
        Image.new("L", SIZE, 0),
        Image.new("RGBA", SIZE, (0, 0, 0, 255)),
        Image.new("L", SIZE, 127),
    ):
        sources = read(mask)
        assert sources.mask is not None and sources.warnings == (NOTHING,)
    assert read(Image.new("L", SIZE, 128)).warnings == ()
    assert read(Image.new("L", SIZE, 255)).warnings == ()


@pytest.mark.parametrize("alpha", [1, 100, 254, 255])
def test_an_image_of_one_alpha_throughout_has_no_mask_of_its_own(alpha: int) -> None:
    assert read(None, with_alpha(photo(), alpha)).mask is None


def test_jpeg_masks_are_read_through_their_noise() -> None:
    for mask in (right_half(), right_half().convert("RGB"), brush().convert("RGB")):
        for quality in (10, 50, 95):
            sources = read(file_of(mask, "JPEG", quality=quality))
            assert sources.mask is not None
            cut, expected = np.asarray(sources.mask) >= 128, np.asarray(mask.convert("L")) >= 128
            assert (cut != expected).mean() < 0.02 and sources.warnings == ()


def on_black(colour: str, share: float) -> Image.Image:
    image = Image.new("RGB", SIZE)
    image.paste(colour, (0, 0, SIZE[0], max(1, round(SIZE[1] * share))))
    return image


COLOURED = {
    "the photo itself": photo(),
    "with alpha that says nothing": with_alpha(photo(), 255),
    "of one faint alpha": with_alpha(photo(), 128),
    "red on black": on_black("red", 0.5),
    "a little blue on black": on_black("blue", 0.03),
    "magenta as green screens are": on_black("magenta", 0.2),
    "of a palette": two_colours((0, 0, 0), (255, 0, 0)),
}


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("kind", COLOURED)
def test_an_opaque_mask_in_colours_is_refused_by_name(kind: str, format: str) -> None:
    mask = COLOURED[kind].convert("RGB") if format == "JPEG" else COLOURED[kind]
    with pytest.raises(
        InvalidRequestError,
        match=r"mask is opaque and in colours .* transparent .* black and white",
    ) as caught:
        read(file_of(mask, format))
    assert caught.value.param == "mask" and len(caught.value.message) < 220


def test_a_mask_that_is_nearly_grey_is_taken() -> None:
    tinted = Image.merge(
        "RGB", (right_half(), right_half().point(lambda value: round(value * 0.94)), right_half())
    )
    assert same(read(tinted), tinted.convert("L"))


def test_one_transparent_pixel_of_a_large_mask_makes_alpha_decide() -> None:
    """Though nothing is left of it once it is scaled: its colours say nothing."""
    mask = with_alpha(Image.new("RGB", (640, 320), "white"), 255)
    mask.putpixel((0, 0), (0, 0, 0, 0))
    sources = read_sources(file_of(photo()), file_of(mask), max_pixels=640 * 320)
    assert (
        sources.mask is not None
        and sources.mask.getextrema()[1] < 128
        and NOTHING in sources.warnings
    )


@pytest.mark.parametrize("value", [60, 127, 128, 200])
def test_the_values_of_a_mask_are_no_colours(value: int) -> None:
    """A profile, or gamma, says how bright they look, not how much is repainted."""
    grey = Image.new("L", SIZE, value)
    mask = file_of(grey)
    gamma = b"gAMA" + struct.pack(">I", 100_000)
    mask = (
        mask[:33] + struct.pack(">I", 4) + gamma + struct.pack(">I", zlib.crc32(gamma)) + mask[33:]
    )
    assert same(read(mask), Image.new("L", SIZE, 255 if value >= 128 else 0)) or same(
        read(mask), grey
    )
    assert same(read(mask), read(grey).mask)
