"""Further transformers: Bria, Ovis, LongCat, PRX, HiDream, Kandinsky 5, GLM, Ernie, VisualCloze and
others."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from tests.pipelines.registry import ABSENT, entry, example_image
from tests.pipelines.stand_ins import PromptEncoder
from tests.pipelines.transformers_flux import flux_parts
from tests.pipelines.transformers_parts import (
    DECODER,
    chat_tokenizer,
    dynamic,
    flow,
    flux2_autoencoder,
    language_model,
    plain_autoencoder,
    small_autoencoder,
    t5_text,
    vision_language,
    wide_clip,
)
from tests.pipelines.video import wan_autoencoder
from tests.support.tiny import WIDTH, qwen, qwen_image, t5, with_fixed

SIZE: dict[str, Any] = {"height": 16, "width": 16, "output_type": "np"}
TEXT: dict[str, Any] = {**SIZE, "guidance_scale": 5.0, "max_sequence_length": 48}
LIKE_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
}
ALIKE: dict[str, Any] = {
    "prompt": lambda number: f"{number} red rings"
}  # captions of one length, where they have no mask

# Bria


@entry(**TEXT)
def bria() -> diffusers.BriaPipeline:
    transformer = diffusers.BriaTransformer2DModel(**LIKE_FLUX | {"axes_dims_rope": [4, 4, 8]})
    return diffusers.BriaPipeline(
        transformer=transformer, scheduler=dynamic(), vae=plain_autoencoder(), **t5_text()
    )


FIBO: dict[str, Any] = {
    **TEXT,
    "height": 64,
    "width": 64,
    **ALIKE,
    "negative_prompt": "5 red rings",
}


def bria_fibo_parts() -> dict[str, Any]:
    config = {
        **LIKE_FLUX,
        "in_channels": 4,
        "joint_attention_dim": 2 * WIDTH,
        "axes_dims_rope": [4, 4, 8],
    }
    transformer = diffusers.BriaFiboTransformer2DModel(**config, text_encoder_dim=WIDTH)
    text = language_model("SmolLM3", vocab_size=128_001)  # an empty prompt is the last token
    return {"transformer": transformer, "scheduler": dynamic(), "vae": wan_autoencoder(), **text}


@entry(**FIBO)
def bria_fibo() -> diffusers.BriaFiboPipeline:
    """Every block of the transformer reads a layer of the language model."""
    return diffusers.BriaFiboPipeline(**bria_fibo_parts())


FIBO_EDIT: dict[str, Any] = {
    **FIBO,
    "prompt": lambda number: f'{{"edit_instruction": "{number}"}}',
    "image": lambda number: example_image(number, 64),
    "_auto_resize": False,
}


@entry(**FIBO_EDIT)
def bria_fibo_edit() -> diffusers.BriaFiboEditPipeline:
    return diffusers.BriaFiboEditPipeline(**bria_fibo_parts())


# Ovis, LongCat


@entry(**TEXT)
def ovis_image() -> diffusers.OvisImagePipeline:
    transformer = diffusers.OvisImageTransformer2DModel(**LIKE_FLUX, out_channels=16)
    text = language_model("Qwen3", "Model")
    # the chat template here puts nothing before the prompt
    kind = with_fixed(diffusers.OvisImagePipeline, user_prompt_begin_id=0)
    return kind(transformer=transformer, scheduler=dynamic(), vae=plain_autoencoder(), **text)


@entry(**SIZE, guidance_scale=5.0, enable_prompt_rewrite=False, negative_prompt="black")
def long_cat_image() -> diffusers.LongCatImagePipeline:
    transformer = diffusers.LongCatImageTransformer2DModel(
        **LIKE_FLUX | {"axes_dims_rope": [4, 4, 8], "in_channels": 64}, pooled_projection_dim=WIDTH
    )
    text = qwen()
    return with_fixed(diffusers.LongCatImagePipeline, tokenizer_max_length=48)(
        transformer=transformer,
        scheduler=dynamic(),
        vae=small_autoencoder(latent_channels=16),
        text_processor=vision_language()["processor"],
        **text,
    )


# PRX


def prx_parts(channels: int) -> dict[str, Any]:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=channels,
        patch_size=2,
        context_in_dim=WIDTH,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = 48
    config = transformers.T5GemmaModuleConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    whole = transformers.T5GemmaConfig(encoder=config, is_encoder_decoder=False)
    return {
        "transformer": transformer,
        "scheduler": flow(),
        "text_encoder": PromptEncoder(whole.encoder),
        "tokenizer": tokenizer,
    }


@entry(**SIZE, guidance_scale=5.0, use_resolution_binning=False)
def prx() -> diffusers.PRXPipeline:
    return mended(diffusers.PRXPipeline, prx_parts(4), vae=small_autoencoder())


@entry(**SIZE, guidance_scale=5.0, use_resolution_binning=False)
def prx_pixel() -> diffusers.PRXPixelPipeline:
    """No autoencoder."""
    return mended(
        diffusers.PRXPixelPipeline, prx_parts(3), default_sample_size=16, prompt_max_tokens=48
    )


def mended(kind: Any, parts: dict[str, Any], **more: Any) -> DiffusionPipeline:
    """For pipelines that mend text with ftfy, which the project does not need."""
    module = sys.modules[kind.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)  # type: ignore[attr-defined]
    return kind(**parts, **more)


# HiDream


@entry(**TEXT)
def hi_dream_image() -> diffusers.HiDreamImagePipeline:
    """Four text encoders; its experts are chosen token by token."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    llama = {f"{name}_4": part for name, part in language_model("Llama").items()}
    llama["tokenizer_4"].pad_token = "<|im_end|>"
    text = {**wide_clip(), **wide_clip("_2"), **t5_text("_3"), **llama}
    # it draws nothing smaller
    kind = with_fixed(diffusers.HiDreamImagePipeline, default_sample_size=8)
    return kind(transformer=transformer, scheduler=flow(), vae=plain_autoencoder(), **text)


