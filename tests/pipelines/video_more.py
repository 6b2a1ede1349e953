"""Further pipelines of films, and of sound: Mochi, HunyuanVideo, Kandinsky 5, Allegro, Latte, Cosmos, Stable Audio."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline

from tests.pipelines.registry import entry, picture
from tests.pipelines.transformers_parts import flow, language_model, t5_text, vision_language, wide_clip
from tests.pipelines.video import FILM, big, wan_autoencoder, without_ftfy
from tests.tiny import WIDTH, autoencoder, qwen, t5

_NOT_ATTEMPTED = (
    "AceStepPipeline",
    "AnyFlowFARPipeline",
    "Cosmos2_5_PredictBasePipeline",
    "Cosmos2_5_TransferPipeline",
    "Cosmos3OmniPipeline",
    "EasyAnimateControlPipeline",
    "EasyAnimateInpaintPipeline",
    "EasyAnimatePipeline",
    "HeliosPipeline",
    "HeliosPyramidPipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "HunyuanVideoFramepackPipeline",
    "HunyuanVideoImageToVideoPipeline",
    "Kandinsky6SRPipeline",
    "Kandinsky6TI2VAPipeline",
    "LTX2ConditionPipeline",
    "LTX2DFRPipeline",
    "LTX2DFRTemporalRefinePipeline",
    "LTX2HDRPipeline",
    "LTX2ImageToVideoPipeline",
    "LTX2InContextPipeline",
    "LTX2LatentUpsamplePipeline",
    "LTX2Pipeline",
    "LTX2VideoDiffusionDecodePipeline",
    "LTXI2VLongMultiPromptPipeline",
    "LTXLatentUpsamplePipeline",
    "MotifVideoImage2VideoPipeline",
    "MotifVideoPipeline",
    "SanaWMPipeline",
    "StableAudio3AudioToAudioPipeline",
    "StableAudio3InpaintPipeline",
    "StableAudio3Pipeline",
    "WanAnimatePipeline",
)
NOT_BUILT: dict[str, str] = {
    "ConsisIDPipeline": "needs OpenCV",
    **dict.fromkeys(_NOT_ATTEMPTED, "not attempted: no obstacle is known"),
}


def t5_limited() -> dict[str, Any]:
    """For pipelines that pad to the tokenizer's own length."""
    text = t5_text()
    text["tokenizer"].model_max_length = 32
    return text


@entry(**FILM | {"height": 32, "width": 32}, num_frames=7)
def mochi() -> DiffusionPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    scheduler = flow(shift=1.0, invert_sigmas=True)
    return diffusers.MochiPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **t5_text())


HUNYUAN: dict[str, Any] = {
    **FILM, "num_frames": 5, "max_sequence_length": 48, "prompt_template": {"template": "{}", "crop_start": 0}
}  # fmt: skip


def hunyuan_video_parts(in_channels: int = 4, **config: Any) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=in_channels, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, guidance_embeds=True, text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4), **config,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    text = {**language_model("Llama", "Model"), **wide_clip("_2", projection=False)}
    return {"transformer": transformer, "scheduler": flow(), "vae": vae, **text}


@entry(**HUNYUAN)
def hunyuan_video() -> DiffusionPipeline:
    """Guidance as an input."""
    return diffusers.HunyuanVideoPipeline(**hunyuan_video_parts())


@entry(**HUNYUAN, true_cfg_scale=4.0, negative_prompt="black")
def hunyuan_video_true_cfg() -> DiffusionPipeline:
    return diffusers.HunyuanVideoPipeline(**hunyuan_video_parts())


@entry(**HUNYUAN, image=picture, true_cfg_scale=4.0, negative_prompt="black")
def hunyuan_skyreels_image_to_video() -> DiffusionPipeline:
    return diffusers.HunyuanSkyreelsImageToVideoPipeline(**hunyuan_video_parts(8))


@entry(**FILM, num_frames=24, clean_caption=False)
def allegro() -> DiffusionPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=WIDTH,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    vae.enable_tiling()  # it can do no other, nor fewer than 24 frames
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    return diffusers.AllegroPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **t5_text())


def latte_pipeline() -> DiffusionPipeline:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=WIDTH,
        in_channels=4, out_channels=8, cross_attention_dim=16, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    return diffusers.LattePipeline(transformer=transformer, scheduler=scheduler, vae=autoencoder(), **t5_text())


LATTE: dict[str, Any] = {
    "height": 16, "width": 16, "video_length": 2, "output_type": "np", "guidance_scale": 5.0, "clean_caption": False
}  # fmt: skip


