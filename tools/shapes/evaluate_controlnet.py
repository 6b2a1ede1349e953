"""Judge the embedded model's ControlNet: `python -m tools.shapes.evaluate_controlnet`.

Draws outlines at random (fixed seeds) and has images made with the plain diffusers pipelines, with
and without the outline, of prompts that name colours alone. The checker says whether the outline
is obeyed: its shape, where it is and how large. Prints the table and, with `--card`, writes it and
an image into the model card.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image

from tools.shapes import evaluate
from tools.shapes.checker import Box, look
from tools.shapes.scenes import Scene, colours_prompt, draw, draw_outline, sample_free_scene

SECTION = "evaluation of the ControlNet"
SEED = 11
OVERLAP = 0.7  # least intersection over union of two boxes that agree
SHOWN = 8
# what the documentation sends
EXAMPLE = Scene("", "yellow", "star", "purple", "", "", (20.0, 20.0), 16.0)


@dataclass(frozen=True)
class Obeyed:
    """Percent of images whose shape is the outline's; whose shape is where it is and as large;
    both; and both with the colours of the prompt."""

    shape: float
    place: float
    both: float
    whole: float


def with_controlnet(pipeline: StableDiffusion3Pipeline, folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline with the ControlNet of a directory."""
    controlnet = SD3ControlNetModel.from_pretrained(folder)
    guided = StableDiffusion3ControlNetPipeline(**pipeline.components, controlnet=controlnet)
    guided.set_progress_bar_config(disable=True)
    return guided


def sample(count: int, seed: int = SEED) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_free_scene(rng) for _ in range(count)]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def generate(
    pipeline: StableDiffusion3Pipeline, scenes: list[Scene], *, controlled: bool
) -> list[Image.Image]:
    """One image per scene, of its colours; image i has seed i."""
    prompts = [colours_prompt(scene) for scene in scenes]
    outlines = [Image.fromarray(draw_outline(scene)) for scene in scenes] if controlled else None
    return evaluate.generate(pipeline, prompts, control=outlines)


def score(images: list[Image.Image], scenes: list[Scene]) -> Obeyed:
    verdicts = []
    for image, scene in zip(images, scenes, strict=True):
        seen, wanted = look(image), look(Image.fromarray(draw(scene)))
        shape = seen.shape == scene.shape
        place = overlap(seen.box, wanted.box) >= OVERLAP
        colours = (seen.colour, seen.background) == (scene.colour, scene.background)
        verdicts.append((shape, place, shape and place, shape and place and colours))
    return Obeyed(*(100 * np.array(verdicts).mean(0)).tolist())


def sheet(images: list[list[Image.Image]]) -> Image.Image:
    """Rows of images at twice their size."""
    side, gap = 128, 8
    width, height = (gap + count * (side + gap) for count in (len(images[0]), len(images)))
    paper = Image.new("RGB", (width, height), (225, 225, 225))
    for row, line in enumerate(images):
        for column, image in enumerate(line):
            large = image.resize((side, side), Image.Resampling.NEAREST)
            paper.paste(large, (gap + column * (side + gap), gap + row * (side + gap)))
    return paper


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--outlines", type=int, default=200)
    parser.add_argument(
        "--card", action="store_true", help="write table and image into the model's directory"
    )
    arguments = parser.parse_args()
    scenes = sample(arguments.outlines)
    plain = evaluate.load(arguments.model)
    free = generate(plain, scenes, controlled=False)
    guided = generate(
        with_controlnet(plain, arguments.model / "controlnet"), scenes, controlled=True
    )
    rows = [
        "| ControlNet | shape | place and size | outline obeyed (both) | and colours |",
        "| --- |" + " ---: |" * 4,
    ]
    for name, images in (("none", free), ("`outlines`", guided)):
        found = score(images, scenes)
        shares = (found.shape, found.place, found.both, found.whole)
        rows.append(f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |")
    text = "\n".join(
        [
            f"{len(scenes)} random outlines, prompts that name the two colours alone, "
            f"{evaluate.STEPS} steps, guidance {evaluate.GUIDANCE:g}, scale 1; percentage of "
            "images that are correct:",
            "",
            *rows,
        ]
    )
    print(text)
    if arguments.card:
        outlines = [Image.fromarray(draw_outline(scene)) for scene in scenes[:SHOWN]]
        shown = [outlines, guided[:SHOWN], free[:SHOWN]]
        sheet(shown).save(arguments.model / "controlnet.png", optimize=True)
        Image.fromarray(draw_outline(EXAMPLE)).save(arguments.model / "outline.png", optimize=True)
        evaluate.write_section(arguments.model / "README.md", SECTION, text)


if __name__ == "__main__":
    main()
