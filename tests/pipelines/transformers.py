"""Transformers of their own kind, one or two pipelines each: PixArt, Sana, Lumina, CogView,
AuraFlow, HunyuanDiT, DiT, aMUSEd."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from torch import nn

from tests.pipelines.registry import ABSENT, entry, example_image, mask
from tests.pipelines.transformers_parts import (
    deep_autoencoder,
    dynamic,
    flow,
    language_model,
    plain_autoencoder,
    strength,
    t5_text,
    t5_tokenizer,
    without_noise,
)
from tests.support.tiny import NOISE_SCHEDULE, WIDTH, autoencoder, clip

SIZE: dict[str, Any] = {"height": 16, "width": 16, "output_type": "np"}
TEXT: dict[str, Any] = {**SIZE, "guidance_scale": 5.0, "max_sequence_length": 32}
FREE: dict[str, Any] = {**TEXT, "use_resolution_binning": False, "clean_caption": False}

# PixArt


def pixart_parts(sample_size: int, num_attention_heads: int = 2) -> dict[str, Any]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=num_attention_heads,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=8 * num_attention_heads,
        norm_num_groups=4,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return {"transformer": transformer, "scheduler": scheduler, "vae": autoencoder(), **t5_text()}


@entry(**FREE)
def pixart_alpha() -> diffusers.PixArtAlphaPipeline:
    """With the size of the image as a condition, which comes with a sample size of 128."""
    return diffusers.PixArtAlphaPipeline(**pixart_parts(128, num_attention_heads=3))


@entry(**FREE)
def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    return diffusers.PixArtSigmaPipeline(**pixart_parts(8))


# Sana


def sana_parts(**config: Any) -> dict[str, Any]:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        **config,
    )
    return {
        "transformer": transformer,
        "vae": deep_autoencoder(),
        **language_model("Gemma2", "Model"),
    }


SANA: dict[str, Any] = {**FREE, "height": 32, "width": 32, "complex_human_instruction": []}


@entry(**SANA)
def sana() -> diffusers.SanaPipeline:
    return diffusers.SanaPipeline(**sana_parts(), scheduler=flow())


SPRINT: dict[str, Any] = {
    **SANA,
    "num_inference_steps": lambda number: (2, 4, 3, 1, 5, 2)[number],
    "intermediate_timesteps": None,
}


@entry(**SPRINT)
def sana_sprint() -> diffusers.SanaSprintPipeline:
    parts = sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return diffusers.SanaSprintPipeline(**parts, scheduler=diffusers.SCMScheduler())


@entry(
    **SPRINT | {"num_inference_steps": lambda number: number + 2},
    image=lambda number: example_image(number, 32),
    strength=strength,
)
def sana_sprint_img2img() -> diffusers.SanaSprintImg2ImgPipeline:
    parts = sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return diffusers.SanaSprintImg2ImgPipeline(**parts, scheduler=diffusers.SCMScheduler())


# Lumina


@entry(**TEXT, clean_caption=False)
def lumina() -> diffusers.LuminaPipeline:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    nn.init.normal_(transformer.pad_token)  # which is left as the memory was
    text = language_model("Gemma", "Model")
    return diffusers.LuminaPipeline(
        transformer=transformer, scheduler=flow(), vae=autoencoder(), **text
    )


@entry(**TEXT, system_prompt="Draw")
def lumina2() -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=WIDTH,
    )
    text = language_model("Gemma2", "Model")
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=dynamic(), vae=plain_autoencoder(), **text
    )


# CogView


@entry(**TEXT)
def cogview3_plus() -> diffusers.CogView3PlusPipeline:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return diffusers.CogView3PlusPipeline(
        transformer=transformer, scheduler=scheduler, vae=autoencoder(), **t5_text()
    )


def cogview4_parts(in_channels: int) -> dict[str, Any]:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=in_channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(8, 8),
        sample_size=8,
    )
    scheduler = dynamic(base_shift=0.25, max_shift=0.75, base_image_seq_len=256)
    vae = without_noise(autoencoder())  # its sampling does not use the generator
    text = language_model("Glm", "Model", partial_rotary_factor=0.5)
    return {"transformer": transformer, "scheduler": scheduler, "vae": vae, **text}


@entry(**TEXT)
def cogview4() -> diffusers.CogView4Pipeline:
    """Its captions are padded to a multiple of 16 tokens."""
    return diffusers.CogView4Pipeline(**cogview4_parts(4))


@entry(**TEXT, control_image=example_image)
def cogview4_control() -> diffusers.CogView4ControlPipeline:
    return diffusers.CogView4ControlPipeline(**cogview4_parts(8))


# AuraFlow, HunyuanDiT


@entry(**TEXT)
def aura_flow() -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=transformer, scheduler=flow(), vae=autoencoder(), **t5_text()
    )


@entry(
    height=32,
    width=32,
    output_type="np",
    guidance_scale=5.0,
    use_resolution_binning=False,
    target_size=(32, 32),
)
def hunyuan_dit() -> diffusers.HunyuanDiTPipeline:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
        hidden_size=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    tokenizer = t5_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=transformer,
        scheduler=diffusers.DDPMScheduler(**NOISE_SCHEDULE),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
            latent_channels=4,
        ),  # it counts on 8x down
        text_encoder=transformers.BertModel(config),
        tokenizer=tokenizer,
        **t5_text("_2"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# DiT


@entry(prompt=ABSENT, class_labels=lambda number: [number], guidance_scale=4.0, output_type="np")
def dit() -> diffusers.DiTPipeline:
    """Makes one of ten classes; takes no text."""
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(
        transformer=transformer, vae=autoencoder(), scheduler=diffusers.DDIMScheduler()
    )


# aMUSEd


def amused_parts() -> dict[str, Any]:
    """It fills in masked codes; its transformer takes no time."""
    transformer = diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH,
        vocab_size=32,
        codebook_size=16,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    vqvae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=8,
        norm_num_groups=2,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    scheduler = diffusers.AmusedScheduler(mask_token_id=31)
    return {"transformer": transformer, "vqvae": vqvae, "scheduler": scheduler, **clip()}


@entry(**SIZE, guidance_scale=5.0)
def amused() -> diffusers.AmusedPipeline:
    return diffusers.AmusedPipeline(**amused_parts())


@entry(output_type="np", guidance_scale=5.0, image=example_image, strength=strength)
def amused_img2img() -> diffusers.AmusedImg2ImgPipeline:
    return diffusers.AmusedImg2ImgPipeline(**amused_parts())


@entry(
    output_type="np", guidance_scale=5.0, image=example_image, mask_image=mask, strength=strength
)
def amused_inpaint() -> diffusers.AmusedInpaintPipeline:
    return diffusers.AmusedInpaintPipeline(**amused_parts())
