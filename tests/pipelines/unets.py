"""Stable Diffusion 1.5, 2 and XL, and latent consistency models."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import nn

from tests.pipelines.parts import (
    NUMBERS,
    SQUARE,
    diffusion,
    diffusion_xl,
    features,
    strength,
    unet,
    vision,
)
from tests.pipelines.registry import ABSENT, entry, example_image, mask
from tests.support.tiny import NOISE_SCHEDULE, SIDE, WIDTH, autoencoder, clip

# Stable Diffusion 1.5


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0)
def stable_diffusion_text() -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(**diffusion())


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, strength=strength)
def stable_diffusion_img2img() -> diffusers.StableDiffusionImg2ImgPipeline:
    return diffusers.StableDiffusionImg2ImgPipeline(**diffusion())


@entry(
    **SQUARE, **NUMBERS, guidance_scale=5.0, image=example_image, mask_image=mask, strength=strength
)
def stable_diffusion_inpaint() -> diffusers.StableDiffusionInpaintPipeline:
    """With a UNet of nine channels, made for inpainting."""
    return diffusers.StableDiffusionInpaintPipeline(**diffusion(in_channels=9))


@entry(
    **SQUARE, **NUMBERS, guidance_scale=5.0, image=example_image, mask_image=mask, strength=strength
)
def stable_diffusion_inpaint_plain() -> diffusers.StableDiffusionInpaintPipeline:
    """With the UNet for text to image."""
    return diffusers.StableDiffusionInpaintPipeline(**diffusion())


@entry(
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    image_guidance_scale=lambda number: 1.2 + number / 10,
)
def stable_diffusion_instruct_pix2pix() -> diffusers.StableDiffusionInstructPix2PixPipeline:
    return diffusers.StableDiffusionInstructPix2PixPipeline(**diffusion(in_channels=8))


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0, prompt=ABSENT, image=example_image)
def stable_diffusion_image_variation() -> diffusers.StableDiffusionImageVariationPipeline:
    return diffusers.StableDiffusionImageVariationPipeline(
        unet=unet(),
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        vae=autoencoder(),
        image_encoder=vision(),
        safety_checker=None,
        feature_extractor=features(),
        requires_safety_checker=False,
    )


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0)
def stable_diffusion_lcm_scheduler() -> diffusers.StableDiffusionPipeline:
    scheduler = LCMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(**diffusion() | {"scheduler": scheduler})


# Stable Diffusion 2


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0)
def stable_diffusion_2_text() -> diffusers.StableDiffusionPipeline:
    """It predicts velocities."""
    scheduler = DDIMScheduler(
        **NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
    )
    return diffusers.StableDiffusionPipeline(
        **diffusion(use_linear_projection=True) | {"scheduler": scheduler}
    )


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, strength=strength)
def stable_diffusion_depth2img() -> diffusers.StableDiffusionDepth2ImgPipeline:
    config = transformers.DPTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    depth = transformers.DPTForDepthEstimation(config)
    nn.init.constant_(depth.head.head[-2].bias, 1.0)  # above zero, where its last ReLU would cut
    parts = diffusion(in_channels=5, use_linear_projection=True)
    for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        del parts[name]
    return diffusers.StableDiffusionDepth2ImgPipeline(
        **parts,
        depth_estimator=depth,
        feature_extractor=transformers.DPTImageProcessorPil(size={"height": 32, "width": 32}),
    )


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, noise_level=lambda number: 10 + number)
def stable_diffusion_upscale() -> diffusers.StableDiffusionUpscalePipeline:
    parts = diffusion(in_channels=7, num_class_embeds=1000, use_linear_projection=True)
    del parts["requires_safety_checker"]
    return diffusers.StableDiffusionUpscalePipeline(
        **parts, low_res_scheduler=DDPMScheduler(), max_noise_level=350
    )


@entry(**NUMBERS, guidance_scale=5.0, image=example_image)
def stable_diffusion_latent_upscale() -> diffusers.StableDiffusionLatentUpscalePipeline:
    network = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=8,
        out_channels=5,
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        conv_in_kernel=1,
        conv_out_kernel=1,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        mid_block_type=None,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        only_cross_attention=False,
        time_cond_proj_dim=128 + WIDTH,
    )
    return diffusers.StableDiffusionLatentUpscalePipeline(
        unet=network,
        scheduler=EulerDiscreteScheduler(prediction_type="sample"),
        vae=autoencoder(),
        **clip(projection=False),
    )


@entry(
    **SQUARE, **NUMBERS, guidance_scale=5.0, prior_guidance_scale=4.0, prior_num_inference_steps=3
)
def stable_unclip() -> diffusers.StableUnCLIPPipeline:
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=WIDTH,
        num_embeddings=16,
        num_layers=1,
    )
    prior_scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        num_train_timesteps=1000,
        clip_sample=True,
        clip_sample_range=5.0,
        beta_schedule="squaredcos_cap_v2",
    )
    return diffusers.StableUnCLIPPipeline(
        **{f"prior_{name}": part for name, part in clip().items()},
        prior=prior,
        prior_scheduler=prior_scheduler,
        **_unclip(),
    )


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    noise_level=lambda number: 100 * number,
)
def stable_unclip_img2img() -> diffusers.StableUnCLIPImg2ImgPipeline:
    return diffusers.StableUnCLIPImg2ImgPipeline(
        image_encoder=vision(), feature_extractor=features(), **_unclip()
    )


def _unclip() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    return {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **clip(projection=False),
        "unet": unet(
            class_embed_type="projection",
            use_linear_projection=True,
            projection_class_embeddings_input_dim=2 * WIDTH,
        ),
        "scheduler": DDIMScheduler(
            **NOISE_SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
        ),
        "vae": autoencoder(),
    }


# Stable Diffusion XL


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0)
def stable_diffusion_xl_text() -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(**diffusion_xl(), add_watermarker=False)


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, strength=strength)
def stable_diffusion_xl_img2img() -> diffusers.StableDiffusionXLImg2ImgPipeline:
    return diffusers.StableDiffusionXLImg2ImgPipeline(**diffusion_xl(), add_watermarker=False)


@entry(
    **SQUARE, **NUMBERS, guidance_scale=5.0, image=example_image, mask_image=mask, strength=strength
)
def stable_diffusion_xl_inpaint() -> diffusers.StableDiffusionXLInpaintPipeline:
    return diffusers.StableDiffusionXLInpaintPipeline(
        **diffusion_xl(in_channels=9), add_watermarker=False
    )


@entry(
    **SQUARE, **NUMBERS, guidance_scale=5.0, image=example_image, mask_image=mask, strength=strength
)
def stable_diffusion_xl_inpaint_plain() -> diffusers.StableDiffusionXLInpaintPipeline:
    """With the UNet for text to image."""
    return diffusers.StableDiffusionXLInpaintPipeline(**diffusion_xl(), add_watermarker=False)


@entry(
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    strength=strength,
    aesthetic_score=lambda number: 5.0 + number / 4,
)
def stable_diffusion_xl_refiner_img2img() -> diffusers.StableDiffusionXLImg2ImgPipeline:
    """One text encoder, and an aesthetic score instead of a target size."""
    parts = diffusion_xl(
        cross_attention_dim=WIDTH, projection_class_embeddings_input_dim=5 * 8 + WIDTH
    )
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts | {"text_encoder": None, "tokenizer": None},
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


@entry(
    **SQUARE,
    **NUMBERS,
    guidance_scale=5.0,
    image=example_image,
    image_guidance_scale=lambda number: 1.2 + number / 10,
)
def stable_diffusion_xl_instruct_pix2pix() -> diffusers.StableDiffusionXLInstructPix2PixPipeline:
    return diffusers.StableDiffusionXLInstructPix2PixPipeline(
        **diffusion_xl(in_channels=8), add_watermarker=False
    )


# Latent consistency models: guidance is an input of the UNet


def _consistency() -> dict[str, Any]:
    scheduler = LCMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return diffusion(time_cond_proj_dim=8) | {"scheduler": scheduler}


@entry(**SQUARE, **NUMBERS, guidance_scale=5.0)
def latent_consistency_model_text() -> diffusers.LatentConsistencyModelPipeline:
    return diffusers.LatentConsistencyModelPipeline(**_consistency())


@entry(**NUMBERS, guidance_scale=5.0, image=example_image, strength=strength)
def latent_consistency_model_img2img() -> diffusers.LatentConsistencyModelImg2ImgPipeline:
    return diffusers.LatentConsistencyModelImg2ImgPipeline(**_consistency())
