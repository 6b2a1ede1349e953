"""Train the embedded model from nothing: `python -m tools.shapes.train`.

Four stages, each resumable (run the command again): the autoencoder; the latents of a fixed set of
images; the transformer with its text encoders, by rectified flow on those latents; and the
decoder once more on slightly wrong latents, since it will be given the transformer's, not the
encoder's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import nn
from tqdm import tqdm

from tools.shapes.networks import make_autoencoder, make_pipeline
from tools.shapes.scenes import Scene, draw, draw_clutter, sample_prompt, sample_scene
from tools.shapes.training import add_noise, run_stage

SEED = 20261121
IMAGE_BATCH = 32
TRANSFORMER_BATCH = 64


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) to float (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def image_batch(
    rng: np.random.Generator, count: int, device: torch.device, clutter: float = 0.3
) -> torch.Tensor:
    """Fresh images, (count, 3, 64, 64) in [-1, 1]; the given share is beyond the grammar."""
    images = [
        draw_clutter(rng) if rng.random() < clutter else draw(sample_scene(rng))
        for _ in range(count)
    ]
    return to_tensor(np.stack(images), device)


def image_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1, five times as heavy on edges, plus the L1 of both gradients: plain L1 leaves small shapes
    blurred."""
    loss = torch.zeros((), device=target.device)
    weight = torch.ones_like(target[:, :1])
    for axis in (2, 3):
        slope = target.diff(dim=axis)
        loss = loss + (output.diff(dim=axis) - slope).abs().mean()
        edge = slope.abs().amax(1, keepdim=True).clamp(max=1)
        after, before = ((0, 0, 1, 0), (0, 0, 0, 1)) if axis == 2 else ((1, 0, 0, 0), (0, 1, 0, 0))
        weight = torch.maximum(
            weight, 1 + 4 * torch.maximum(F.pad(edge, after), F.pad(edge, before))
        )
    return loss + ((output - target).abs() * weight).mean()


def train_autoencoder(folder: Path, steps: int, batch: int, device: torch.device) -> AutoencoderKL:
    """Stage 1. The latent is made noisy a little beyond its own posterior, so that the decoder
    tolerates errors."""
    torch.manual_seed(SEED)
    vae = make_autoencoder().to(device)

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        images = image_batch(rng, batch, device)
        with torch.autocast(device.type, torch.bfloat16):
            mean, logvar = vae.encoder(images).float().chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=generator, device=device)
            spread = (0.5 * logvar).exp() + 0.05 * mean.detach().std()
            output = vae.decoder(mean + spread * noise).float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"image": image_loss(output, images), "divergence": 3e-4 * divergence}

    return run_stage(
        "autoencoder", vae, vae.parameters(), loss_of,
        folder=folder, steps=steps, peak=1.5e-3, seed=SEED + 1, device=device,
    )  # fmt: skip


def scene_latents(
    folder: Path, vae: AutoencoderKL, count: int, device: torch.device
) -> tuple[list[Scene], torch.Tensor]:
    """Stage 2. A fixed set of scenes and their latents, normalised by the mean and deviation put
    into the VAE's config."""
    rng = np.random.default_rng(SEED + 2)
    scenes = [sample_scene(rng) for _ in range(count)]
    cache = folder / f"latents-{count}.pt"
    if not cache.exists() or cache.stat().st_mtime < (folder / "autoencoder.pt").stat().st_mtime:
        vae.eval()
        chunks = []
        with torch.no_grad():
            for start in tqdm(range(0, count, 250), desc="latents"):
                images = np.stack([draw(scene) for scene in scenes[start : start + 250]])
                chunks.append(vae.encode(to_tensor(images, device)).latent_dist.mode().half().cpu())
        torch.save(torch.cat(chunks), cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    latents = torch.load(cache, weights_only=True).float()
    shift, scale = float(latents.mean()), 1 / float(latents.std())
    vae.register_to_config(shift_factor=round(shift, 6), scaling_factor=round(scale, 6))
    return scenes, (latents - vae.config.shift_factor) * vae.config.scaling_factor


def train_transformer(
    folder: Path,
    vae: AutoencoderKL,
    scenes: list[Scene],
    latents: torch.Tensor,
    steps: int,
    device: torch.device,
) -> StableDiffusion3Pipeline:
    """Stage 3. Rectified flow, with logit-normal times shifted by 3."""
    pipeline = make_pipeline(vae, SEED + 3).to(device)
    names = ("transformer", "text_encoder", "text_encoder_2")
    network = nn.ModuleDict({name: getattr(pipeline, name) for name in names}).train()
    shift = pipeline.scheduler.config.shift

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        chosen = rng.integers(len(scenes), size=TRANSFORMER_BATCH)
        clean = latents[torch.from_numpy(chosen)].to(device)
        prompts = ["" if rng.random() < 0.1 else sample_prompt(scenes[i], rng) for i in chosen]
        # SD3 appends this many empty T5 tokens: nearly always the preset's one, sometimes what
        # other callers ask for
        empty = int(rng.choice([1, 16, 64, 256], p=[0.88, 0.08, 0.03, 0.01]))
        noisy, wanted, timestep = add_noise(clean, shift, generator)
        with torch.autocast(device.type, torch.bfloat16):
            context, _, pooled, _ = pipeline.encode_prompt(
                prompts,
                prompts,
                prompts,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=empty,
            )
            velocity = pipeline.transformer(
                hidden_states=noisy,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=timestep,
            ).sample.float()
        return {"flow": (velocity - wanted).square().mean()}

    average = run_stage(
        "transformer", network, network.parameters(), loss_of,
        folder=folder, steps=steps, peak=1e-3, seed=SEED + 4, device=device,
    )  # fmt: skip
    network.load_state_dict(average.state_dict())
    network.eval()
    return pipeline


def train_decoder(
    folder: Path, vae: AutoencoderKL, steps: int, batch: int, device: torch.device
) -> None:
    """Stage 4. The decoder alone, in full precision, on latents that are wrong by up to a quarter
    of their deviation."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    deviation = 1 / vae.config.scaling_factor

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        images = image_batch(rng, batch, device, clutter=0.1)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=generator, device=device)
        amount = 0.25 * deviation * torch.rand(batch, 1, 1, 1, generator=generator, device=device)
        return {"image": image_loss(vae.decoder(latents + amount * noise), images)}

    average = run_stage(
        "decoder", vae.decoder, vae.decoder.parameters(), loss_of,
        folder=folder, steps=steps, peak=5e-4, seed=SEED + 5, device=device,
    )  # fmt: skip
    vae.decoder.load_state_dict(average.state_dict())


def export(pipeline: StableDiffusion3Pipeline, target: Path) -> None:
    """Write the pipeline in the standard layout, fp16 safetensors."""
    pipeline.to("cpu", torch.float16)
    pipeline.save_pretrained(target)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads in the config's dtype where none is asked for, diffusers in float32:
        # name float32 for both
        path = target / name / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/shapes"), help="checkpoints and logs"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=5000)
    parser.add_argument("--transformer-steps", type=int, default=4500)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument(
        "--scenes", type=int, default=50_000, help="images whose latents the transformer learns"
    )
    parser.add_argument("--output", type=Path, default=Path("models/shapes"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    vae = train_autoencoder(arguments.work, arguments.autoencoder_steps, IMAGE_BATCH, device)
    scenes, latents = scene_latents(arguments.work, vae, arguments.scenes, device)
    pipeline = train_transformer(
        arguments.work, vae, scenes, latents, arguments.transformer_steps, device
    )
    train_decoder(arguments.work, vae, arguments.decoder_steps, IMAGE_BATCH, device)
    export(pipeline, arguments.output)


if __name__ == "__main__":
    main()
