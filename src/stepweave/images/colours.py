"""Converts uploads to sRGB, which models were trained on and viewers assume for results."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageChops, ImageCms

SRGB_GAMMA = 1 / 2.2  # in the form of a PNG's gAMA
# relative difference of a gAMA that still means sRGB, whose curve is not a power
GAMMA_TOLERANCE = 0.05
# x and y of white, red, green and blue
SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES_TOLERANCE = 0.01
# keeps colours that both spaces have, black too; white is that of the paper
INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
SAME = 1  # of 255: a conversion that changes no more is skipped
_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
# profiles of colours; not of links between devices, nor of names
_CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")
# tags of multi-process elements: 240 KB of them may cost lcms minutes, and a gigabyte
COSTLY = b"mpet"
_HEADER = 128  # bytes of a profile before its tags


def to_srgb(image: Image.Image, param: str) -> tuple[Image.Image, list[str]]:
    """Convert an image of mode L, LA, RGB, RGBA or CMYK to sRGB, in RGB or RGBA. Returns it with
    warnings about its profile, by `param`.

    As the PNG specification says, the colour space is that of the ICC profile, else a PNG's `sRGB`,
    else its `gAMA`, else sRGB. Unusable profiles are ignored. CMYK without one is converted as 255
    minus ink, as Pillow does.
    """
    if image.mode in ("LA", "RGBA"):
        opaque, warnings = to_srgb(image.convert(image.mode[:-1]), param)  # which keeps `info`
        opaque.putalpha(image.getchannel("A"))
        return opaque, warnings
    info = image.info
    if "icc_profile" in info:
        try:
            return _by_profile(image, info["icc_profile"]), []
        except _Unusable as error:
            return image.convert("RGB"), [f"{param}: its colour profile is ignored: {error}."]
    if image.mode == "CMYK":
        warning = f"{param}: it is CMYK without a colour profile; its colours are approximate."
        return image.convert("RGB"), [warning]
    if "gamma" in info and "srgb" not in info:
        warnings = _warnings_of_primaries(info.get("chromaticity", SRGB_PRIMARIES), param)
        return _by_gamma(image, info["gamma"]), warnings
    return image.convert("RGB"), []


def unconverted(image: Image.Image) -> Image.Image:
    """The image in RGB or RGBA, with unchanged values, whatever its profile."""
    return image.convert("RGBA" if image.mode in ("LA", "RGBA") else "RGB")


class _Unusable(Exception):
    """A profile cannot be used; the message says why."""


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile or len(profile) < _HEADER or profile[36:40] != b"acsp":
        raise _Unusable("it is damaged")
    kind, space, wanted = profile[12:16], profile[16:20], _SPACES[image.mode]
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
        # most profiles are sRGB: then values stay exactly the same
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
    levels = np.stack(np.meshgrid(steps, steps, steps), -1)
    lattice = Image.fromarray(levels.reshape(18, 18 * 18, 3))
    converted = ImageCms.applyTransform(lattice, transform)
    assert converted is not None
    return max(most for _, most in ImageChops.difference(lattice, converted).getextrema()) <= SAME  # type: ignore[misc]


def _by_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """Convert samples that are light to the power of `gamma`."""
    if not 0.01 < gamma < 100 or abs(gamma / SRGB_GAMMA - 1) <= GAMMA_TOLERANCE:
        return image.convert("RGB")
    light = (np.arange(256) / 255) ** (1 / gamma)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    table = (255 * encoded).round().astype(int).tolist()
    return image.point(table * len(image.getbands())).convert("RGB")


def _warnings_of_primaries(primaries: tuple[float, ...], param: str) -> list[str]:
    if np.allclose(primaries, SRGB_PRIMARIES, rtol=0, atol=PRIMARIES_TOLERANCE):
        return []
    ignored = f"{param}: its primary colours (cHRM) are not those of sRGB and are ignored"
    return [f"{ignored}; embed an ICC profile."]
