"""Video by UNets: AnimateDiff, Stable Video Diffusion, I2VGen-XL, text to video."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

from tests.pipelines.adapters import hint
from tests.pipelines.parts import (
    HINTS,
    NUMBERS,
    SQUARE,
    certain,
    controlnet,
    diffusion,
    diffusion_xl,
    features,
    strength,
    vision,
)
from tests.pipelines.registry import ABSENT, entry, example_image
from tests.support.tiny import DOWN_BLOCKS, NOISE_SCHEDULE, SIDE, WIDTH, autoencoder, clip

FRAMES = 2
CLIP: dict[str, Any] = {**NUMBERS, **SQUARE, "guidance_scale": 5.0}
MOVING: dict[str, Any] = {**CLIP, "num_frames": FRAMES}


def frames(number: int) -> list[Image.Image]:
    return [example_image(number + 10 * frame) for frame in range(FRAMES)]


def hints(number: int) -> list[Image.Image]:
    return [hint(number + 10 * frame) for frame in range(FRAMES)]


# AnimateDiff


def moving(parts: dict[str, Any], *, mid: bool = True) -> dict[str, Any]:
    """With motion between the frames of what was trained on images."""
    parts = {name: part for name, part in parts.items() if "safety_checker" not in name}
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=mid,
    )
    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    return {**parts, "motion_adapter": adapter, "scheduler": scheduler}


@entry(**MOVING)
def animate_diff_text() -> diffusers.AnimateDiffPipeline:
    return diffusers.AnimateDiffPipeline(**moving(diffusion()))


@entry(**MOVING)
def animate_diff_sdxl_text() -> diffusers.AnimateDiffSDXLPipeline:
    return diffusers.AnimateDiffSDXLPipeline(**moving(diffusion_xl(), mid=False))


@entry(**CLIP, video=frames, strength=strength)
def animate_diff_video_to_video() -> diffusers.AnimateDiffVideoToVideoPipeline:
    return diffusers.AnimateDiffVideoToVideoPipeline(**moving(diffusion()))


@entry(**MOVING, conditioning_frames=hints)
def animate_diff_control_net_text() -> diffusers.AnimateDiffControlNetPipeline:
    return diffusers.AnimateDiffControlNetPipeline(**moving(diffusion()), controlnet=controlnet())


@entry(**CLIP, video=frames, conditioning_frames=hints, strength=strength)
def animate_diff_video_to_video_control_net() -> (
    diffusers.AnimateDiffVideoToVideoControlNetPipeline
):
    return diffusers.AnimateDiffVideoToVideoControlNetPipeline(
        **moving(diffusion()), controlnet=controlnet()
    )


@entry(**MOVING, conditioning_frames=lambda number: [hint(number)], controlnet_frame_indices=[0])
def animate_diff_sparse_control_net_text() -> diffusers.AnimateDiffSparseControlNetPipeline:
    control = diffusers.SparseControlNetModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        attention_head_dim=2,
        motion_num_attention_heads=2,
        conditioning_channels=3,
        use_simplified_condition_embedding=False,
        **HINTS,
    )
    return diffusers.AnimateDiffSparseControlNetPipeline(**moving(diffusion()), controlnet=control)


@entry(**MOVING, pag_scale=2.0)
def animate_diff_pag_text() -> diffusers.AnimateDiffPAGPipeline:
    return diffusers.AnimateDiffPAGPipeline(**moving(diffusion()), pag_applied_layers=["mid"])


@entry(**MOVING, image=example_image, motion_scale=lambda number: number % 3)
def pia() -> diffusers.PIAPipeline:
    return diffusers.PIAPipeline(**moving(diffusion(in_channels=9)))


# From one image


@entry(
    **NUMBERS,
    **SQUARE,
    prompt=ABSENT,
    num_frames=FRAMES,
    image=example_image,
    fps=lambda number: 5 + number,
    motion_bucket_id=lambda number: 100 + number,
    max_guidance_scale=lambda number: (3.0, 1.0, 2.0)[number % 3],
)
def stable_video_diffusion() -> diffusers.StableVideoDiffusionPipeline:
    network = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIDE // 2,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=3 * 8,
        addition_time_embed_dim=8,
    )
    scheduler = EulerDiscreteScheduler(
        **NOISE_SCHEDULE,
        prediction_type="v_prediction",
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=7.0,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        layers_per_block=1,
    )
    return diffusers.StableVideoDiffusionPipeline(
        unet=network,
        scheduler=scheduler,
        vae=vae,
        image_encoder=vision(224),
        feature_extractor=features(),
    )


@entry(**MOVING, image=example_image, target_fps=lambda number: 8 + number, clip_skip=None)
def i2v_gen_xl() -> diffusers.I2VGenXLPipeline:
    network = diffusers.I2VGenXLUNet(
        sample_size=SIDE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        num_attention_heads=None,
        norm_num_groups=2,
    )
    parts = {
        "unet": network,
        "vae": autoencoder(),
        **clip(projection=False),
        "image_encoder": vision(),
        "scheduler": DDIMScheduler(
            beta_schedule="linear", clip_sample=False, set_alpha_to_one=False
        ),
        "feature_extractor": features(),
    }
    return diffusers.I2VGenXLPipeline(**certain(parts))


# From text, or another video


def film() -> dict[str, Any]:
    network = diffusers.UNet3DConditionModel(
        sample_size=SIDE // 2,
        cross_attention_dim=WIDTH,
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        **{
            **DOWN_BLOCKS,
            "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
            "attention_head_dim": 4,
        },
    )
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return {"unet": network, "scheduler": scheduler, "vae": autoencoder(), **clip(projection=False)}


@entry(**MOVING)
def text_to_video_sd() -> diffusers.TextToVideoSDPipeline:
    return diffusers.TextToVideoSDPipeline(**film())


@entry(**NUMBERS, guidance_scale=5.0, video=frames, strength=strength)
def video_to_video_sd() -> diffusers.VideoToVideoSDPipeline:
    return diffusers.VideoToVideoSDPipeline(**film())


@entry(
    **CLIP | {"guidance_scale": lambda number: 2.0 + number},
    video_length=FRAMES,
    t0=1,
    t1=2,
    num_inference_steps=lambda number: 4 + number,
)
def text_to_video_zero() -> diffusers.TextToVideoZeroPipeline:
    return diffusers.TextToVideoZeroPipeline(**diffusion())


@entry(**CLIP, video_length=FRAMES, t0=1, t1=2, num_inference_steps=lambda number: 4 + number)
def text_to_video_zero_sdxl() -> diffusers.TextToVideoZeroSDXLPipeline:
    return diffusers.TextToVideoZeroSDXLPipeline(**diffusion_xl(), add_watermarker=False)
