"""unCLIP: a prior, a decoder and two networks that enlarge, each with a scheduler of its own."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

from tests.pipelines.parts import calm, features, unclip_prior, vision
from tests.pipelines.registry import ABSENT, STEPS, entry, example_image
from tests.pipelines.unets_pixels import pixels
from tests.support.tiny import SIDE, WIDTH, clip


def steps(number: int) -> int:
    return STEPS[number]


def scheduler(kind: str = "learned_range") -> diffusers.UnCLIPScheduler:
    return diffusers.UnCLIPScheduler(
        variance_type=kind, prediction_type="epsilon", num_train_timesteps=1000
    )


def unclip() -> dict[str, Any]:
    decoder = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=WIDTH,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=4,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    calm(decoder.conv_out)
    # the width of the decoder's time
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=WIDTH, time_embed_dim=4 * 8, cross_attention_dim=WIDTH
    )
    large = {
        "sample_size": SIDE,
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    return {
        **clip(),
        "decoder": decoder,
        "text_proj": projection,
        "super_res_first": pixels(**large),
        "super_res_last": pixels(**large),
        "decoder_scheduler": scheduler(),
        "super_res_scheduler": scheduler("fixed_small_log"),
    }


UNCLIP: dict[str, Any] = {
    "output_type": "np", "num_inference_steps": ABSENT, "decoder_num_inference_steps": steps,
    "super_res_num_inference_steps": lambda number: 2 + number % 2,
    "decoder_guidance_scale": lambda number: (4.0, 1.0, 6.0)[number % 3],
}  # fmt: skip


@entry(**UNCLIP, prior_num_inference_steps=3, prior_guidance_scale=4.0)
def unclip_text() -> diffusers.UnCLIPPipeline:
    prior = unclip_prior()
    return diffusers.UnCLIPPipeline(
        **unclip(), prior=prior["prior"], prior_scheduler=prior["scheduler"]
    )


@entry(**UNCLIP, prompt=ABSENT, image=example_image)
def unclip_image_variation() -> diffusers.UnCLIPImageVariationPipeline:
    return diffusers.UnCLIPImageVariationPipeline(
        **unclip(), image_encoder=vision(), feature_extractor=features()
    )
