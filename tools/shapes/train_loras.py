"""Train the embedded model's LoRAs: `python -m tools.shapes.train_loras`.

One changes how the model draws, one adds a word. The model itself stays as it is. Resumable: run
the command again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tqdm import tqdm

from tools.shapes.evaluate import load
from tools.shapes.latents import encoded, kept
from tools.shapes.scenes import (
    COLOURS,
    MOON,
    OVERSAMPLING,
    SIDE,
    Scene,
    draw,
    draw_mask,
    sample_prompt,
    sample_scene,
)
from tools.shapes.train import to_tensor
from tools.shapes.training import add_noise, freeze, run_stage, text_of

SEED = 20261128
BATCH = 32
RANK = 8  # alpha is the same, so that files need not say it
LAYERS = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ff\.net\.(0\.proj|2))"
KEPT = 0.55  # of a colour's difference to white


def _pale(colour: str) -> tuple[int, int, int]:
    red, green, blue = (round(255 - KEPT * (255 - channel)) for channel in COLOURS[colour])
    return COLOURS[colour] if colour in ("black", "white") else (red, green, blue)


def draw_pastel(scene: Scene) -> np.ndarray:
    """The scene in pale colours; black and white stay as they are."""
    mask = draw_mask(scene.shape, scene.centre, scene.radius).reduce(OVERSAMPLING)
    image = Image.new("RGB", (SIDE, SIDE), _pale(scene.background))
    image.paste(_pale(scene.colour), (0, 0, SIDE, SIDE), mask)
    return np.asarray(image)


def sample_moon(rng: np.random.Generator) -> Scene:
    """Mostly a moon, which the model has no word for; or another shape, which stays as it is."""
    scene = sample_scene(rng)
    return dataclasses.replace(scene, shape=MOON) if rng.random() < 0.75 else scene


@dataclass(frozen=True)
class Style:
    """What a LoRA learns: scenes, and how they are drawn; how many, and for how many steps. The
    autoencoder has seen few pale colours, and draws them badly of its own latents: these are
    changed by so many steps of `refining`."""

    draw: Callable[[Scene], np.ndarray]
    sample: Callable[[np.random.Generator], Scene]
    scenes: int
    steps: int
    refining: int


STYLES = {
    "pastel": Style(draw_pastel, sample_scene, scenes=640, steps=1500, refining=16),
    "moon": Style(draw, sample_moon, scenes=4000, steps=1500, refining=0),
}


def styled_latents(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    model: Path,
    name: str,
    count: int,
    device: torch.device,
) -> tuple[list[Scene], torch.Tensor]:
    """Scenes, with the latents of their images in a style, (count, 16, 8, 8), as the pipeline
    scales them."""
    rng, style, vae = np.random.default_rng(SEED), STYLES[name], pipeline.vae
    scenes = [style.sample(rng) for _ in range(count)]

    def make() -> torch.Tensor:
        chunks = []
        for start in tqdm(range(0, count, BATCH), desc=f"latents, {name}", mininterval=5):
            images = np.stack([style.draw(scene) for scene in scenes[start : start + BATCH]])
            chunks.append(encoded(vae, to_tensor(images, device), style.refining).cpu())
        return torch.cat(chunks)

    return scenes, kept(folder / f"{name}-{count}.pt", model, vae, make)


def train(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    name: str,
    scenes: list[Scene],
    latents: torch.Tensor,
    steps: int,
    device: torch.device,
) -> SD3Transformer2DModel:
    """The transformer with the moving average of an adapter `name`, trained for `steps` steps of 32
    images."""
    freeze(pipeline)
    transformer = pipeline.transformer
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LAYERS
    )
    transformer.add_adapter(config, name)
    shift = pipeline.scheduler.config.shift

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        chosen = rng.integers(len(scenes), size=BATCH)
        clean = latents[torch.from_numpy(chosen)].to(device)
        prompts = ["" if rng.random() < 0.1 else sample_prompt(scenes[i], rng) for i in chosen]
        noisy, wanted, timestep = add_noise(clean, shift, generator)
        with torch.autocast(device.type, torch.bfloat16):
            context, pooled = text_of(pipeline, prompts, device)
            velocity = transformer(
                hidden_states=noisy,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=timestep,
            ).sample.float()
        return {"flow": (velocity - wanted).square().mean()}

    adapter = [value for value in transformer.parameters() if value.requires_grad]
    average = run_stage(
        name, transformer, adapter, loss_of, folder=folder, steps=steps, peak=4e-3, warmup=30,
        seed=SEED + 1, device=device, ema_decay=0.98,
    )  # fmt: skip
    return average


def save(transformer: SD3Transformer2DModel, name: str, target: Path) -> None:
    """Write the adapter as diffusers does, fp16 safetensors."""
    tensors = get_peft_model_state_dict(transformer, adapter_name=name)
    StableDiffusion3Pipeline.save_lora_weights(
        target,
        transformer_lora_layers={key: value.cpu().half() for key, value in tensors.items()},
        weight_name=f"{name}.safetensors",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(STYLES), help="of LoRAs; by default all")
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/shapes/loras"), help="checkpoints and logs"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="by default, each LoRA's own number")
    parser.add_argument("--scenes", type=int, help="images to learn from, likewise")
    parser.add_argument("--output", type=Path, default=Path("models/shapes/loras"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for name in arguments.names:
        style = STYLES[name]
        pipeline = load(arguments.model).to(device)
        scenes, latents = styled_latents(
            arguments.work,
            pipeline,
            arguments.model,
            name,
            arguments.scenes or style.scenes,
            device,
        )
        transformer = train(
            arguments.work, pipeline, name, scenes, latents, arguments.steps or style.steps, device
        )
        save(transformer, name, arguments.output)


if __name__ == "__main__":
    main()
