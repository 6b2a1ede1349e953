"""Variants of Stable Diffusion 1.5 that change what is done around its UNet, most of them
deprecated by diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
    RobertaSeriesConfig,
    RobertaSeriesModelWithTransformation,
)
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

from tests.pipelines.parts import NUMBERS, SQUARE, diffusion, features, strength, unet
from tests.pipelines.registry import ABSENT, PROMPTS, STEPS, entry, example_image, mask
from tests.pipelines.transformers_parts import t5_tokenizer
from tests.support.tiny import WIDTH, autoencoder

TEXT: dict[str, Any] = {**NUMBERS, **SQUARE, "guidance_scale": 5.0}


def plain(**config: Any) -> dict[str, Any]:
    """For pipelines without a safety checker's switch."""
    return {
        name: part
        for name, part in diffusion(**config).items()
        if name != "requires_safety_checker"
    }


@entry(**TEXT, sld_guidance_scale=500.0, sld_warmup_steps=1)
def stable_diffusion_safe() -> StableDiffusionPipelineSafe:
    """Steers away from a concept: three rows."""
    return StableDiffusionPipelineSafe(**diffusion())


@entry(**TEXT, editing_prompt=lambda number: PROMPTS[5 - number] or "ring", edit_warmup_steps=1)
def semantic_stable_diffusion() -> diffusers.SemanticStableDiffusionPipeline:
    return diffusers.SemanticStableDiffusionPipeline(**diffusion())


@entry(**TEXT)
def stable_diffusion_ldm3d() -> diffusers.StableDiffusionLDM3DPipeline:
    """Images with depth: six channels."""
    parts = diffusion()
    parts["vae"] = autoencoder(in_channels=6, out_channels=6)
    return diffusers.StableDiffusionLDM3DPipeline(**parts, image_encoder=None)


@entry(**TEXT | {"width": 32}, view_batch_size=2)
def stable_diffusion_panorama() -> diffusers.StableDiffusionPanoramaPipeline:
    return diffusers.StableDiffusionPanoramaPipeline(**diffusion())


@entry(**TEXT, sag_scale=lambda number: 0.5 + number / 10)
def stable_diffusion_sag() -> diffusers.StableDiffusionSAGPipeline:
    """Reads the attention maps of a processor that it installs."""
    return diffusers.StableDiffusionSAGPipeline(**diffusion())


@entry(
    **TEXT,
    gligen_phrases=["ring"],
    gligen_boxes=lambda number: [[0.1, 0.1, 0.4 + number / 10, 0.6]],
)
def stable_diffusion_gligen() -> diffusers.StableDiffusionGLIGENPipeline:
    return diffusers.StableDiffusionGLIGENPipeline(**diffusion(attention_type="gated"))


@entry(
    **NUMBERS,
    guidance_scale=5.0,
    mask_image=lambda number: torch.ones(1, 8, 8) * (torch.arange(8) < 3 + number % 3),
    image_latents=lambda number: torch.randn(
        1, STEPS[number], 4, 8, 8, generator=torch.Generator().manual_seed(number)
    ),
    inpaint_strength=1.0,
)
def stable_diffusion_diff_edit() -> diffusers.StableDiffusionDiffEditPipeline:
    parts = diffusion()
    return diffusers.StableDiffusionDiffEditPipeline(
        **parts, inverse_scheduler=DDIMInverseScheduler.from_config(parts["scheduler"].config)
    )


@entry(
    **NUMBERS, guidance_scale=5.0, source_prompt="a ring", image=example_image, strength=strength
)
def cycle_diffusion() -> diffusers.CycleDiffusionPipeline:
    return diffusers.CycleDiffusionPipeline(**diffusion())


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, mask_image=mask, strength=strength)
def stable_diffusion_inpaint_legacy() -> diffusers.StableDiffusionInpaintPipelineLegacy:
    return diffusers.StableDiffusionInpaintPipelineLegacy(**diffusion())


@entry(**TEXT)
def stable_diffusion_model_editing() -> diffusers.StableDiffusionModelEditingPipeline:
    return diffusers.StableDiffusionModelEditingPipeline(**diffusion())


