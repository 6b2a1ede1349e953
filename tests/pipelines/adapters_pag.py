"""Perturbed attention guidance, whose calls put processors of their own into the shared network,
which cut the batch in three."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.pipelines.adapters import hint
from tests.pipelines.parts import (
    NUMBERS,
    SQUARE,
    XL_BLOCKS,
    controlnet,
    diffusion,
    diffusion_xl,
    parts_of,
    strength,
)
from tests.pipelines.registry import entry, example_image, mask
from tests.pipelines.transformers import SANA, hunyuan_dit, pixart_sigma, sana
from tests.support.tiny import stable_diffusion_3


def scale(number: int) -> float:
    return 1.0 + number / 2


PAG: dict[str, Any] = {**NUMBERS, "guidance_scale": 5.0, "pag_scale": scale}
MID: dict[str, Any] = {"pag_applied_layers": ["mid"]}
XL: dict[str, Any] = {**MID, "add_watermarker": False}


@entry(**PAG, **SQUARE)
def stable_diffusion_pag_text() -> diffusers.StableDiffusionPAGPipeline:
    return diffusers.StableDiffusionPAGPipeline(**diffusion(), **MID)


@entry(**PAG, image=example_image, strength=strength)
def stable_diffusion_pag_img2img() -> diffusers.StableDiffusionPAGImg2ImgPipeline:
    return diffusers.StableDiffusionPAGImg2ImgPipeline(**diffusion(), **MID)


@entry(**PAG, **SQUARE, image=example_image, mask_image=mask, strength=strength)
def stable_diffusion_pag_inpaint() -> diffusers.StableDiffusionPAGInpaintPipeline:
    return diffusers.StableDiffusionPAGInpaintPipeline(**diffusion(), **MID)


@entry(**PAG, **SQUARE, image=hint)
def stable_diffusion_control_net_pag_text() -> diffusers.StableDiffusionControlNetPAGPipeline:
    return diffusers.StableDiffusionControlNetPAGPipeline(
        **diffusion(), controlnet=controlnet(), **MID
    )


@entry(**PAG, **SQUARE, image=example_image, mask_image=mask, control_image=hint, strength=strength)
def stable_diffusion_control_net_pag_inpaint() -> (
    diffusers.StableDiffusionControlNetPAGInpaintPipeline
):
    return diffusers.StableDiffusionControlNetPAGInpaintPipeline(
        **diffusion(), controlnet=controlnet(), **MID
    )


@entry(**PAG, **SQUARE)
def stable_diffusion_xl_pag_text() -> diffusers.StableDiffusionXLPAGPipeline:
    return diffusers.StableDiffusionXLPAGPipeline(**diffusion_xl(), **XL)


@entry(**PAG, image=example_image, strength=strength)
def stable_diffusion_xl_pag_img2img() -> diffusers.StableDiffusionXLPAGImg2ImgPipeline:
    return diffusers.StableDiffusionXLPAGImg2ImgPipeline(**diffusion_xl(), **XL)


@entry(**PAG, **SQUARE, image=example_image, mask_image=mask, strength=strength)
def stable_diffusion_xl_pag_inpaint() -> diffusers.StableDiffusionXLPAGInpaintPipeline:
    return diffusers.StableDiffusionXLPAGInpaintPipeline(**diffusion_xl(), **XL)


@entry(**PAG, **SQUARE, image=hint)
def stable_diffusion_xl_control_net_pag_text() -> diffusers.StableDiffusionXLControlNetPAGPipeline:
    parts = diffusion_xl()
    return diffusers.StableDiffusionXLControlNetPAGPipeline(
        **parts, controlnet=controlnet(**XL_BLOCKS), **XL
    )


@entry(**PAG, image=example_image, control_image=hint, strength=strength)
def stable_diffusion_xl_control_net_pag_img2img() -> (
    diffusers.StableDiffusionXLControlNetPAGImg2ImgPipeline
):
    parts = diffusion_xl()
    return diffusers.StableDiffusionXLControlNetPAGImg2ImgPipeline(
        **parts, controlnet=controlnet(**XL_BLOCKS), **XL
    )


def sd3_parts() -> dict[str, Any]:
    return {
        name: part
        for name, part in parts_of(stable_diffusion_3).items()
        if name not in ("image_encoder", "feature_extractor")
    }


@entry(**PAG, **SQUARE, max_sequence_length=16)
def stable_diffusion_3_pag_text() -> diffusers.StableDiffusion3PAGPipeline:
    return diffusers.StableDiffusion3PAGPipeline(**sd3_parts(), pag_applied_layers="blocks.0")


@entry(**PAG, **SQUARE, max_sequence_length=16, image=example_image, strength=strength)
def stable_diffusion_3_pag_img2img() -> diffusers.StableDiffusion3PAGImg2ImgPipeline:
    return diffusers.StableDiffusion3PAGImg2ImgPipeline(
        **sd3_parts(), pag_applied_layers="blocks.0"
    )


@entry(
    # without guidance it mixes up its rows
    **PAG | {"guidance_scale": lambda number: 3.0 + number},
    height=32,
    width=32,
    use_resolution_binning=False,
    target_size=(32, 32),
)
def hunyuan_dit_pag_text() -> diffusers.HunyuanDiTPAGPipeline:
    return diffusers.HunyuanDiTPAGPipeline(
        **parts_of(hunyuan_dit), requires_safety_checker=False, pag_applied_layers=["0"]
    )


@entry(**PAG, **SQUARE, use_resolution_binning=False, clean_caption=False, max_sequence_length=16)
def pix_art_sigma_pag_text() -> diffusers.PixArtSigmaPAGPipeline:
    return diffusers.PixArtSigmaPAGPipeline(
        **parts_of(pixart_sigma), pag_applied_layers=["blocks.0"]
    )


@entry(**PAG | SANA | {"guidance_scale": 5.0})
def sana_pag_text() -> diffusers.SanaPAGPipeline:
    return diffusers.SanaPAGPipeline(**parts_of(sana), pag_applied_layers=["transformer_blocks.0"])
