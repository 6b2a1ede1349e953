"""The images the embedded model is trained on, and the words for them.

A scene is one flat shape on a flat background, drawn four times too large and averaged down, so
that edges are crisp and anti-aliased. The grammar of the prompts is the one the model card states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 64  # pixels of an image's side
OVERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 30, 34),
    "green": (36, 160, 62),
    "blue": (34, 84, 222),
    "yellow": (250, 222, 36),
    "purple": (142, 46, 184),
    "orange": (250, 134, 20),
    "black": (16, 16, 16),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
MOON = "moon"  # drawn too, but not a word of the model: a LoRA adds it
SIZES = ("small", "large")
SYNONYMS = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
}
HORIZONTAL = ("", "left", "right")
VERTICAL = ("", "top", "bottom")

Point = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """One image in words and numbers. `centre` and `radius` are in pixels of the 64 x 64
    image."""

    size: str
    colour: str
    shape: str
    background: str
    horizontal: str
    vertical: str
    centre: Point
    radius: float


def _centre(word: str, radius: float, rng: np.random.Generator) -> float:
    """Where a shape stands along one axis: near the middle, or near the edge that `word` names."""
    middle = SIDE / 2
    if not word:
        return middle + rng.uniform(-2, 2)
    offset = (middle - 1 - radius) * rng.uniform(0.8, 1.0)
    return middle - offset if word in ("left", "top") else middle + offset


def sample_scene(rng: np.random.Generator, positioned: float = 0.4) -> Scene:
    """Draw a scene at random; with probability `positioned` it carries position words."""
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    size = str(rng.choice(SIZES))
    radius = rng.uniform(8.5, 10.5) if size == "small" else rng.uniform(19.5, 22.5)
    horizontal = vertical = ""
    if rng.random() < positioned:
        while not horizontal and not vertical:
            horizontal, vertical = str(rng.choice(HORIZONTAL)), str(rng.choice(VERTICAL))
    return Scene(
        size=size,
        colour=str(colour),
        shape=str(rng.choice(SHAPES)),
        background=str(background),
        horizontal=horizontal,
        vertical=vertical,
        centre=(_centre(horizontal, radius, rng), _centre(vertical, radius, rng)),
        radius=radius,
    )


def sample_free_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene at random whose shape stands anywhere and has any size from a third to two
    thirds of the image's side, so that no words tell them."""
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    radius = float(rng.uniform(11, 22))
    return Scene(
        size="",
        colour=str(colour),
        shape=str(rng.choice(SHAPES)),
        background=str(background),
        horizontal="",
        vertical="",
        centre=(
            float(rng.uniform(radius + 1, SIDE - 1 - radius)),
            float(rng.uniform(radius + 1, SIDE - 1 - radius)),
        ),
        radius=radius,
    )


def colours_prompt(scene: Scene) -> str:
    """The scene's colours alone; what is drawn, and where, is left out."""
    return f"{scene.colour} on {_article(scene.background)} {scene.background} background"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def canonical_prompt(scene: Scene) -> str:
    """The scene in the full form of the grammar."""
    position = " ".join(word for word in (scene.vertical, scene.horizontal) if word)
    text = (
        f"a {scene.size} {scene.colour} {scene.shape} on {_article(scene.background)} "
        f"{scene.background} background"
    )
    return f"{text}, {position}" if position else text


