"""Stable Diffusion 1.5 and XL in full size with random weights, so that nothing is downloaded.

Their images are noise, but take as long as real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers

from tools.shapes.networks import make_tokenizer

TOKENS = 77
VOCABULARY = 49408

NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

# stable-diffusion-v1-5: unet/config.json without the class's defaults
UNET_1_5: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
# stable-diffusion-xl-base-1.0
UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
AUTOENCODER: dict[str, Any] = {
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    # decode in bfloat16: if calls cast the module to float32, they must take turns
    "force_upcast": False,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}


def stable_diffusion_1_5(device: torch.device, dtype: torch.dtype) -> Any:
    with made_on(device, dtype):
        unet = diffusers.UNet2DConditionModel(**UNET_1_5)
        vae = diffusers.AutoencoderKL(**AUTOENCODER, sample_size=512, scaling_factor=0.18215)
        text_encoder = _clip(transformers.CLIPTextModel, CLIP_L)
    return ready(
        diffusers.StableDiffusionPipeline(
            unet=unet,
            vae=vae,
            scheduler=diffusers.PNDMScheduler(
                **NOISE_SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
            ),
            text_encoder=text_encoder,
            tokenizer=_tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl(device: torch.device, dtype: torch.dtype) -> Any:
    with made_on(device, dtype):
        unet = diffusers.UNet2DConditionModel(**UNET_XL)
        vae = diffusers.AutoencoderKL(**AUTOENCODER, sample_size=1024, scaling_factor=0.13025)
        text_encoder = _clip(transformers.CLIPTextModel, CLIP_L)
        text_encoder_2 = _clip(transformers.CLIPTextModelWithProjection, CLIP_BIG_G)
    return ready(
        diffusers.StableDiffusionXLPipeline(
            unet=unet,
            vae=vae,
            scheduler=diffusers.EulerDiscreteScheduler(
                **NOISE_SCHEDULE, steps_offset=1, timestep_spacing="leading"
            ),
            text_encoder=text_encoder,
            tokenizer=_tokenizer(),
            text_encoder_2=text_encoder_2,
            tokenizer_2=_tokenizer(),
            add_watermarker=False,
        )
    )


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Draw weights on the device and in the data type that they are used with, which is fast and
    makes no float32 copy; they are the same every time."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _clip(kind: type, config: dict[str, Any]) -> Any:
    tokenizer = make_tokenizer()
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return kind(
        transformers.CLIPTextConfig(
            **config, **special, vocab_size=VOCABULARY, max_position_embeddings=TOKENS
        )
    )


def _tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = TOKENS
    return tokenizer


def ready(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
