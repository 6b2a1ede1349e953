"""Train the embedded model's ControlNet: `python -m tools.shapes.train_controlnet`.

It is given the outline of a shape, and has the model draw that shape where the outline is; colours
are those of the prompt. The model itself stays as it is. Resumable: run the command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3Pipeline
from tqdm import tqdm

from tools.shapes.evaluate import load
from tools.shapes.latents import encoded, kept
from tools.shapes.networks import make_controlnet
from tools.shapes.scenes import (
    Scene,
    colours_prompt,
    draw,
    draw_outline,
    sample_free_scene,
    sample_prompt,
    sample_scene,
)
from tools.shapes.train import to_tensor
from tools.shapes.training import add_noise, freeze, run_stage, text_of

SEED = 20261130
BATCH = 48
WIDTHS = (4, 6, 8)  # of outlines, in pixels of their mask
WORDLESS = 0.6  # of the scenes: no words tell where and what they are


def sample_scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(SEED)
    return [
        sample_free_scene(rng) if rng.random() < WORDLESS else sample_scene(rng)
        for _ in range(count)
    ]


def pairs(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    model: Path,
    scenes: list[Scene],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the scenes and of their outlines, each (count, 16, 8, 8)."""
    vae = pipeline.vae

    def make() -> torch.Tensor:
        chunks = []
        for start in tqdm(range(0, len(scenes), 250), desc="latents", mininterval=5):
            some = scenes[start : start + 250]
            lines = [
                draw_outline(scene, WIDTHS[(start + i) % len(WIDTHS)])
                for i, scene in enumerate(some)
            ]
            images = to_tensor(np.stack([*map(draw, some), *lines]), device)
            chunks.append(torch.stack(encoded(vae, images).cpu().chunk(2)))
        return torch.cat(chunks, 1)

    clean, outlines = kept(folder / f"outlines-{len(scenes)}.pt", model, vae, make)
    return clean, outlines


def prompt_of(scene: Scene, rng: np.random.Generator) -> str:
    """Words for a scene, seldom none."""
    if rng.random() < 0.1:
        return ""
    return sample_prompt(scene, rng) if scene.size else colours_prompt(scene)


def train(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    scenes: list[Scene],
    clean: torch.Tensor,
    outlines: torch.Tensor,
    steps: int,
    device: torch.device,
) -> SD3ControlNetModel:
    """Rectified flow as the transformer was trained by, through the transformer, for `steps` steps
    of 48 scenes."""
    freeze(pipeline)
    torch.manual_seed(SEED)
    transformer = pipeline.transformer
    controlnet = make_controlnet(transformer).to(device).train()
    shift = pipeline.scheduler.config.shift

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        chosen = rng.integers(len(scenes), size=BATCH)
        prompts = [prompt_of(scenes[i], rng) for i in chosen]
        rows = torch.from_numpy(chosen)
        noisy, wanted, timestep = add_noise(clean[rows].to(device), shift, generator)
        with torch.autocast(device.type, torch.bfloat16):
            context, pooled = text_of(pipeline, prompts, device)
            guides = controlnet(
                hidden_states=transformer.pos_embed(noisy),
                controlnet_cond=outlines[rows].to(device),
                encoder_hidden_states=None,
                pooled_projections=pooled,
                timestep=timestep,
                return_dict=False,
            )[0]
            velocity = transformer(
                hidden_states=noisy,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=timestep,
                block_controlnet_hidden_states=guides,
            ).sample.float()
        return {"flow": (velocity - wanted).square().mean()}

    return run_stage(
        "controlnet", controlnet, controlnet.parameters(), loss_of,
        folder=folder, steps=steps, peak=1.5e-3, warmup=100, seed=SEED + 1, device=device,
        ema_decay=0.995,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/shapes/controlnet"), help="checkpoints and logs"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--scenes", type=int, default=10_000, help="images to learn from")
    parser.add_argument("--output", type=Path, default=Path("models/shapes/controlnet"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    pipeline = load(arguments.model).to(device)
    scenes = sample_scenes(arguments.scenes)
    clean, outlines = pairs(arguments.work, pipeline, arguments.model, scenes, device)
    controlnet = train(arguments.work, pipeline, scenes, clean, outlines, arguments.steps, device)
    controlnet.to("cpu", torch.float16).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
