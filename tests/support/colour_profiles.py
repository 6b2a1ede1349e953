"""Handwritten ICC profiles (ICC.1:2010), and conversions of their colours without lcms."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

Pixels = np.ndarray
Primaries = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

SRGB: Primaries = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3: Primaries = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB: Primaries = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
D65, D50 = np.array([0.95047, 1.0, 1.08883]), np.array([0.9642, 1.0, 0.8249])
ADOBE_GAMMA = 563 / 256
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
INKS = np.array(
    [[-20.0, -18.0, -4.0, -45.0], [-25.0, 45.0, -3.0, 0.0], [-28.0, -4.0, 55.0, 0.0]]
)  # Lab of an ink, of paper


def encoded(light: Pixels) -> Pixels:
    """Linear light as sRGB samples, 0 to 255."""
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def linear(samples: Pixels) -> Pixels:
    """Samples as linear light, by sRGB's curve, which is Display P3's too."""
    value = samples / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def power(gamma: float) -> Callable[[Pixels], Pixels]:
    return lambda samples: (samples / 255) ** gamma


def matrix(primaries: Primaries) -> np.ndarray:
    """The matrix from linear RGB to XYZ, adapted to D50."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    to_xyz = columns * np.linalg.solve(columns, D65)
    cones = np.diag((BRADFORD @ D50) / (BRADFORD @ D65))
    adapted: np.ndarray = np.linalg.inv(BRADFORD) @ cones @ BRADFORD @ to_xyz
    return adapted


def in_srgb(samples: Pixels, primaries: Primaries, curve: Callable[[Pixels], Pixels]) -> Pixels:
    """RGB samples of a space as sRGB, 0 to 255."""
    to_srgb = np.linalg.inv(matrix(SRGB)) @ matrix(primaries)
    return encoded(curve(samples.astype(float)) @ to_srgb.T)


def inks_in_srgb(samples: Pixels) -> Pixels:
    """CMYK samples (255: full ink) as sRGB."""
    lab = np.array([100.0, 0, 0]) + samples / 255 @ INKS.T
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return encoded(xyz @ np.linalg.inv(matrix(SRGB)).T)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


CURVE_OF_SRGB = (
    b"para\0\0\0\0"
    + struct.pack(">HH", 3, 0)
    + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
)


def profile(
    space: bytes,
    tags: dict[bytes, bytes],
    kind: bytes = b"mntr",
    version: int = 2,
    pcs: bytes = b"XYZ ",
) -> bytes:
    """The bytes of a profile with these tags and the required ones."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    if version == 4:
        text = (
            b"mluc\0\0\0\0"
            + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 8, 28)
            + "test".encode("utf-16-be")
        )
    tags = {
        b"desc": text,
        b"cprt": text if version == 4 else b"text\0\0\0\0none\0",
        b"wtpt": _xyz(D50),
        **tags,
    }
    at, table, content = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sBBH4s4s4s12s4s", at + len(content), b"", version, 0, 0, kind, space, pcs, b"", b"acsp"
    )
    header += bytes(28) + _fixed(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def of_rgb(primaries: Primaries, curve: bytes, version: int = 2) -> bytes:
    columns = {
        name: _xyz(column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix(primaries).T, strict=True)
    }
    return profile(
        b"RGB ", {**columns, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)}, version=version
    )


def of_grey(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": _gamma(gamma)})


def of_inks() -> bytes:
    """The profile of a press whose inks are additive in Lab (`INKS`): a table of 2 points per ink,
    which interpolates exactly."""
    # the last ink varies fastest
    points = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lab = np.array([100.0, 0, 0]) + points @ INKS.T
    codes = np.stack(
        [lab[:, 0] / 100 * 0xFF00, (lab[:, 1] + 128) * 256, (lab[:, 2] + 128) * 256], -1
    ).round()
    line = struct.pack(">HH", 0, 0xFFFF)
    table = b"mft2\0\0\0\0" + struct.pack(">BBBB", 4, 3, 2, 0) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += struct.pack(">HH", 2, 2) + 4 * line + codes.astype(">u2").tobytes() + 3 * line
    return profile(b"CMYK", {b"A2B0": table}, b"prtr", pcs=b"Lab ")


P3 = of_rgb(DISPLAY_P3, CURVE_OF_SRGB, version=4)
ADOBE = of_rgb(ADOBE_RGB, _gamma(ADOBE_GAMMA))
PLAIN_SRGB = of_rgb(SRGB, CURVE_OF_SRGB, version=4)
GREY = of_grey(1.0)
PRESS = of_inks()