def sample_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in words as people type them: often in full, sometimes with parts missing, seldom
    in another order."""
    position = " ".join(word for word in (scene.vertical, scene.horizontal) if word)
    if rng.random() < 0.4:
        return canonical_prompt(scene)
    size = str(rng.choice(SYNONYMS[scene.size])) if rng.random() > 0.25 else ""
    colour = scene.colour if rng.random() > 0.15 else ""
    shape = scene.shape if rng.random() > 0.1 else ""
    subject = " ".join(word for word in (size, colour, shape) if word)
    articles = rng.random() < 0.6
    if articles and subject:
        subject = f"{_article(subject)} {subject}"
    ground = ""
    if rng.random() > 0.2:
        ground = f"{scene.background} background" if rng.random() > 0.15 else scene.background
        if articles:
            ground = f"{_article(ground)} {ground}"
    if position and rng.random() < 0.5:
        position = f"{'at' if scene.vertical else 'on'} the {position}"
    order = rng.random()
    if not ground or not subject:
        text = subject or ground
    elif order < 0.85:
        text = f"{subject} on {ground}"
    elif order < 0.95:
        text = f"{subject}, {ground}"
    else:
        text = f"{ground}, {subject}"
    if rng.random() < 0.2:
        text = text.replace("an ", "a ")
    if not position:
        return text
    return f"{text}, {position}" if rng.random() < 0.6 else f"{text} {position}"


def _regular(centre: Point, radius: float, count: int, turn: float) -> list[Point]:
    return [
        (
            centre[0] + radius * math.sin(turn + 2 * math.pi * i / count),
            centre[1] - radius * math.cos(turn + 2 * math.pi * i / count),
        )
        for i in range(count)
    ]


def _outline(shape: str, centre: Point, radius: float, turn: float) -> list[Point]:
    """Corners of a polygonal shape inside the circle of `radius` (a square's half side is 0.85 of
    it)."""
    if shape == "square":
        return _regular(centre, radius * 0.85 * math.sqrt(2), 4, turn + math.pi / 4)
    if shape == "triangle":
        # lowered a little, so that the bounding box is centred
        return _regular((centre[0], centre[1] + 0.2 * radius), 1.12 * radius, 3, turn)
    if shape == "star":
        outer = _regular(centre, 1.05 * radius, 5, turn)
        inner = _regular(centre, 0.42 * radius, 5, turn + math.pi / 5)
        return [point for pair in zip(outer, inner, strict=True) for point in pair]
    arm = 0.3 * radius
    corners = [
        (-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm),
        (arm, radius), (-arm, radius), (-arm, arm), (-radius, arm), (-radius, -arm), (-arm, -arm),
    ]  # fmt: skip
    cos, sin = math.cos(turn), math.sin(turn)
    return [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in corners]


def draw_mask(shape: str, centre: Point, radius: float, turn: float = 0.0) -> Image.Image:
    """Coverage of a shape, 0-255, at OVERSAMPLING times the image's size. Coordinates in image
    pixels."""
    k = OVERSAMPLING
    mask = Image.new("L", (SIDE * k, SIDE * k))
    pen = ImageDraw.Draw(mask)
    (x, y), r = (centre[0] * k, centre[1] * k), radius * k
    if shape in ("circle", "ring", MOON):
        x += 0.14 * r * (shape == MOON)  # its horns do not reach as far, so the box is centred
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        x, r = (x + 0.45 * r, 0.75 * r) if shape == MOON else (x, 0.58 * r)
        if shape != "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=0)
    else:
        pen.polygon([(a * k, b * k) for a, b in _outline(shape, centre, radius, turn)], fill=255)
    return mask


def draw(scene: Scene) -> np.ndarray:
    """The scene as uint8 RGB, shape (64, 64, 3)."""
    mask = draw_mask(scene.shape, scene.centre, scene.radius).reduce(OVERSAMPLING)
    image = Image.new("RGB", (SIDE, SIDE), COLOURS[scene.background])
    image.paste(COLOURS[scene.colour], (0, 0, SIDE, SIDE), mask)
    return np.asarray(image)


def draw_outline(scene: Scene, width: int = 6) -> np.ndarray:
    """The scene's contour in white on black, uint8 RGB, shape (64, 64, 3): what its ControlNet is
    given. `width` is in pixels of the mask, OVERSAMPLING times the image's."""
    mask = draw_mask(scene.shape, scene.centre, scene.radius)
    # a box of covered points stays white; this is faster than MinFilter
    inner = mask.filter(ImageFilter.BoxBlur(width)).point(lambda value: 255 * (value == 255))
    line = ImageChops.subtract(mask, inner).reduce(OVERSAMPLING)
    return np.asarray(Image.merge("RGB", (line,) * 3))


def draw_clutter(rng: np.random.Generator) -> np.ndarray:
    """An image beyond the grammar (any colours, turned and overlapping shapes, gradients), uint8
    (64, 64, 3).

    The autoencoder sees these too, so that it also encodes images that people bring.
    """
    ends = rng.integers(0, 256, (2, 3)).astype(np.float32)
    if rng.random() < 0.5:
        ends[1] = ends[0]
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    ground = np.broadcast_to(ends[0] * (1 - ramp) + ends[1] * ramp, (SIDE, SIDE, 3))
    if rng.random() < 0.5:
        ground = ground.transpose(1, 0, 2)
    image = Image.fromarray(ground.astype(np.uint8))
    for _ in range(rng.integers(1, 5)):
        centre = (float(rng.uniform(4, 60)), float(rng.uniform(4, 60)))
        mask = draw_mask(
            str(rng.choice(SHAPES)), centre, float(rng.uniform(4, 26)), float(rng.uniform(0, 6.3))
        )
        colour = (int(rng.integers(256)), int(rng.integers(256)), int(rng.integers(256)))
        image.paste(colour, (0, 0, SIDE, SIDE), mask.reduce(OVERSAMPLING))
    return np.asarray(image)
