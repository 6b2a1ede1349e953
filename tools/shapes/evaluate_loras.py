"""Judge the embedded model's LoRAs: `python -m tools.shapes.evaluate_loras`.

Draws prompts of the grammar at random (fixed seeds), makes the images with the plain diffusers
pipeline, without and with each LoRA, and has the checker look at them. Prints the
table and, with `--card`, writes it and an image into the model card.
"""

from __future__ import annotations

import argparse
import random
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw

from tools.shapes import evaluate
from tools.shapes.checker import SHAPE_WORDS, wrong_parts

SECTION = "evaluation of the LoRAs"


@dataclass(frozen=True)
class Judged:
    """How images of a LoRA are judged: the checker's style (see `checker.look`), and the word that
    takes the place of the shapes in prompts."""

    style: str = ""
    shape: str = ""

    def prompts(self, prompts: list[str]) -> list[str]:
        words = "|".join(SHAPE_WORDS)
        return [re.sub(words, self.shape, text) for text in prompts] if self.shape else prompts


LORAS = {"pastel": Judged(style="pastel"), "moon": Judged(shape="moon")}
# What the sheet shows: prompts in rows, and LoRAs with their scales in columns.
SHOWN = (
    "a large yellow moon on a blue background",
    "a large red star on a blue background",
    "a small green moon on a white background, top right",
)
COLUMNS: tuple[dict[str, float], ...] = (
    {},
    {"pastel": 1.0},
    {"moon": 1.0},
    {"pastel": 1.0, "moon": 1.0},
    {"pastel": 0.5, "moon": 1.0},
)
SEED = 7


def load(directory: Path, names: Iterable[str] = LORAS) -> StableDiffusion3Pipeline:
    """The model with its LoRAs, none of which is in use."""
    pipeline = evaluate.load(directory)
    with warnings.catch_warnings(action="ignore"):  # PEFT's, about several adapters
        for name in names:
            pipeline.load_lora_weights(
                directory / "loras", weight_name=f"{name}.safetensors", adapter_name=name
            )
    use(pipeline, {})
    return pipeline


def use(pipeline: StableDiffusion3Pipeline, loras: Mapping[str, float]) -> None:
    """Have the pipeline use LoRAs, each with its scale, and no others."""
    if loras:
        pipeline.enable_lora()
        pipeline.set_adapters(list(loras), list(loras.values()))
    else:
        pipeline.disable_lora()


def score(images: list[Image.Image], prompts: list[str], style: str) -> dict[str, float]:
    """Share of images right in each part in a style, and in the whole prompt; in percent."""
    wrong = [
        wrong_parts(image, prompt, style) for image, prompt in zip(images, prompts, strict=True)
    ]
    shares = {part: 100 * sum(part not in w for w in wrong) / len(wrong) for part in evaluate.PARTS}
    return {**shares, "whole": 100 * sum(not w for w in wrong) / len(wrong)}


def contact_sheet(pipeline: StableDiffusion3Pipeline) -> Image.Image:
    """The same prompts and seeds without a LoRA, with each, and with both; at twice their size."""
    side, gap, caption = 128, 8, 18
    width = len(COLUMNS) * (side + gap) + gap
    sheet = Image.new("RGB", (width, caption + gap + len(SHOWN) * (side + gap)), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for column, loras in enumerate(COLUMNS):
        x = gap + column * (side + gap)
        named = [f"{name} {scale:g}" for name, scale in loras.items()]
        pen.text((x, 6), ", ".join(named) or "no LoRA", fill=(0, 0, 0), font_size=12)
        use(pipeline, loras)
        images = evaluate.generate(pipeline, list(SHOWN), first_seed=SEED)
        for row, image in enumerate(images):
            large = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (x, caption + gap + row * (side + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=17, help="of the prompts; image i has seed i")
    parser.add_argument(
        "--card", action="store_true", help="write table and image into the model's directory"
    )
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    prompts = [evaluate.random_prompt(rng) for _ in range(arguments.prompts)]
    pipeline = load(arguments.model)
    heads = ("LoRA", "prompts", "judged as", *evaluate.PARTS, "whole prompt")
    rows = [f"| {' | '.join(heads)} |", "| --- | --- | --- |" + " ---: |" * (len(heads) - 3)]

    def judge(loras: Mapping[str, float], judged: Judged) -> None:
        use(pipeline, loras)
        asked = judged.prompts(prompts)
        shares = score(evaluate.generate(pipeline, asked), asked, judged.style)
        named = " and ".join(f"`{name}`" for name in loras) or "none"
        first = f"| {named} | {judged.shape or 'all shapes'} | {judged.style or 'plain'} | "
        rows.append(first + " | ".join(f"{share:.1f}" for share in shares.values()) + " |")

    judge({}, Judged())
    for name, judged in LORAS.items():
        judge({name: 1.0}, judged)
        judge({}, judged)
    judge({"moon": 1.0}, Judged())
    judge({"pastel": 1.0, "moon": 1.0}, Judged("pastel", "moon"))
    text = "\n".join(
        [
            f"{len(prompts)} random prompts, {evaluate.STEPS} steps, guidance "
            f"{evaluate.GUIDANCE:g}, scale 1; percentage of images that are correct:",
            "",
            *rows,
        ]
    )
    print(text)
    if arguments.card:
        contact_sheet(pipeline).save(arguments.model / "loras.png", optimize=True)
        evaluate.write_section(arguments.model / "README.md", SECTION, text)


if __name__ == "__main__":
    main()
