"""ControlNets, T2I-Adapters and IP-Adapters of Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.pipelines.parts import (
    HINTS,
    NUMBERS,
    SQUARE,
    XL_BLOCKS,
    controlnet,
    diffusion,
    diffusion_xl,
    features,
    strength,
    vision,
)
from tests.pipelines.registry import entry, example_image, mask
from tests.support.tiny import DOWN_BLOCKS, WIDTH


def hint(number: int) -> Image.Image:
    """An image to be guided by, of its own for each call."""
    return example_image(number + 50)


def influence(number: int) -> float:
    return 0.5 + number / 10


# ControlNet with Stable Diffusion 1.5


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint)
def stable_diffusion_control_net_text() -> diffusers.StableDiffusionControlNetPipeline:
    return diffusers.StableDiffusionControlNetPipeline(**diffusion(), controlnet=controlnet())


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint, controlnet_conditioning_scale=influence)
def stable_diffusion_control_net_scales() -> diffusers.StableDiffusionControlNetPipeline:
    """Each call has another scale of the ControlNet."""
    return diffusers.StableDiffusionControlNetPipeline(**diffusion(), controlnet=controlnet())


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    image=hint,
    control_guidance_start=lambda number: number / 20,
    control_guidance_end=lambda number: 1 - number / 10,
)
def stable_diffusion_control_net_interval() -> diffusers.StableDiffusionControlNetPipeline:
    """The ControlNet acts on some of the steps only."""
    return diffusers.StableDiffusionControlNetPipeline(**diffusion(), controlnet=controlnet())


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint, guess_mode=True)
def stable_diffusion_control_net_guess() -> diffusers.StableDiffusionControlNetPipeline:
    return diffusers.StableDiffusionControlNetPipeline(**diffusion(), controlnet=controlnet())


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    image=lambda number: [hint(number), hint(number + 6)],
    controlnet_conditioning_scale=[0.5, 0.8],
)
def stable_diffusion_multi_control_net_text() -> diffusers.StableDiffusionControlNetPipeline:
    """Two ControlNets at once."""
    return diffusers.StableDiffusionControlNetPipeline(
        **diffusion(), controlnet=[controlnet(), controlnet()]
    )


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, control_image=hint, strength=strength)
def stable_diffusion_control_net_img2img() -> diffusers.StableDiffusionControlNetImg2ImgPipeline:
    return diffusers.StableDiffusionControlNetImg2ImgPipeline(
        **diffusion(), controlnet=controlnet()
    )


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    mask_image=mask,
    control_image=hint,
    strength=strength,
)
def stable_diffusion_control_net_inpaint() -> diffusers.StableDiffusionControlNetInpaintPipeline:
    return diffusers.StableDiffusionControlNetInpaintPipeline(
        **diffusion(in_channels=9), controlnet=controlnet()
    )


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint)
def stable_diffusion_control_net_xs_text() -> diffusers.StableDiffusionControlNetXSPipeline:
    return diffusers.StableDiffusionControlNetXSPipeline(
        **diffusion(layers_per_block=2, use_linear_projection=True), controlnet=control_xs()
    )


# ControlNet with Stable Diffusion XL


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint)
def stable_diffusion_xl_control_net_text() -> diffusers.StableDiffusionXLControlNetPipeline:
    return diffusers.StableDiffusionXLControlNetPipeline(
        **diffusion_xl(), controlnet=controlnet(**XL_BLOCKS), add_watermarker=False
    )


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, control_image=hint, strength=strength)
def stable_diffusion_xl_control_net_img2img() -> (
    diffusers.StableDiffusionXLControlNetImg2ImgPipeline
):
    return diffusers.StableDiffusionXLControlNetImg2ImgPipeline(
        **diffusion_xl(), controlnet=controlnet(**XL_BLOCKS), add_watermarker=False
    )


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    mask_image=mask,
    control_image=hint,
    strength=strength,
)
def stable_diffusion_xl_control_net_inpaint() -> (
    diffusers.StableDiffusionXLControlNetInpaintPipeline
):
    return diffusers.StableDiffusionXLControlNetInpaintPipeline(
        **diffusion_xl(in_channels=9), controlnet=controlnet(**XL_BLOCKS), add_watermarker=False
    )


def union() -> diffusers.ControlNetUnionModel:
    return diffusers.ControlNetUnionModel(
        **DOWN_BLOCKS,
        **HINTS,
        **XL_BLOCKS,
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
    )


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    control_image=hint,
    control_mode=lambda number: number % 2,
)
def stable_diffusion_xl_control_net_union_text() -> (
    diffusers.StableDiffusionXLControlNetUnionPipeline
):
    """Calls with different kinds of control images: outlines, depth."""
    return diffusers.StableDiffusionXLControlNetUnionPipeline(
        **diffusion_xl(), controlnet=union(), add_watermarker=False
    )


@entry(
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    control_image=hint,
    control_mode=1,
    strength=strength,
)
def stable_diffusion_xl_control_net_union_img2img() -> (
    diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline
):
    return diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline(
        **diffusion_xl(), controlnet=union(), add_watermarker=False
    )


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    mask_image=mask,
    control_image=hint,
    control_mode=1,
    strength=strength,
)
def stable_diffusion_xl_control_net_union_inpaint() -> (
    diffusers.StableDiffusionXLControlNetUnionInpaintPipeline
):
    return diffusers.StableDiffusionXLControlNetUnionInpaintPipeline(
        **diffusion_xl(), controlnet=union(), add_watermarker=False
    )


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint)
def stable_diffusion_xl_control_net_xs_text() -> diffusers.StableDiffusionXLControlNetXSPipeline:
    return diffusers.StableDiffusionXLControlNetXSPipeline(
        **diffusion_xl(layers_per_block=2),
        controlnet=control_xs(cross_attention_dim=2 * WIDTH, transformer_layers_per_block=(1, 2)),
        add_watermarker=False,
    )


def control_xs(**config: Any) -> diffusers.ControlNetXSAdapter:
    return diffusers.ControlNetXSAdapter(
        **HINTS,
        **{
            "block_out_channels": (4, 8),
            "base_block_out_channels": (8, 16),
            "num_attention_heads": 2,
            "cross_attention_dim": WIDTH,
            "down_block_types": DOWN_BLOCKS["down_block_types"],
            "sample_size": 8,
            "max_norm_num_groups": 4,
            "learn_time_embedding": True,
        }
        | config,
    )


# T2I-Adapter


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint)
def stable_diffusion_adapter_text() -> diffusers.StableDiffusionAdapterPipeline:
    parts = diffusion(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    adapter = diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2)
    return diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter)


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, image=hint)
def stable_diffusion_xl_adapter_text() -> diffusers.StableDiffusionXLAdapterPipeline:
    adapter = diffusers.T2IAdapter(
        channels=[8, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return diffusers.StableDiffusionXLAdapterPipeline(**diffusion_xl(), adapter=adapter)


# IP-Adapter


def ip_adapter(network: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of an IP-Adapter for a UNet, made here in place of a checkpoint's."""
    width = network.config.cross_attention_dim
    weights: dict[str, torch.Tensor] = {}
    for number, (name, processor) in enumerate(network.attn_processors.items()):
        if not name.endswith("attn2.processor"):
            continue
        module = network.get_submodule(name.removesuffix(".processor"))
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{number}.{part}.weight"] = (
                torch.randn(module.to_k.out_features, width) * width**-0.5
            )
        del processor
    project = {
        "proj.weight": torch.randn(4 * width, WIDTH) * WIDTH**-0.5,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": project, "ip_adapter": weights}


def with_image(pipeline: Any, scale: float = 0.7) -> DiffusionPipeline:
    """The pipeline with an IP-Adapter."""
    pipeline.ip_adapter = ip_adapter(pipeline.unet)  # which `save_pretrained` does not save
    pipeline.unet._load_ip_adapter_weights([pipeline.ip_adapter])
    pipeline.set_ip_adapter_scale(scale)
    return pipeline


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, ip_adapter_image=hint)
def stable_diffusion_ip_adapter_text() -> diffusers.StableDiffusionPipeline:
    pipeline = diffusers.StableDiffusionPipeline(
        **diffusion() | {"feature_extractor": features()}, image_encoder=vision()
    )
    return with_image(pipeline)


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, ip_adapter_image=hint)
def stable_diffusion_xl_ip_adapter_text() -> diffusers.StableDiffusionXLPipeline:
    pipeline = diffusers.StableDiffusionXLPipeline(
        **diffusion_xl(),
        image_encoder=vision(),
        feature_extractor=features(),
        add_watermarker=False,
    )
    return with_image(pipeline)
