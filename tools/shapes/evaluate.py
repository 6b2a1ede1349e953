"""Judge the embedded model: `python -m tools.shapes.evaluate`.

Draws prompts of the grammar at random (fixed seeds), makes the images with the plain diffusers
pipeline and has the checker look at them. Prints the tables and, with `--card`, writes them, the
contact sheet and the curve into the model card.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from tqdm import tqdm

from tools.shapes.checker import COLOUR_WORDS, SHAPE_WORDS, look, wrong_parts

PARTS = ("colour", "background", "shape", "size", "horizontal", "vertical")
STEPS, GUIDANCE = 20, 2.0
POSITIONS = (
    "",
    "left",
    "right",
    "top",
    "bottom",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
)


def random_prompt(rng: random.Random) -> str:
    """One prompt of the grammar; about a third carry position words."""
    colour, background = rng.sample(COLOUR_WORDS, 2)
    article = "an" if background == "orange" else "a"
    text = (
        f"a {rng.choice(('small', 'large'))} {colour} {rng.choice(SHAPE_WORDS)} on {article} "
        f"{background} background"
    )
    position = rng.choice(POSITIONS[1:]) if rng.random() < 0.35 else ""
    return f"{text}, {position}" if position else text


def partial_prompt(rng: random.Random) -> str:
    """A prompt with parts missing, as people type them: "red star", "a small ring on a blue
    background", "circle"."""
    colour, background = rng.sample(COLOUR_WORDS, 2)
    shape = rng.choice(SHAPE_WORDS)
    return rng.choice(
        (
            f"{colour} {shape}",
            f"{shape} on {background}",
            f"a {rng.choice(('small', 'large'))} {shape}",
            f"{colour} {shape}, {background} background",
            shape,
        )
    )


