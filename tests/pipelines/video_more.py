"""Further pipelines of films: Mochi, HunyuanVideo, Kandinsky 5, Allegro, Latte, Cosmos."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline

from tests.pipelines.registry import entry, example_image
from tests.pipelines.transformers_parts import (
    flow,
    language_model,
    t5_text,
    vision_language,
    wide_clip,
)
from tests.pipelines.video import FILM, big, wan_autoencoder, without_ftfy
from tests.support.tiny import WIDTH, autoencoder, qwen, t5


@entry(**FILM | {"height": 32, "width": 32}, num_frames=7)
def mochi() -> diffusers.MochiPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=32,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    scheduler = flow(shift=1.0, invert_sigmas=True)
    return diffusers.MochiPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, **t5_text()
    )


HUNYUAN: dict[str, Any] = {
    **FILM,
    "num_frames": 5,
    "max_sequence_length": 48,
    "prompt_template": {"template": "{}", "crop_start": 0},
}


def hunyuan_video_parts(in_channels: int = 4, **config: Any) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
        **config,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    text = {**language_model("Llama", "Model"), **wide_clip("_2", projection=False)}
    return {"transformer": transformer, "scheduler": flow(), "vae": vae, **text}


@entry(**HUNYUAN)
def hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    """Guidance as an input."""
    return diffusers.HunyuanVideoPipeline(**hunyuan_video_parts())


@entry(**HUNYUAN, true_cfg_scale=4.0, negative_prompt="black")
def hunyuan_video_true_cfg() -> diffusers.HunyuanVideoPipeline:
    return diffusers.HunyuanVideoPipeline(**hunyuan_video_parts())


@entry(**HUNYUAN, image=example_image, true_cfg_scale=4.0, negative_prompt="black")
def hunyuan_skyreels_image_to_video() -> diffusers.HunyuanSkyreelsImageToVideoPipeline:
    return diffusers.HunyuanSkyreelsImageToVideoPipeline(**hunyuan_video_parts(8))


@entry(**FILM, num_frames=24, clean_caption=False)
def allegro() -> diffusers.AllegroPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=16,
    )
    vae.enable_tiling()  # it can do no other, nor fewer than 24 frames
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    return diffusers.AllegroPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, **t5_text()
    )


def latte_pipeline() -> DiffusionPipeline:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    scheduler = diffusers.DDIMScheduler()
    return diffusers.LattePipeline(
        transformer=transformer, scheduler=scheduler, vae=autoencoder(), **t5_text()
    )


LATTE: dict[str, Any] = {
    "height": 16,
    "width": 16,
    "video_length": 2,
    "output_type": "np",
    "guidance_scale": 5.0,
    "clean_caption": False,
}


@entry(**LATTE, prompt=lambda number: f"{number} red rings")
def latte() -> diffusers.LattePipeline:
    """Captions are cut to their length and have no mask, so only captions of equal length share."""
    return latte_pipeline()


@entry(**LATTE, mask_feature=False)
def latte_padded_captions() -> diffusers.LattePipeline:
    return latte_pipeline()


def hunyuan_video15_of(kind: Any, task_type: str, **more: Any) -> DiffusionPipeline:
    """Two text encoders, the second for quoted words; a guider."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type=task_type,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    tokenizer = transformers.ByT5Tokenizer()
    pipeline: Any = without_ftfy(
        kind,
        {
            "transformer": transformer,
            "scheduler": flow(),
            "vae": vae,
            **language_model("Qwen2", "Model"),
        },
        text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        **more,
    )
    pipeline.prompt_template_encode_start_idx = 0
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = 32
    return pipeline


@entry(height=16, width=16, num_frames=5, output_type="np")
def hunyuan_video15() -> diffusers.HunyuanVideo15Pipeline:
    return hunyuan_video15_of(diffusers.HunyuanVideo15Pipeline, task_type="t2v")


KANDINSKY: dict[str, Any] = {
    **FILM,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 48,
    "negative_prompt": "5 red rings",
    # captions have no mask, so only those of one length share
    "prompt": lambda number: f"{number} red rings",
}


def kandinsky5(kind: Any, **config: Any) -> DiffusionPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
        **config,
    )
    parts = {
        name: part for name, part in hunyuan_video_parts().items() if name in ("scheduler", "vae")
    }
    pipeline: Any = without_ftfy(
        kind,
        {**parts, "transformer": transformer},
        text_encoder=qwen()["text_encoder"],
        tokenizer=vision_language()["processor"],
        **wide_clip("_2", projection=False),
    )
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "{}", 0
    return pipeline


@entry(**KANDINSKY)
def kandinsky5_text_to_video() -> diffusers.Kandinsky5T2VPipeline:
    return kandinsky5(diffusers.Kandinsky5T2VPipeline)


class Anything:
    """In place of Cosmos' guard, which is a large model of its own."""

    def to(self, *args: Any) -> Anything:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_parts(in_channels: int, **config: Any) -> dict[str, Any]:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        # which takes torchvision
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        **config,
    )
    return {"transformer": transformer, "safety_checker": Anything(), **t5_text()}


def cosmos_autoencoder() -> diffusers.AutoencoderKLCosmos:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )  # fmt: skip


# latents, since the guard is shown whole numbers, of which the least difference may make another
WORLD: dict[str, Any] = {
    **FILM,
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "output_type": "latent",
}


@entry(**WORLD)
def cosmos_text_to_world() -> diffusers.CosmosTextToWorldPipeline:
    parts = {
        **cosmos_parts(4),
        "scheduler": diffusers.EDMEulerScheduler(),
        "vae": cosmos_autoencoder(),
    }
    return diffusers.CosmosTextToWorldPipeline(**parts)


@entry(**WORLD, image=big)
def cosmos_video_to_world() -> diffusers.CosmosVideoToWorldPipeline:
    parts = {
        **cosmos_parts(5),
        "scheduler": diffusers.EDMEulerScheduler(),
        "vae": cosmos_autoencoder(),
    }
    return diffusers.CosmosVideoToWorldPipeline(**parts)


@entry(**FILM | {"output_type": "latent"})
def cosmos2_text_to_image() -> diffusers.Cosmos2TextToImagePipeline:
    parts = cosmos_parts(4, extra_pos_embed_type=None)
    scheduler = flow(shift=1.0, use_karras_sigmas=True)
    return diffusers.Cosmos2TextToImagePipeline(**parts, scheduler=scheduler, vae=wan_autoencoder())


# From images and films


@entry(**WORLD | {"num_frames": 5}, image=big)
def cosmos2_video_to_world() -> diffusers.Cosmos2VideoToWorldPipeline:
    parts = cosmos_parts(5, extra_pos_embed_type=None)
    scheduler = flow(shift=1.0, use_karras_sigmas=True)
    return diffusers.Cosmos2VideoToWorldPipeline(
        **parts, scheduler=scheduler, vae=wan_autoencoder()
    )


@entry(**KANDINSKY | {"num_frames": 21}, image=big)
def kandinsky5_image_to_video() -> diffusers.Kandinsky5I2VPipeline:
    return kandinsky5(diffusers.Kandinsky5I2VPipeline, visual_cond=True)


@entry(num_frames=5, output_type="np", image=big)
def hunyuan_video15_image_to_video() -> diffusers.HunyuanVideo15ImageToVideoPipeline:
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return hunyuan_video15_of(
        diffusers.HunyuanVideo15ImageToVideoPipeline,
        task_type="i2v",
        image_encoder=transformers.SiglipVisionModel(config),
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    )