@entry(**LATTE, prompt=lambda number: f"{number} red rings")
def latte() -> DiffusionPipeline:
    """Captions are cut to their length, and have no mask: those of one length share."""
    return latte_pipeline()


@entry(**LATTE, mask_feature=False)
def latte_padded_captions() -> DiffusionPipeline:
    return latte_pipeline()


@entry(height=16, width=16, num_frames=5, output_type="np")
def hunyuan_video15() -> DiffusionPipeline:
    """Two text encoders, the second for quoted words; a guider."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=WIDTH, rope_axes_dim=(2, 2, 4), target_size=16,
        task_type="t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )  # fmt: skip
    tokenizer = transformers.ByT5Tokenizer()
    pipeline = without_ftfy(
        diffusers.HunyuanVideo15Pipeline,
        {"transformer": transformer, "scheduler": flow(), "vae": vae, **language_model("Qwen2", "Model")},
        text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipeline.prompt_template_encode_start_idx = 0
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = 32
    return pipeline


KANDINSKY: dict[str, Any] = {
    **FILM, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 48, "negative_prompt": "5 red rings",
    "prompt": lambda number: f"{number} red rings",  # captions have no mask, so only those of one length share
}  # fmt: skip


def kandinsky5(kind: Any, **config: Any) -> DiffusionPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=16,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4), **config,
    )  # fmt: skip
    parts = {name: part for name, part in hunyuan_video_parts().items() if name in ("scheduler", "vae")}
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
def kandinsky5_text_to_video() -> DiffusionPipeline:
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
        in_channels=in_channels, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False,  # which takes torchvision
        **config,
    )  # fmt: skip
    return {"transformer": transformer, "safety_checker": Anything(), **t5_text()}


def cosmos_autoencoder() -> diffusers.AutoencoderKLCosmos:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )  # fmt: skip


# latents, since the guard is shown whole numbers, of which the least difference may make another
WORLD: dict[str, Any] = {**FILM, "height": 32, "width": 32, "num_frames": 9, "output_type": "latent"}


@entry(**WORLD)
def cosmos_text_to_world() -> DiffusionPipeline:
    parts = {**cosmos_parts(4), "scheduler": diffusers.EDMEulerScheduler(), "vae": cosmos_autoencoder()}
    return diffusers.CosmosTextToWorldPipeline(**parts)


@entry(**WORLD, image=big)
def cosmos_video_to_world() -> DiffusionPipeline:
    parts = {**cosmos_parts(5), "scheduler": diffusers.EDMEulerScheduler(), "vae": cosmos_autoencoder()}
    return diffusers.CosmosVideoToWorldPipeline(**parts)


@entry(**FILM | {"output_type": "latent"})
def cosmos2_text_to_image() -> DiffusionPipeline:
    parts = cosmos_parts(4, extra_pos_embed_type=None)
    scheduler = flow(shift=1.0, use_karras_sigmas=True)
    return diffusers.Cosmos2TextToImagePipeline(**parts, scheduler=scheduler, vae=wan_autoencoder())


# Sound


@entry(audio_end_in_s=lambda number: 2.0 + number / 4, output_type="pt", guidance_scale=5.0)
def stable_audio() -> DiffusionPipeline:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=8, time_proj_dim=8,
        global_states_input_dim=2 * WIDTH, cross_attention_input_dim=WIDTH,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[1, 2], decoder_channels=4, decoder_input_channels=4, audio_channels=2,
        channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    return diffusers.StableAudioPipeline(
        transformer=transformer,
        vae=vae,
        projection_model=diffusers.StableAudioProjectionModel(WIDTH, WIDTH, 0, 32),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
        **t5_limited(),
    )


@entry(audio_duration_s=2.0, guidance_scale=4.0, output_type="np")
def long_cat_audio_dit() -> DiffusionPipeline:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=16,
    )
    return diffusers.LongCatAudioDiTPipeline(transformer=transformer, vae=vae, **t5_limited())


# From pictures and films


@entry(**WORLD | {"num_frames": 5}, image=big)
def cosmos2_video_to_world() -> DiffusionPipeline:
    parts = cosmos_parts(5, extra_pos_embed_type=None)
    scheduler = flow(shift=1.0, use_karras_sigmas=True)
    return diffusers.Cosmos2VideoToWorldPipeline(**parts, scheduler=scheduler, vae=wan_autoencoder())


@entry(**KANDINSKY | {"num_frames": 21}, image=big)
def kandinsky5_image_to_video() -> DiffusionPipeline:
    return kandinsky5(diffusers.Kandinsky5I2VPipeline, visual_cond=True)