def load(directory: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        directory, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    *,
    guidance: float = GUIDANCE,
    negative: list[str] | None = None,
    side: int = 64,
    batch: int = 20,
    first_seed: int = 0,
    control: list[Image.Image] | None = None,
) -> list[Image.Image]:
    """One image per prompt; image i has seed `first_seed` + i. `control`: an image each, for a
    pipeline with a ControlNet."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), desc=f"guidance {guidance:g}"):
        chunk = prompts[start : start + batch]
        images += pipeline(
            chunk,
            negative_prompt=negative[start : start + batch] if negative else None,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            height=side,
            width=side,
            max_sequence_length=1,
            generator=[
                torch.Generator().manual_seed(first_seed + start + i) for i in range(len(chunk))
            ],
            **({"control_image": control[start : start + batch]} if control else {}),
        ).images
    return images


def score(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Share of images right in each part, in colour and background together, and in the whole
    prompt; in percent."""
    wrong = [wrong_parts(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    shares = {part: 100 * sum(part not in w for w in wrong) / len(wrong) for part in PARTS}
    shares["colours"] = (
        100 * sum("colour" not in w and "background" not in w for w in wrong) / len(wrong)
    )
    shares["whole"] = 100 * sum(not w for w in wrong) / len(wrong)
    return shares


def negative_prompts(pipeline: StableDiffusion3Pipeline, each: int = 16) -> tuple[float, float]:
    """Percent of images of "a large circle" whose background has a given colour: asked nothing,
    and asked not to."""
    colours = [colour for colour in COLOUR_WORDS for _ in range(each)]
    prompts = ["a large circle"] * len(colours)
    shares = []
    for negative in (None, [f"a large circle on a {colour} background" for colour in colours]):
        images = generate(pipeline, prompts, negative=negative)
        hits = sum(
            look(image).background == colour for image, colour in zip(images, colours, strict=True)
        )
        shares.append(100 * hits / len(colours))
    return shares[0], shares[1]


def contact_sheet(images: list[Image.Image], prompts: list[str], columns: int = 8) -> Image.Image:
    """The images at twice their size, each with its prompt below; wrong ones are framed."""
    cell, caption = 144, 36
    sheet = Image.new(
        "RGB", (columns * cell, -(-len(images) // columns) * (cell + caption)), (225, 225, 225)
    )
    pen = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * cell, i // columns * (cell + caption)
        if wrong_parts(image, prompt):
            pen.rectangle((x + 4, y + 4, x + cell - 5, y + cell - 5), fill=(255, 0, 80))
        sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), (x + 8, y + 8))
        line = (
            prompt.removeprefix("a ")
            .replace(" on a", "\non a")
            .replace(" background", "")
            .replace(",", "\n")
        )
        pen.multiline_text((x + 8, y + cell - 6), line, fill=(0, 0, 0), font_size=10, spacing=1)
    return sheet


def curve(logs: Path, target: Path) -> None:
    """The losses of the three trained stages over their steps, as one image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, (stage, loss) in zip(
        axes,
        (("autoencoder", "image"), ("transformer", "flow"), ("decoder", "image")),
        strict=True,
    ):
        lines = [json.loads(line) for line in (logs / f"{stage}.jsonl").read_text().splitlines()]
        axis.plot([line["step"] for line in lines], [line[loss] for line in lines])
        axis.set(
            title=f"{stage}: {lines[-1]['seconds'] / 60:.0f} min",
            xlabel="step",
            ylabel=f"{loss} loss",
            yscale="log",
        )
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=80)


def write_section(card: Path, name: str, text: str) -> None:
    """Write a text between the markers `<!-- NAME -->` and `<!-- end -->` of a card. Exits if they
    are missing."""
    begin = f"<!-- {name} -->\n"
    before, _, rest = card.read_text().partition(begin)
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise SystemExit(f"{card} lacks the markers <!-- {name} --> and <!-- end -->")
    card.write_text(f"{before}{begin}{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7, help="of the prompts; image i has seed i")
    parser.add_argument(
        "--logs", type=Path, default=Path("build/shapes"), help="where training left its logs"
    )
    parser.add_argument(
        "--card", action="store_true", help="write tables and images into the model's directory"
    )
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    prompts = [random_prompt(rng) for _ in range(arguments.prompts)]
    pipeline = load(arguments.model)

    heads = ("guidance", *PARTS, "both colours", "whole prompt")
    rows = [f"| {' | '.join(heads)} |", "|" + " ---: |" * len(heads)]
    sheet = None
    for guidance in (1.0, GUIDANCE, 3.0, 5.0):
        images = generate(pipeline, prompts, guidance=guidance)
        if guidance == GUIDANCE:
            sheet = contact_sheet(images[:48], prompts[:48])
        shares = score(images, prompts)
        rows.append(
            f"| {guidance:g} | " + " | ".join(f"{share:.1f}" for share in shares.values()) + " |"
        )
    rng = random.Random(arguments.seed)
    partial = [partial_prompt(rng) for _ in range(arguments.prompts // 4)]
    tolerated = score(generate(pipeline, partial), partial)["whole"]
    without, with_negative = negative_prompts(pipeline)
    generate(pipeline, prompts[:1])
    began = time.perf_counter()
    for i in range(5):
        generate(pipeline, prompts[i : i + 1])
    seconds = (time.perf_counter() - began) / 5
    text = "\n".join(
        [
            f"{len(prompts)} random prompts, {STEPS} steps; percentage of images that are correct:",
            "",
            *rows,
            "",
            (
                f"Prompts that leave out parts ({len(partial)}): {tolerated:.1f} % of the images "
                "are correct in all parts that the prompt has."
            ),
            "",
            f'Negative prompt: {without:.1f} % of the images of "a large circle" have a background '
            "of a given colour. If the negative prompt names that background, "
            f"{with_negative:.1f} % do.",
            "",
            (
                f"One image, {STEPS} steps with guidance: {seconds:.2f} s on "
                f"{torch.get_num_threads()} CPU threads."
            ),
        ]
    )
    print(text)
    if arguments.card:
        assert sheet is not None
        sheet.save(arguments.model / "contact-sheet.png", optimize=True)
        curve(arguments.logs, arguments.model / "training-curve.png")
        write_section(arguments.model / "README.md", "evaluation", text)


if __name__ == "__main__":
    main()
