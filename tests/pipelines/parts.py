"""Parts that several modules of this package build pipelines from, beside those of
`tests.support.tiny`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.support.tiny import DOWN_BLOCKS, NOISE_SCHEDULE, SIDE, WIDTH, autoencoder, clip

SQUARE: dict[str, Any] = {"height": SIDE, "width": SIDE}
NUMBERS: dict[str, Any] = {"output_type": "np"}
STRENGTHS = (0.6, 0.9, 1.0, 0.8, 0.5, 0.7)
# half the size, as the autoencoder's latents
HINTS: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8)}


def strength(number: int) -> float:
    """How much to change an image, different for each call."""
    return STRENGTHS[number]


def parts_of(build: Callable[[], Any]) -> dict[str, Any]:
    """The components of what a builder of `tests.support.tiny` or of this package makes, before the
    networks are enlivened."""
    return dict(build.__wrapped__().components)  # type: ignore[attr-defined]


@torch.no_grad()
def certain(parts: dict[str, Any]) -> dict[str, Any]:
    """The parts, with an autoencoder that encodes without chance: for pipelines that draw it
    without their generator."""
    vae = parts["vae"]
    layer = getattr(vae, "quant_conv", None) or vae.encoder.conv_out
    half = layer.out_channels // 2
    layer.weight[half:] = 0.0
    layer.bias[half:] = -30.0  # the logarithm of the variance
    return parts


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """The model with an effect: ControlNets begin with zeros in their last layers."""
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * 0.05)
    return model


@torch.no_grad()
def calm(layer: nn.Module, share: float = 0.1) -> None:
    """Make a last layer's results so small that what becomes of them stays within bounds: clamped,
    all errors look alike."""
    for parameter in layer.parameters():
        parameter.mul_(share)


def vision(side: int = SIDE) -> nn.Module:
    """A CLIP image encoder of two layers that sees two by two patches."""
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, image_size=side, patch_size=side // 2,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection(config)


def features() -> Any:
    """The image processor of `vision`."""
    return transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)


UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    """Any part of it may be changed."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": SIDE // 2,
            "up_block_types": UP_BLOCKS,
            "cross_attention_dim": WIDTH,
            **DOWN_BLOCKS,
        }
        | config
    )


def diffusion(**config: Any) -> dict[str, Any]:
    """Stable Diffusion 1.5 with changes to its UNet."""
    return {
        "unet": unet(**config),
        "scheduler": diffusers.DDIMScheduler(
            **NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False
        ),
        "vae": autoencoder(),
        **clip(projection=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


XL_BLOCKS: dict[str, Any] = {
    "cross_attention_dim": 2 * WIDTH,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}


def diffusion_xl(**config: Any) -> dict[str, Any]:
    """Stable Diffusion XL with changes to its UNet."""
    return {
        "unet": unet(**XL_BLOCKS | config),
        "scheduler": diffusers.EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading"),
        "vae": autoencoder(),
        **clip(projection=False),
        **clip("_2"),
    }


def controlnet(**config: Any) -> diffusers.ControlNetModel:
    return diffusers.ControlNetModel(
        **DOWN_BLOCKS, **HINTS, **{"cross_attention_dim": WIDTH} | config
    )


def unclip_prior() -> dict[str, Any]:
    """What makes the embedding of an image of the embedding of a prompt."""
    network = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=WIDTH,
        num_embeddings=16,
        num_layers=1,
    )
    torch.nn.init.ones_(network.clip_std)
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        num_train_timesteps=1000,
        clip_sample=True,
        clip_sample_range=5.0,
    )
    return {"prior": network, "scheduler": scheduler}
