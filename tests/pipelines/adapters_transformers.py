"""ControlNets of transformers."""

from __future__ import annotations

import copy
from typing import Any

import diffusers

from tests.pipelines.adapters import hint
from tests.pipelines.parts import NUMBERS, SQUARE, certain, parts_of, strength
from tests.pipelines.registry import entry, example_image, mask
from tests.pipelines.transformers import SANA, hunyuan_dit, sana
from tests.pipelines.transformers_qwen import Z, z_image_parts
from tests.support.tiny import WIDTH, flux, qwen_image, stable_diffusion_3


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, control_image=hint, max_sequence_length=16)
def stable_diffusion_3_control_net_text() -> diffusers.StableDiffusion3ControlNetPipeline:
    parts = certain(parts_of(stable_diffusion_3))
    control = diffusers.SD3ControlNetModel.from_transformer(
        # a copy: it writes the number of layers into the configuration that it is given
        copy.deepcopy(parts["transformer"]),
        num_layers=1,
        num_extra_conditioning_channels=0,
    )
    return diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=control)


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    control_image=example_image,
    control_mask=mask,
    max_sequence_length=16,
)
def stable_diffusion_3_control_net_inpainting() -> (
    diffusers.StableDiffusion3ControlNetInpaintingPipeline
):
    parts = certain(parts_of(stable_diffusion_3))
    control = diffusers.SD3ControlNetModel.from_transformer(
        # a copy: it writes the number of layers into the configuration that it is given
        copy.deepcopy(parts["transformer"]),
        num_layers=1,
        num_extra_conditioning_channels=1,
    )
    return diffusers.StableDiffusion3ControlNetInpaintingPipeline(**parts, controlnet=control)


def flux_parts(**config: Any) -> dict[str, Any]:
    parts = parts_of(flux)
    control = diffusers.FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=[4, 4, 8],
        **config,
    )
    return {**parts, "controlnet": control}


@entry(**SQUARE, **NUMBERS, guidance_scale=3.5, control_image=hint, max_sequence_length=16)
def flux_control_net_text() -> diffusers.FluxControlNetPipeline:
    return diffusers.FluxControlNetPipeline(**flux_parts())


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=3.5,
    control_image=hint,
    control_mode=lambda number: number % 2,
    max_sequence_length=16,
)
def flux_control_net_union_text() -> diffusers.FluxControlNetPipeline:
    """One ControlNet for several kinds of images."""
    return diffusers.FluxControlNetPipeline(**flux_parts(num_mode=2))


FLUX_IMAGE: dict[str, Any] = {
    "image": example_image,
    "control_image": hint,
    "strength": strength,
    "max_sequence_length": 16,
}


def flux_image_parts() -> dict[str, Any]:
    return {
        name: part
        for name, part in flux_parts().items()
        if name not in ("image_encoder", "feature_extractor")
    }


@entry(**SQUARE, **NUMBERS, **FLUX_IMAGE, guidance_scale=3.5)
def flux_control_net_img2img() -> diffusers.FluxControlNetImg2ImgPipeline:
    return diffusers.FluxControlNetImg2ImgPipeline(**flux_image_parts())


@entry(**SQUARE, **NUMBERS, **FLUX_IMAGE, guidance_scale=3.5, mask_image=mask)
def flux_control_net_inpaint() -> diffusers.FluxControlNetInpaintPipeline:
    return diffusers.FluxControlNetInpaintPipeline(**flux_image_parts())


def qwen_parts(**config: Any) -> dict[str, Any]:
    parts = parts_of(qwen_image)
    control = diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4), **config,
    )  # fmt: skip
    return {**parts, "controlnet": control}


@entry(**SQUARE, **NUMBERS, negative_prompt=" ", true_cfg_scale=4.0, control_image=hint)
def qwen_image_control_net_text() -> diffusers.QwenImageControlNetPipeline:
    return diffusers.QwenImageControlNetPipeline(**qwen_parts())


@entry(
    **SQUARE,
    **NUMBERS,
    negative_prompt=" ",
    true_cfg_scale=4.0,
    control_image=example_image,
    control_mask=mask,
)
def qwen_image_control_net_inpaint() -> diffusers.QwenImageControlNetInpaintPipeline:
    return diffusers.QwenImageControlNetInpaintPipeline(
        **certain(qwen_parts(extra_condition_channels=4))
    )


# HunyuanDiT, Sana


@entry(
    height=32,
    width=32,
    output_type="np",
    guidance_scale=5.0,
    use_resolution_binning=False,
    target_size=(32, 32),
    control_image=lambda number: example_image(number, 32),
)
def hunyuan_dit_control_net() -> diffusers.HunyuanDiTControlNetPipeline:
    parts = certain(parts_of(hunyuan_dit))
    # the deeper half takes what the ControlNet gives
    config = {**parts["transformer"].config, "num_layers": 4}
    parts["transformer"] = diffusers.HunyuanDiT2DModel.from_config(config)
    control = diffusers.HunyuanDiT2DControlNetModel(
        sample_size=8,
        transformer_num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
        hidden_size=16,
    )
    return diffusers.HunyuanDiTControlNetPipeline(
        **parts, controlnet=control, requires_safety_checker=False
    )


@entry(**SANA, control_image=lambda number: example_image(number, 32))
def sana_control_net() -> diffusers.SanaControlNetPipeline:
    parts = parts_of(sana)
    # the first block takes nothing from the ControlNet
    config = {**parts["transformer"].config, "num_layers": 2}
    parts["transformer"] = diffusers.SanaTransformer2DModel.from_config(config)
    control = diffusers.SanaControlNetModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
    )
    return diffusers.SanaControlNetPipeline(**parts, controlnet=control)


# Z-Image: the ControlNet shares the first parts of the transformer


def z_image_control(channels: int) -> dict[str, Any]:
    control = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        dim=16,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        add_control_noise_refiner="control_layers",
    )
    return {**z_image_parts(), "controlnet": control}


@entry(**Z, control_image=hint)
def z_image_control_net_text() -> diffusers.ZImageControlNetPipeline:
    return diffusers.ZImageControlNetPipeline(**z_image_control(4))


@entry(**Z, control_image=hint, image=example_image, mask_image=mask)
def z_image_control_net_inpaint() -> diffusers.ZImageControlNetInpaintPipeline:
    """Its input has the reference image, the mask and the image: 4 + 1 + 4 channels."""
    return diffusers.ZImageControlNetInpaintPipeline(**z_image_control(9))