# Kandinsky 5, GLM, Ernie


KANDINSKY: dict[str, Any] = {
    **TEXT,
    "height": 32,
    "width": 32,
    **ALIKE,
    "negative_prompt": "5 red rings",
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
    return mended(
        with_fixed(kind, resolutions=[(32, 32)]),
        {"transformer": transformer, "scheduler": flow(), "vae": small_autoencoder(blocks=4)},
        text_encoder=vision_language()["text_encoder"],
        tokenizer=vision_language()["processor"],
        **wide_clip("_2", projection=False),
    )


@entry(**KANDINSKY)
def kandinsky5_text_to_image() -> diffusers.Kandinsky5T2IPipeline:
    return kandinsky5(diffusers.Kandinsky5T2IPipeline)


@entry(**KANDINSKY | {"max_sequence_length": 600}, image=lambda number: example_image(number, 32))
def kandinsky5_image_to_image() -> diffusers.Kandinsky5I2IPipeline:
    return kandinsky5(diffusers.Kandinsky5I2IPipeline, visual_cond=True)


def prior_tokens(number: int) -> Any:
    """What the language model would draw first."""
    return torch.randint(0, 32, (1, 16), generator=torch.Generator().manual_seed(number))


@entry(**TEXT, prior_token_ids=prior_tokens, prompt=lambda number: f'a "{number}"')
def glm_image() -> diffusers.GlmImagePipeline:
    """With a given first draft, which otherwise a language model makes token by token."""
    transformer = diffusers.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=32,
    )
    tokenizer = transformers.ByT5Tokenizer()
    return diffusers.GlmImagePipeline(
        transformer=transformer,
        scheduler=dynamic(),
        vae=small_autoencoder(latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        processor=None,
        vision_language_encoder=None,
    )


def ernie_parts() -> dict[str, Any]:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 2, 2),
    )
    text = language_model("Mistral", "Model")
    return {"transformer": transformer, "scheduler": flow(), "vae": flux2_autoencoder(), **text}


@entry(**SIZE, guidance_scale=5.0, **ALIKE)
def ernie_image() -> diffusers.ErnieImagePipeline:
    return diffusers.ErnieImagePipeline(**ernie_parts())


# VisualCloze


CLOZE: dict[str, Any] = {
    "prompt": ABSENT,
    "task_prompt": "each row is a pair",
    "content_prompt": lambda number: f"{number} rings",
    "image": lambda number: [
        [example_image(number), example_image(number + 6)],
        [example_image(number + 12), None],
    ],
    "guidance_scale": 30.0,
    "max_sequence_length": 320,
    "output_type": "np",
}


@entry(**CLOZE, upsampling_height=16, upsampling_width=16, upsampling_strength=0.4)
def visual_cloze() -> diffusers.VisualClozePipeline:
    pipeline = diffusers.VisualClozePipeline(**flux_parts(16 + 16 + 16), resolution=16)
    for part in (pipeline.generation_pipe, pipeline.upsampling_pipe):
        part.set_progress_bar_config(disable=True)
    return pipeline


@entry(**CLOZE)
def visual_cloze_generation() -> diffusers.VisualClozeGenerationPipeline:
    parts = flux_parts(16 + 16 + 16)
    return diffusers.VisualClozeGenerationPipeline(**parts, resolution=16)


# Krea


def krea2_parts() -> dict[str, Any]:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    parts = {
        name: part for name, part in qwen_image().components.items() if name in ("vae", "scheduler")
    }
    return {
        **parts,
        "transformer": transformer,
        "text_encoder": qwen3_vl(1000),
        "tokenizer": qwen()["tokenizer"],
    }


@entry(**TEXT, negative_prompt="black")
def krea2() -> diffusers.Krea2Pipeline:
    """A transformer of its own reads several layers of the language model."""
    return diffusers.Krea2Pipeline(**krea2_parts(), text_encoder_select_layers=(1, 2))


def qwen3_vl(tokens: int) -> transformers.Qwen3VLModel:
    """With so many tokens in its vocabulary."""
    config = transformers.Qwen3VLConfig(
        text_config={**DECODER, "vocab_size": tokens, "rope_parameters": qwen_rope()},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    return transformers.Qwen3VLModel(config)


def qwen_rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
