"""Pixels without text, and DeepFloyd IF, which draws pixels too."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DDPMScheduler

from tests.pipelines.parts import NUMBERS, SQUARE, calm, strength
from tests.pipelines.registry import ABSENT, entry, example_image, mask
from tests.pipelines.transformers_parts import t5_text
from tests.support.tiny import SIDE, WIDTH

# Without text


def pixels(share: float = 0.1, **config: Any) -> diffusers.UNet2DModel:
    network = diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 2,
            "attention_head_dim": 2,
        }
        | config
    )
    calm(network.conv_out, share)
    return network


@entry(**NUMBERS, prompt=ABSENT)
def ddpm() -> diffusers.DDPMPipeline:
    return diffusers.DDPMPipeline(unet=pixels(), scheduler=DDPMScheduler())


@entry(**NUMBERS, prompt=ABSENT, eta=lambda number: number / 5)
def ddim() -> diffusers.DDIMPipeline:
    return diffusers.DDIMPipeline(unet=pixels(), scheduler=diffusers.DDIMScheduler())


@entry(**NUMBERS, prompt=ABSENT, num_inference_steps=lambda number: 5 + number)
def pndm() -> diffusers.PNDMPipeline:
    return diffusers.PNDMPipeline(unet=pixels(), scheduler=diffusers.PNDMScheduler(beta_end=0.002))


@entry(**NUMBERS, prompt=ABSENT)
def consistency_model() -> diffusers.ConsistencyModelPipeline:
    scheduler = diffusers.CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0
    )
    return diffusers.ConsistencyModelPipeline(unet=pixels(), scheduler=scheduler)


@entry(**NUMBERS, prompt=ABSENT, class_labels=lambda number: number)
def consistency_model_classes() -> diffusers.ConsistencyModelPipeline:
    scheduler = diffusers.CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0
    )
    return diffusers.ConsistencyModelPipeline(unet=pixels(num_class_embeds=8), scheduler=scheduler)


@entry(**NUMBERS, prompt=ABSENT)
def karras_ve() -> diffusers.KarrasVePipeline:
    return diffusers.KarrasVePipeline(
        unet=pixels(), scheduler=diffusers.KarrasVeScheduler(sigma_max=0.5)
    )


@entry(**NUMBERS, prompt=ABSENT)
def score_sde_ve() -> diffusers.ScoreSdeVePipeline:
    return diffusers.ScoreSdeVePipeline(
        unet=pixels(1.0), scheduler=diffusers.ScoreSdeVeScheduler(sigma_max=0.5)
    )


@entry(
    **NUMBERS,
    prompt=ABSENT,
    image=lambda number: example_image(number, 32),
    mask_image=lambda number: mask(number, 32),
    jump_length=2,
    jump_n_sample=2,
)
def re_paint() -> diffusers.RePaintPipeline:
    return diffusers.RePaintPipeline(
        unet=pixels(sample_size=32), scheduler=diffusers.RePaintScheduler()
    )


@entry(**NUMBERS, prompt=ABSENT)
def ldm() -> diffusers.LDMPipeline:
    return diffusers.LDMPipeline(
        vqvae=quantised(),
        unet=pixels(in_channels=4, out_channels=4),
        scheduler=diffusers.DDIMScheduler(),
    )


@entry(**NUMBERS, prompt=ABSENT, image=lambda number: example_image(number, 32))
def ldm_super_resolution() -> diffusers.LDMSuperResolutionPipeline:
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=quantised(latent_channels=3, vq_embed_dim=3),
        unet=pixels(sample_size=32, in_channels=6, out_channels=3),
        scheduler=diffusers.DDIMScheduler(),
    )


@entry(prompt=ABSENT)
def dance_diffusion() -> diffusers.DanceDiffusionPipeline:
    network = diffusers.UNet1DModel(
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
        sample_size=256,
        sample_rate=16_000,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    return diffusers.DanceDiffusionPipeline(unet=network, scheduler=diffusers.IPNDMScheduler())


def quantised(**config: Any) -> diffusers.VQModel:
    return diffusers.VQModel(
        **{
            "block_out_channels": (4, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "num_vq_embeddings": 12,
            "vq_embed_dim": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        | config
    )


# DeepFloyd IF


def floyd(channels: int = 3, *, noising: bool = False) -> dict[str, Any]:
    config: dict[str, Any] = {
        "sample_size": SIDE,
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "in_channels": channels,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_num_groups": 4,
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "cross_attention_dim": 32,
        "encoder_hid_dim": WIDTH,
        "attention_head_dim": 4,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "timestep" if noising else None,
    }
    network = diffusers.UNet2DConditionModel(**config)
    calm(network.conv_out)
    parts = {
        **t5_text(),
        "unet": network,
        "safety_checker": None,
        "scheduler": DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            sample_max_value=1.0,
            variance_type="learned_range",
        ),
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    if noising:
        parts["image_noising_scheduler"] = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return parts


IF: dict[str, Any] = {**NUMBERS, "guidance_scale": 5.0, "clean_caption": False}


def small(number: int) -> Any:
    return example_image(number, SIDE // 2)


@entry(**IF, **SQUARE)
def if_text() -> diffusers.IFPipeline:
    return diffusers.IFPipeline(**floyd())


@entry(**IF, image=example_image, strength=strength)
def if_img2img() -> diffusers.IFImg2ImgPipeline:
    return diffusers.IFImg2ImgPipeline(**floyd())


@entry(**IF, image=example_image, mask_image=mask, strength=strength)
def if_inpainting() -> diffusers.IFInpaintingPipeline:
    return diffusers.IFInpaintingPipeline(**floyd())


@entry(**IF, **SQUARE, image=small, noise_level=lambda number: 100 + 10 * number)
def if_super_resolution() -> diffusers.IFSuperResolutionPipeline:
    return diffusers.IFSuperResolutionPipeline(**floyd(6, noising=True))


@entry(**IF, image=small, original_image=example_image, strength=strength)
def if_img2img_super_resolution() -> diffusers.IFImg2ImgSuperResolutionPipeline:
    return diffusers.IFImg2ImgSuperResolutionPipeline(**floyd(6, noising=True))


@entry(**IF, image=small, original_image=example_image, mask_image=mask, strength=strength)
def if_inpainting_super_resolution() -> diffusers.IFInpaintingSuperResolutionPipeline:
    return diffusers.IFInpaintingSuperResolutionPipeline(**floyd(6, noising=True))
