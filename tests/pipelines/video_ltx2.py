"""LTX-2: films with sound."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel, LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from tests.pipelines.registry import ABSENT, entry, example_image
from tests.pipelines.transformers_parts import dynamic, language_model
from tests.pipelines.video import FILM, big
from tests.support.tiny import WIDTH

BANDS = 16
CHANNELS = 4  # of a latent


def ltx2_parts() -> dict[str, Any]:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=2 * BANDS // 4,
        audio_out_channels=2 * BANDS // 4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=WIDTH,
        rope_double_precision=False,
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        down_block_types=("LTX2VideoDownBlock3D",),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8,
        output_channels=2,
        ch_mult=(1, 1, 2),
        num_res_blocks=1,
        latent_channels=2,
        mel_bins=BANDS,
        resolution=BANDS,
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=4,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        rope_double_precision=False,
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * BANDS,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
    )
    return {
        "transformer": transformer,
        "scheduler": dynamic(),
        "vae": vae,
        "audio_vae": audio_vae,
        "connectors": connectors,
        "vocoder": vocoder,
        **language_model("Gemma2", "Model"),
    }


LTX2: dict[str, Any] = {
    **FILM, "num_frames": 5, "height": 32, "width": 32,
    "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0
}  # fmt: skip


@entry(**LTX2)
def ltx2() -> diffusers.LTX2Pipeline:
    return diffusers.LTX2Pipeline(**ltx2_parts())


@entry(
    **LTX2 | {"modality_scale": 3.0, "audio_modality_scale": 3.0, "stg_scale": 1.0},
    spatio_temporal_guidance_blocks=[1],
)
def ltx2_guided() -> diffusers.LTX2Pipeline:
    """With guidance by a modality's absence and by a block's."""
    return diffusers.LTX2Pipeline(**ltx2_parts())


@entry(**LTX2, image=big, image_crf=0)
def ltx2_image_to_video() -> diffusers.LTX2ImageToVideoPipeline:
    return diffusers.LTX2ImageToVideoPipeline(**ltx2_parts())


@entry(
    **LTX2,
    conditions=lambda number: LTX2VideoCondition(frames=big(number), index=0, strength=0.9, crf=0),
)
def ltx2_condition() -> diffusers.LTX2ConditionPipeline:
    """An image as the first frame."""
    return diffusers.LTX2ConditionPipeline(**ltx2_parts())


@entry(
    prompt=ABSENT,
    num_inference_steps=ABSENT,
    height=32,
    width=32,
    num_frames=5,
    output_type="np",
    video=lambda number: [example_image(10 * number + frame, 32) for frame in range(5)],
)
def ltx2_latent_upsample() -> diffusers.LTX2LatentUpsamplePipeline:
    """Upscales latents of LTX-2."""
    network = LTX2LatentUpsamplerModel(
        in_channels=CHANNELS, mid_channels=32, num_blocks_per_stage=1
    )
    return diffusers.LTX2LatentUpsamplePipeline(vae=ltx2_parts()["vae"], latent_upsampler=network)
