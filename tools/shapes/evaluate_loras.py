"""Judge the embedded model's LoRAs: `python -m tools.shapes.evaluate_loras`.

Draws prompts of the grammar at random (fixed seeds), makes the images with the plain diffusers
pipeline, without and with each LoRA, and has the checker look at them. Prints the
table and, with `--card`, writes it and an image into the model card.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw

from tools.shapes import evaluate
from tools.shapes.checker import wrong_parts

SECTION = "evaluation of the LoRAs"
STYLES = ("pastel",)  # the names of the LoRAs and of the checker's styles
# What the sheet shows: prompts in rows, and scales of each LoRA in columns.
SHOWN = (
    "a large red star on a blue background",
    "a large green circle on a yellow background",
    "a small white triangle on a purple background, top right",
)
SCALES = (0.5, 1.0)
SEED = 7


def load(directory: Path, names: tuple[str, ...] = STYLES) -> StableDiffusion3Pipeline:
    """The model with its LoRAs, none of which is in use."""
    pipeline = evaluate.load(directory)
    for name in names:
        pipeline.load_lora_weights(
            directory / "loras", weight_name=f"{name}.safetensors", adapter_name=name
        )
    use(pipeline)
    return pipeline


def use(pipeline: StableDiffusion3Pipeline, *names: str, scale: float = 1.0) -> None:
    """Have the pipeline use LoRAs, and no others."""
    if names:
        pipeline.enable_lora()
        pipeline.set_adapters(list(names), [scale] * len(names))
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
    """The same prompts and seeds without a LoRA, and with each at other scales; at twice their
    size."""
    side, gap, caption = 128, 8, 18
    columns = [("no LoRA", "", 0.0)]
    columns += [(f"{name}, scale {scale:g}", name, scale) for name in STYLES for scale in SCALES]
    width = len(columns) * (side + gap) + gap
    sheet = Image.new("RGB", (width, caption + gap + len(SHOWN) * (side + gap)), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for column, (title, name, scale) in enumerate(columns):
        x = gap + column * (side + gap)
        pen.text((x, 6), title, fill=(0, 0, 0), font_size=12)
        use(pipeline, *filter(None, (name,)), scale=scale)
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
    parser.add_argument("--seed", type=int, default=7, help="of the prompts; image i has seed i")
    parser.add_argument(
        "--card", action="store_true", help="write table and image into the model's directory"
    )
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    prompts = [evaluate.random_prompt(rng) for _ in range(arguments.prompts)]
    pipeline = load(arguments.model)
    plain = evaluate.generate(pipeline, prompts)

    heads = ("LoRA", "judged as", *evaluate.PARTS, "whole prompt")
    rows = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]

    def judge(lora: str, images: list[Image.Image], style: str) -> None:
        shares = " | ".join(f"{share:.1f}" for share in score(images, prompts, style).values())
        rows.append(f"| {lora} | {style or 'plain'} | {shares} |")

    judge("none", plain, "")
    for name in STYLES:
        use(pipeline, name)
        images = evaluate.generate(pipeline, prompts)
        judge(f"`{name}`", images, name)
        judge("none", plain, name)
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