@entry(
    **TEXT,
    prompt="a red circle",
    token_indices=[2],
    max_iter_to_alter=2,
    attn_res=(4, 4),
    thresholds={0: 0.5},
)
def stable_diffusion_attend_and_excite() -> diffusers.StableDiffusionAttendAndExcitePipeline:
    """Computes gradients through the UNet."""
    return diffusers.StableDiffusionAttendAndExcitePipeline(**diffusion())


@entry(**TEXT, parallel=2, tolerance=0.1)
def stable_diffusion_paradigms() -> diffusers.StableDiffusionParadigmsPipeline:
    """Solves several steps at once."""
    parts = diffusion()
    parts["scheduler"] = diffusers.DDIMParallelScheduler.from_config(parts["scheduler"].config)
    return diffusers.StableDiffusionParadigmsPipeline(**parts)


@entry(
    **TEXT,
    prompt=ABSENT,
    example_image=lambda number: example_image(number + 50),
    image=example_image,
    mask_image=mask,
)
def paint_by_example() -> diffusers.PaintByExamplePipeline:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return diffusers.PaintByExamplePipeline(
        vae=autoencoder(),
        image_encoder=PaintByExampleImageEncoder(config, proj_size=WIDTH),
        unet=unet(in_channels=9),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=features(),
    )


# Marigold: what an image shows


def marigold(channels: int = 4, **config: Any) -> dict[str, Any]:
    parts = diffusion(in_channels=4 + channels, out_channels=channels)
    parts["scheduler"] = DDIMScheduler(
        prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1, clip_sample=False,
        timestep_spacing="trailing", rescale_betas_zero_snr=True,
    )  # fmt: skip
    names = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    return {**{name: parts[name] for name in names}, "default_denoising_steps": 4, **config}


MARIGOLD: dict[str, Any] = {
    **NUMBERS,
    "prompt": ABSENT,
    "image": example_image,
    "processing_resolution": 0,
}


@entry(**MARIGOLD)
def marigold_depth() -> diffusers.MarigoldDepthPipeline:
    return diffusers.MarigoldDepthPipeline(
        **marigold(prediction_type="depth", scale_invariant=True, shift_invariant=True)
    )


@entry(**MARIGOLD)
def marigold_normals() -> diffusers.MarigoldNormalsPipeline:
    return diffusers.MarigoldNormalsPipeline(
        **marigold(prediction_type="normals", use_full_z_range=True)
    )


@entry(**MARIGOLD)
def marigold_intrinsics() -> diffusers.MarigoldIntrinsicsPipeline:
    properties = {
        "target_names": ["albedo", "material"],
        "albedo": {"prediction_space": "srgb", "target_space": "srgb", "up_to_scale": False},
        "material": {
            "prediction_space": "stack",
            "sub_target_names": ["roughness", "metallicity", None],
        },
    }
    return diffusers.MarigoldIntrinsicsPipeline(
        **marigold(8, prediction_type="intrinsics", target_properties=properties)
    )


# Other text encoders


def alt() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 32
    config = RobertaSeriesConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=1,
        project_dim=WIDTH,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=40,
    )
    return {
        **diffusion(),
        "text_encoder": RobertaSeriesModelWithTransformation(config),
        "tokenizer": tokenizer,
    }


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0)
def alt_diffusion_text() -> diffusers.AltDiffusionPipeline:
    return diffusers.AltDiffusionPipeline(**alt())


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, strength=strength)
def alt_diffusion_img2img() -> diffusers.AltDiffusionImg2ImgPipeline:
    return diffusers.AltDiffusionImg2ImgPipeline(**alt())


@entry(**NUMBERS, height=64, width=64, guidance_scale=5.0)
def ldm_text() -> diffusers.LDMTextToImagePipeline:
    """Latent diffusion of 2022, with a BERT."""
    tokenizer = t5_tokenizer()
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        encoder_layers=1,
        encoder_ffn_dim=WIDTH,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=WIDTH,
    )
    parts = {name: part for name, part in diffusion().items() if name in ("unet", "scheduler")}
    return diffusers.LDMTextToImagePipeline(
        **parts, vqvae=autoencoder(), bert=LDMBertModel(config), tokenizer=tokenizer
    )
