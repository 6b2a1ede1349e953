"""The colours of uploads as sRGB, which is what the models were trained on and what the files of
results are taken for."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageChops, ImageCms

SRGB_GAMMA = 1 / 2.2  # as a PNG's gAMA tells it
# of a gAMA, relative: closer ones mean sRGB, whose curve is no power of a number
GAMMA_TOLERANCE = 0.05
# x and y of white, red, green and blue
SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES_TOLERANCE = 0.01
# what both spaces have stays as it is, black too; white is the paper
INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
SAME = 1  # of 255: what a conversion may change at most to count as none
_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
# profiles of colours; not of links between devices, nor of names
_CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")
# type of the tags of multi-process elements, of which 240 KB may take lcms minutes, and a gigabyte
COSTLY = b"mpet"
_HEADER = 128  # bytes of a profile before its tags


def to_srgb(image: Image.Image, param: str) -> tuple[Image.Image, list[str]]:
    """An image of mode L, LA, RGB, RGBA or CMYK in RGB or RGBA, and warnings about its profile.

    What counts is, as in the PNG specification, the ICC profile, else a PNG's `sRGB`, else its
    `gAMA`; else it is sRGB. A profile that cannot be used counts as none. CMYK without one is
    converted as 255 minus ink, which is what Pillow does.
    """
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        opaque, warnings = to_srgb(_without_alpha(image), param)
        opaque.putalpha(alpha)
        return opaque, warnings
    info = image.info
    if "icc_profile" in info:
        try:
            return _by_profile(image, info["icc_profile"]), []
        except _Unusable as error:
            return image.convert("RGB"), [f"{param}: its colour profile is ignored: {error}."]
    if image.mode == "CMYK":
        return image.convert("RGB"), [
            f"{param}: it is CMYK without a colour profile; its colours are approximate."
        ]
    if "gamma" in info and "srgb" not in info:
        return _by_gamma(image, info["gamma"]), _warnings_of_primaries(
            info.get("chromaticity"), param
        )
    return image.convert("RGB"), []


def unconverted(image: Image.Image) -> Image.Image:
    """The same in RGB or RGBA with its values as they are, whatever its profile."""
    return image.convert("RGBA" if image.mode in ("LA", "RGBA") else "RGB")


class _Unusable(Exception):
    """Says why a profile is."""


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colours as they are, whatever the alpha; `convert` keeps `info`."""
    return image.convert(image.mode[:-1])


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile or len(profile) < _HEADER:
        raise _Unusable("it is damaged")
    kind, space, wanted = profile[12:16], profile[16:20], _SPACES[image.mode]
    if profile[36:40] != b"acsp":
        raise _Unusable("it is damaged")
    if kind not in _CLASSES:
        raise _Unusable(f"it is of class {_text(kind)}, which describes no image")
    if space != wanted:
        raise _Unusable(f"it is for {_text(space)}, the image is {_text(wanted)}")
    if COSTLY in profile:
        raise _Unusable("it is of multi-process elements, which are not read")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), image.mode, "RGB", INTENT
        )
        # most are sRGB: what they tag stays exactly as it is
        if image.mode == "RGB" and _changes_nothing(transform):
            return image
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        raise _Unusable("it is damaged") from None
    assert converted is not None
    return converted


def _text(signature: bytes) -> str:
    return repr(signature.decode("latin-1").strip())


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    lattice = Image.fromarray(
        np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18, 18 * 18, 3)
    )
    converted = ImageCms.applyTransform(lattice, transform)
    assert converted is not None
    return max(most for _, most in ImageChops.difference(lattice, converted).getextrema()) <= SAME  # type: ignore[misc]


def _by_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """Of samples that are light to the power of `gamma`."""
    if not 0.01 < gamma < 100 or abs(gamma / SRGB_GAMMA - 1) <= GAMMA_TOLERANCE:
        return image.convert("RGB")
    light = (np.arange(256) / 255) ** (1 / gamma)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    table = (255 * encoded).round().astype(int).tolist()
    return image.point(table * len(image.getbands())).convert("RGB")


def _warnings_of_primaries(primaries: tuple[float, ...] | None, param: str) -> list[str]:
    if primaries is None or np.allclose(
        primaries, SRGB_PRIMARIES, rtol=0, atol=PRIMARIES_TOLERANCE
    ):
        return []
    return [
        (
            f"{param}: its primary colours (cHRM) are not those of sRGB and are ignored; embed an "
            "ICC profile."
        )
    ]
