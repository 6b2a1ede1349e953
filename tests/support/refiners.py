"""Directories of a tiny Stable Diffusion XL and of its refiner, as published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.pipelines.parts import XL_BLOCKS, diffusion_xl, unet
from tests.support.tiny import WIDTH

# one text encoder, and an aesthetic score instead of the size that the image should have
REFINER_BLOCKS: dict[str, Any] = {
    "cross_attention_dim": WIDTH,
    "projection_class_embeddings_input_dim": 5 * 8 + WIDTH,
}


def save_xl(folder: Path) -> Any:
    """Write the model to a directory; returns it."""
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionXLPipeline(**diffusion_xl(), add_watermarker=False)
    pipeline.save_pretrained(folder)
    return pipeline


def save_refiner(base: Any, folder: Path, *, seed: int = 2, **parts: Any) -> None:
    """Write a refiner for a model to a directory, with `parts` that are not the model's."""
    torch.manual_seed(seed)
    names = ("vae", "text_encoder_2", "tokenizer_2", "scheduler")
    shared = {name: getattr(base, name) for name in names}
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{
            **shared,
            "unet": unet(**XL_BLOCKS | REFINER_BLOCKS),
            "text_encoder": None,
            "tokenizer": None,
            **parts,
        },
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
