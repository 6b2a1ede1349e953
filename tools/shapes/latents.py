"""Latents of training images, kept between runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tools.shapes.train import image_loss

REFINING_RATE = 0.12  # size of the first step that refines latents


def encoded(vae: AutoencoderKL, images: torch.Tensor, steps: int = 0) -> torch.Tensor:
    """Latents of images (n, 3, 64, 64), changed by `steps` towards those that the decoder draws the
    images from."""
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
    latents.requires_grad_(True)
    optimizer = torch.optim.Adam([latents])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = REFINING_RATE * (1 - step / steps)
        with torch.autocast(images.device.type, torch.bfloat16):
            output = vae.decode(latents).sample.float()
        optimizer.zero_grad()
        image_loss(output, images).backward()
        optimizer.step()
    return latents.detach()


def kept(
    cache: Path, model: Path, vae: AutoencoderKL, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What `make` gives, as the pipeline scales latents. It is kept in a file, and made again if
    the model's autoencoder is newer."""
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    if not cache.exists() or cache.stat().st_mtime < weights.stat().st_mtime:
        cache.parent.mkdir(parents=True, exist_ok=True)
        vae.requires_grad_(False)
        partial = cache.with_suffix(".partial")
        torch.save(make().half(), partial)
        partial.replace(cache)
    latents: torch.Tensor = torch.load(cache, weights_only=True).float()
    scaled: torch.Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled
