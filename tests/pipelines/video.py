"""Pipelines of films, which only the library's engine serves: Wan, SkyReels, Lucy, LTX, Sana,
CogVideoX."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from PIL import Image

from tests.pipelines.registry import ABSENT, entry, example_image
from tests.pipelines.transformers_parts import flow, language_model, strength, t5_text
from tests.support.tiny import WIDTH

FILM: dict[str, Any] = {
    "height": 16,
    "width": 16,
    "output_type": "np",
    "guidance_scale": 5.0,
    "max_sequence_length": 32,
}


def film(number: int) -> list[Image.Image]:
    """Five frames."""
    return [example_image(10 * number + frame) for frame in range(5)]


def big(number: int) -> Image.Image:
    return example_image(number, 32)


# Wan, SkyReels


def without_ftfy(kind: Any, parts: dict[str, Any], **more: Any) -> DiffusionPipeline:
    """For pipelines that mend text with ftfy, which the project does not need."""
    module = sys.modules[kind.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)  # type: ignore[attr-defined]
    return kind(**parts, **more)


def wan_autoencoder() -> diffusers.AutoencoderKLWan:
    """2x down in space and in time, 4 channels."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SEEING: dict[str, Any] = {"in_channels": 10, "image_dim": WIDTH, "added_kv_proj_dim": 24}


def wan_parts(transformer: Any) -> dict[str, Any]:
    return {"transformer": transformer, "scheduler": flow(), "vae": wan_autoencoder(), **t5_text()}


def image_encoder() -> dict[str, Any]:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    processor = transformers.CLIPImageProcessorPil(size=16, crop_size=16)
    return {
        "image_encoder": transformers.CLIPVisionModelWithProjection(config),
        "image_processor": processor,
    }


@entry(**FILM, num_frames=5)
def wan() -> diffusers.WanPipeline:
    return diffusers.WanPipeline(**wan_parts(diffusers.WanTransformer3DModel(**WAN)))


@entry(**FILM, num_frames=5)
def wan_two_transformers() -> diffusers.WanPipeline:
    """Wan 2.2: one transformer for the noisy steps, and one for the others."""
    second = diffusers.WanTransformer3DModel(**WAN)
    parts = wan_parts(diffusers.WanTransformer3DModel(**WAN))
    return diffusers.WanPipeline(**parts, transformer_2=second, boundary_ratio=0.875)


@entry(**FILM, num_frames=5)
def wan_timestep_per_token() -> diffusers.WanPipeline:
    """Wan 2.2 of 5B."""
    parts = wan_parts(diffusers.WanTransformer3DModel(**WAN))
    return diffusers.WanPipeline(**parts, expand_timesteps=True)


@entry(**FILM, num_frames=5, image=example_image)
def wan_image_to_video() -> diffusers.WanImageToVideoPipeline:
    parts = wan_parts(diffusers.WanTransformer3DModel(**WAN | SEEING))
    return without_ftfy(diffusers.WanImageToVideoPipeline, parts, **image_encoder())


@entry(**FILM, video=film, strength=strength)
def wan_video_to_video() -> diffusers.WanVideoToVideoPipeline:
    return without_ftfy(
        diffusers.WanVideoToVideoPipeline, wan_parts(diffusers.WanTransformer3DModel(**WAN))
    )


@entry(**FILM, num_frames=5, video=film)
def wan_vace() -> diffusers.WanVACEPipeline:
    transformer = diffusers.WanVACETransformer3DModel(
        **WAN, vace_layers=[0, 1], vace_in_channels=4 + 4 + 4
    )
    return without_ftfy(diffusers.WanVACEPipeline, wan_parts(transformer))


@entry(**FILM, num_frames=5)
def sky_reels_v2() -> diffusers.SkyReelsV2Pipeline:
    return without_ftfy(
        diffusers.SkyReelsV2Pipeline, wan_parts(diffusers.SkyReelsV2Transformer3DModel(**WAN))
    )


@entry(**FILM, num_frames=5, image=example_image)
def sky_reels_v2_image_to_video() -> diffusers.SkyReelsV2ImageToVideoPipeline:
    parts = wan_parts(diffusers.SkyReelsV2Transformer3DModel(**WAN | SEEING))
    return without_ftfy(diffusers.SkyReelsV2ImageToVideoPipeline, parts, **image_encoder())


@entry(**FILM, num_frames=5, base_num_frames=5)
def sky_reels_v2_diffusion_forcing() -> diffusers.SkyReelsV2DiffusionForcingPipeline:
    parts = wan_parts(diffusers.SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True))
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    return without_ftfy(
        diffusers.SkyReelsV2DiffusionForcingPipeline, parts | {"scheduler": scheduler}
    )


@entry(**FILM, num_frames=5, video=film)
def lucy_edit() -> diffusers.LucyEditPipeline:
    parts = wan_parts(diffusers.WanTransformer3DModel(**WAN | {"in_channels": 8}))
    return without_ftfy(diffusers.LucyEditPipeline, parts, expand_timesteps=True)


@entry(**FILM, num_frames=5, image=example_image)
def chrono_edit() -> diffusers.ChronoEditPipeline:
    parts = wan_parts(diffusers.ChronoEditTransformer3DModel(**WAN | SEEING))
    return without_ftfy(diffusers.ChronoEditPipeline, parts, **image_encoder())


@entry(**FILM, num_frames=5)
def any_flow() -> diffusers.AnyFlowPipeline:
    config = {name: value for name, value in WAN.items() if name != "qk_norm"}
    parts = wan_parts(diffusers.AnyFlowTransformer3DModel(**config))
    return without_ftfy(
        diffusers.AnyFlowPipeline, parts | {"scheduler": diffusers.FlowMapEulerDiscreteScheduler()}
    )


FORCING = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


@entry(**FILM, num_frames=5, base_num_frames=5, image=example_image)
def sky_reels_v2_diffusion_forcing_image_to_video() -> (
    diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline
):
    parts = wan_parts(diffusers.SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True))
    return without_ftfy(
        diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline, parts | {"scheduler": FORCING}
    )


@entry(**FILM, num_frames=9, base_num_frames=5, overlap_history=3, video=film)
def sky_reels_v2_diffusion_forcing_video_to_video() -> (
    diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline
):
    parts = wan_parts(diffusers.SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True))
    return without_ftfy(
        diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline, parts | {"scheduler": FORCING}
    )


# LTX


def ltx_parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return {"transformer": transformer, "scheduler": flow(), "vae": vae, **t5_text()}


LTX: dict[str, Any] = {**FILM, "height": 32, "width": 32, "num_frames": 9}


@entry(**LTX)
def ltx() -> diffusers.LTXPipeline:
    return diffusers.LTXPipeline(**ltx_parts())


@entry(**LTX, image=big)
def ltx_image_to_video() -> diffusers.LTXImageToVideoPipeline:
    return diffusers.LTXImageToVideoPipeline(**ltx_parts())


@entry(**LTX, image=big)
def ltx_condition() -> diffusers.LTXConditionPipeline:
    return diffusers.LTXConditionPipeline(**ltx_parts())


@entry(
    **LTX | {"num_frames": 17, "output_type": "latent"},
    cond_image=big,
    temporal_tile_size=16,
    temporal_overlap=8,
    negative_prompt="black",
)
def ltx_image_to_video_long() -> diffusers.LTXI2VLongMultiPromptPipeline:
    """Windows that overlap."""
    return diffusers.LTXI2VLongMultiPromptPipeline(**ltx_parts())


@entry(
    prompt=ABSENT,
    num_inference_steps=ABSENT,
    height=32,
    width=32,
    video=lambda number: film(number) * 2,
    output_type="np",
)
def ltx_latent_upsample() -> diffusers.LTXLatentUpsamplePipeline:
    """Upscales latents of LTX."""
    network = LTXLatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1)
    return diffusers.LTXLatentUpsamplePipeline(vae=ltx_parts()["vae"], latent_upsampler=network)


SANA: dict[str, Any] = {
    **FILM,
    "height": 32,
    "width": 32,
    "frames": 5,
    "use_resolution_binning": False,
    "complex_human_instruction": None,
}


def sana_parts() -> dict[str, Any]:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=8,
        rope_max_seq_len=32,
    )
    text = language_model("Gemma2", "Model")
    return {"transformer": transformer, "scheduler": flow(), "vae": wan_autoencoder(), **text}


@entry(**SANA)
def sana_video() -> diffusers.SanaVideoPipeline:
    return diffusers.SanaVideoPipeline(**sana_parts())


@entry(**SANA, image=big)
def sana_image_to_video() -> diffusers.SanaImageToVideoPipeline:
    return diffusers.SanaImageToVideoPipeline(**sana_parts())


# CogVideoX


def cog_video_x_parts(in_channels: int = 4, **config: Any) -> dict[str, Any]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=32,
        **config,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return {"transformer": transformer, "scheduler": scheduler, "vae": vae, **t5_text()}


@entry(**FILM, num_frames=5)
def cog_video_x() -> diffusers.CogVideoXPipeline:
    return diffusers.CogVideoXPipeline(**cog_video_x_parts())


@entry(**FILM, num_frames=5)
def cog_video_x_rotary() -> diffusers.CogVideoXPipeline:
    """Of 5B, with its multistep scheduler, which the pipeline hands a step more of the past."""
    parts = cog_video_x_parts(use_rotary_positional_embeddings=True)
    return diffusers.CogVideoXPipeline(**parts | {"scheduler": diffusers.CogVideoXDPMScheduler()})


@entry(**FILM, num_frames=5, image=example_image)
def cog_video_x_image_to_video() -> diffusers.CogVideoXImageToVideoPipeline:
    parts = cog_video_x_parts(8, use_rotary_positional_embeddings=True)
    return diffusers.CogVideoXImageToVideoPipeline(**parts)


@entry(**FILM, video=film, strength=strength)
def cog_video_x_video_to_video() -> diffusers.CogVideoXVideoToVideoPipeline:
    return diffusers.CogVideoXVideoToVideoPipeline(**cog_video_x_parts())


@entry(**FILM, control_video=film)
def cog_video_x_fun_control() -> diffusers.CogVideoXFunControlPipeline:
    return diffusers.CogVideoXFunControlPipeline(**cog_video_x_parts(8))
