"""What an image shows, told from its pixels alone.

It shares no code, colours or outlines with the training data: colours are named by hue, saturation
and value; the background is what the border shows; the shape is the template, tested point by point
from its definition, that covers the subject best once their moments (area and centroid) agree. Used
by the evaluation and by the product's own tests.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

SAMPLES = 4  # per pixel and axis, when a template is drawn
SHAPE_MATCH = 0.8  # least overlap (intersection over union) with the best template
COLOUR_WORDS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
Box = tuple[int, int, int, int]  # left, top, right and bottom, in pixels
SHAPE_WORDS = ("circle", "square", "triangle", "star", "ring", "cross")


@dataclass(frozen=True)
class Seen:
    """What the checker sees; an empty word where nothing fits. `match` is the overlap with the
    template of `shape`, and `box` the subject's left, top, right and bottom in pixels."""

    colour: str
    background: str
    shape: str
    size: str
    horizontal: str
    vertical: str
    match: float
    box: Box = (0, 0, 0, 0)


def name_colour(rgb: np.ndarray) -> str:
    """The colour word for a mean RGB (0-255), or "" for what none of the eight words describes."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in rgb))
    degrees = hue * 360
    if value < 0.2:
        return "black"
    if saturation < 0.12:
        return "white" if value > 0.85 else ""
    if saturation < 0.5 or value < 0.4:
        return ""
    return _name_hue(degrees)


def _name_hue(degrees: float) -> str:
    for word, low, high in (
        ("red", -15, 13), ("orange", 20, 40), ("yellow", 45, 65), ("green", 95, 170),
        ("blue", 205, 245), ("purple", 265, 300),
    ):  # fmt: skip
        if low <= degrees <= high or low <= degrees - 360 <= high:
            return word
    return ""


def name_pastel(rgb: np.ndarray) -> str:
    """The word of the colour that a mean RGB (0-255) is a pale version of, or ""; black and white
    are themselves."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in rgb))
    if saturation < 0.15 and value > 0.85:
        return "white"
    if value < 0.2:
        return "black"
    return _name_hue(hue * 360) if 0.2 <= saturation <= 0.65 and value > 0.7 else ""


def _in_polygon(
    corners: list[tuple[float, float]],
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Even-odd rule by ray casting."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            if ay != by:
                crosses = (ay > y) != (by > y)
                result ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
        return result

    return inside


def _pentagram() -> list[tuple[float, float]]:
    """A five-pointed star; the ratio of its radii is free in the prompt, 0.4 is near the regular
    pentagram's 0.382."""
    radii = (1.0, 0.4) * 5
    return [
        (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)
    ]


_DEFINITIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": _in_polygon([(0, -1), (math.sqrt(3) / 2, 0.5), (-math.sqrt(3) / 2, 0.5)]),
    "star": _in_polygon(_pentagram()),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.6**2),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1),
    "moon": lambda x, y: (x**2 + y**2 <= 1) & ((x - 0.48) ** 2 + y**2 >= 0.77**2),  # a LoRA's
}


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class _Template:
    """A shape by definition, with its area and centroid in its own units."""

    inside: Callable[[np.ndarray, np.ndarray], np.ndarray]
    area: float
    centroid: tuple[float, float]

    @staticmethod
    def of(inside: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> _Template:
        axis = (np.arange(800) + 0.5) / 400 - 1
        x, y = np.meshgrid(axis, axis)
        covered = inside(x, y)
        return _Template(
            inside, float(covered.mean() * 4), (float(x[covered].mean()), float(y[covered].mean()))
        )

    def overlap(self, coverage: np.ndarray) -> float:
        """Intersection over union with a coverage 0-1, once centroid and area are made equal: to a
        fraction of a pixel."""
        height, width = coverage.shape
        total = coverage.sum()
        rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
        centre = (coverage.sum(0) @ columns / total, coverage.sum(1) @ rows / total)
        scale = math.sqrt(total / self.area)
        x = ((np.arange(width * SAMPLES) + 0.5) / SAMPLES - centre[0]) / scale + self.centroid[0]
        y = ((np.arange(height * SAMPLES) + 0.5) / SAMPLES - centre[1]) / scale + self.centroid[1]
        drawn = (
            self.inside(*np.meshgrid(x, y)).reshape(height, SAMPLES, width, SAMPLES).mean((1, 3))
        )
        return float(np.minimum(drawn, coverage).sum() / np.maximum(drawn, coverage).sum())


_TEMPLATES = {word: _Template.of(inside) for word, inside in _DEFINITIONS.items()}


def _third(low: float, high: float, words: tuple[str, str]) -> str:
    """The position word for an interval of [0, 1], by the room left on both sides."""
    before, after = low, 1 - high
    if max(before, after) < 2 * min(before, after) + 0.02:
        return ""
    return words[0] if before < after else words[1]


def look(image: Image.Image, style: str = "") -> Seen:
    """Describe an image of one shape on a plain background, of any size. In the style "pastel"
    its colours are pale."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    height, width, _ = pixels.shape
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=2)
    contrast = np.percentile(distance[distance > 40], 75) if (distance > 40).any() else 0.0
    mask = distance > contrast / 2
    name = name_pastel if style == "pastel" else name_colour
    if contrast == 0.0 or mask.sum() < 9:
        return Seen("", name(ground), "", "", "", "", 0.0)
    left, top, right, bottom = _box(mask)
    subject = np.median(pixels[distance > 0.9 * contrast], axis=0)
    direction = subject - ground
    coverage = (pixels - ground) @ direction / (direction @ direction)
    coverage = np.clip((coverage - 0.1) / 0.8, 0, 1)  # neither noise nor ringing is shape
    overlap = {word: template.overlap(coverage) for word, template in _TEMPLATES.items()}
    best = max(overlap, key=overlap.__getitem__)
    extent = max((right - left) / width, (bottom - top) / height)
    return Seen(
        colour=name(subject),
        background=name(ground),
        shape=best if overlap[best] >= SHAPE_MATCH else "",
        size="small" if extent < 0.42 else "large" if extent > 0.5 else "",
        horizontal=_third(left / width, right / width, ("left", "right")),
        vertical=_third(top / height, bottom / height, ("top", "bottom")),
        match=overlap[best],
        box=(left, top, right, bottom),
    )


def expected(prompt: str) -> dict[str, str]:
    """What a prompt of the grammar asks for, by part; parts it does not mention are absent, but no
    position means centred."""
    words = prompt.lower().replace(",", " ").split()
    parts: dict[str, str] = {"horizontal": "", "vertical": ""}
    colours = [word for word in words if word in COLOUR_WORDS]
    ground = re.search(r"\b(\w+) background\b|\bon (?:an? )?(\w+)", " ".join(words))
    if ground and (word := ground[1] or ground[2]) in COLOUR_WORDS:
        parts["background"] = word
        colours.remove(word)
    if colours:
        parts["colour"] = colours[0]
    for part, options in (
        ("shape", tuple(_DEFINITIONS)), ("size", ("small", "large")),
        ("horizontal", ("left", "right")), ("vertical", ("top", "bottom")),
    ):  # fmt: skip
        for word in words:
            if word in options:
                parts[part] = word
    return parts


def wrong_parts(image: Image.Image, prompt: str, style: str = "") -> list[str]:
    """The parts of the prompt that the image does not obey in a style (see `look`); empty when it
    shows what was asked."""
    seen = look(image, style)
    return [part for part, word in expected(prompt).items() if getattr(seen, part) != word]
