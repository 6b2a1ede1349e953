"""Qwen-Image, Z-Image and HunyuanImage."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)
from torch import nn

from tests.pipelines.registry import ABSENT, entry, example_image, mask
from tests.pipelines.transformers_parts import (
    dynamic,
    flow,
    language_model,
    plain_autoencoder,
    strength,
    vision_language,
)
from tests.support.tiny import WIDTH, hunyuan_image, qwen, qwen_image, with_fixed

SIZE: dict[str, Any] = {"height": 16, "width": 16, "output_type": "np"}

# Qwen-Image

QWEN: dict[str, Any] = {**SIZE, "negative_prompt": " ", "true_cfg_scale": 4.0}


@entry(**QWEN)
def qwen_image_text() -> diffusers.QwenImagePipeline:
    return qwen_image()


@entry(**QWEN, image=example_image, strength=strength)
def qwen_image_img2img() -> diffusers.QwenImageImg2ImgPipeline:
    return diffusers.QwenImageImg2ImgPipeline(**qwen_image().components)


@entry(**QWEN, image=example_image, mask_image=mask, strength=strength)
def qwen_image_inpaint() -> diffusers.QwenImageInpaintPipeline:
    return diffusers.QwenImageInpaintPipeline(**qwen_image().components)


def small_images() -> None:
    """The edit pipelines scale every image to 1024 x 1024; here to 16 x 16."""
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (16, 16, None)
    pipeline_qwenimage_edit_inpaint.calculate_dimensions = lambda area, ratio: (16, 16, None)
    pipeline_qwenimage_layered.calculate_dimensions = lambda area, ratio: (16, 16)
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 16 * 16
    pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: (16, 16)


def edit_parts() -> dict[str, Any]:
    return {**qwen_image().components, **vision_language()}


@entry(**QWEN, image=example_image)
def qwen_image_edit() -> diffusers.QwenImageEditPipeline:
    small_images()
    return diffusers.QwenImageEditPipeline(**edit_parts())


@entry(**QWEN, image=example_image, mask_image=mask, strength=strength)
def qwen_image_edit_inpaint() -> diffusers.QwenImageEditInpaintPipeline:
    small_images()
    return diffusers.QwenImageEditInpaintPipeline(**edit_parts())


@entry(**QWEN, image=lambda number: [example_image(number), example_image(number + 6)])
def qwen_image_edit_plus() -> diffusers.QwenImageEditPlusPipeline:
    """With two references."""
    small_images()
    return diffusers.QwenImageEditPlusPipeline(**edit_parts())


def layers(number: int) -> Any:
    """An image that is not opaque."""
    return example_image(number).convert("RGBA")


LAYERED: dict[str, Any] = {**QWEN, "height": ABSENT, "width": ABSENT, "image": layers, "layers": 2}


def layered_parts() -> dict[str, Any]:
    parts = {**qwen_image().components, **vision_language()}
    config = {**parts["transformer"].config}
    config |= {
        "in_channels": 32,
        "out_channels": 8,
        "use_additional_t_cond": True,
        "use_layer3d_rope": True,
    }
    parts["transformer"] = diffusers.QwenImageTransformer2DModel(**config)
    config = {
        **parts["vae"].config,
        "z_dim": 8,
        "latents_mean": [0.0] * 8,
        "latents_std": [1.0] * 8,
    }
    parts["vae"] = diffusers.AutoencoderKLQwenImage(**config | {"input_channels": 4})
    return parts


@entry(**LAYERED, prompt=lambda number: f"{number} rings")
def qwen_image_layered() -> diffusers.QwenImageLayeredPipeline:
    small_images()
    return diffusers.QwenImageLayeredPipeline(**layered_parts())


# Z-Image

Z: dict[str, Any] = {**SIZE, "guidance_scale": 5.0, "max_sequence_length": 48}


def z_image_parts() -> dict[str, Any]:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    nn.init.normal_(transformer.x_pad_token)  # which are left as the memory was
    nn.init.normal_(transformer.cap_pad_token)
    text = language_model("Qwen3", "Model")
    return {"transformer": transformer, "scheduler": dynamic(), "vae": plain_autoencoder(), **text}


@entry(**Z)
def z_image() -> diffusers.ZImagePipeline:
    return diffusers.ZImagePipeline(**z_image_parts())


@entry(**Z, image=example_image, strength=strength)
def z_image_img2img() -> diffusers.ZImageImg2ImgPipeline:
    return diffusers.ZImageImg2ImgPipeline(**z_image_parts())


@entry(**Z, image=example_image, mask_image=mask, strength=strength)
def z_image_inpaint() -> diffusers.ZImageInpaintPipeline:
    return diffusers.ZImageInpaintPipeline(**z_image_parts())


# HunyuanImage


@entry(**SIZE)
def hunyuan_image_text() -> diffusers.HunyuanImagePipeline:
    return hunyuan_image()


@entry(**SIZE, distilled_guidance_scale=3.25, prompt=lambda number: f'a "{number}"')
def hunyuan_image_distilled() -> diffusers.HunyuanImagePipeline:
    """Guidance as an input; quoted words, which ByT5 encodes."""
    pipeline = hunyuan_image()
    config = {**pipeline.transformer.config, "guidance_embeds": True, "use_meanflow": True}
    pipeline.register_modules(
        transformer=diffusers.HunyuanImageTransformer2DModel(**config), guider=None, ocr_guider=None
    )
    return pipeline


@entry(**SIZE, image=example_image, distilled_guidance_scale=3.25)
def hunyuan_image_refiner() -> diffusers.HunyuanImageRefinerPipeline:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 2, 2),
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    # its template takes more tokens here than it drops
    kind = with_fixed(diffusers.HunyuanImageRefinerPipeline, tokenizer_max_length=200)
    return kind(scheduler=flow(), vae=vae, transformer=transformer, **qwen())
