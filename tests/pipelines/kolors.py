"""Kolors: Stable Diffusion XL's UNet with ChatGLM."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from tests.pipelines.adapters_pag import MID, PAG
from tests.pipelines.parts import NUMBERS, SQUARE, XL_BLOCKS, diffusion_xl, strength
from tests.pipelines.registry import entry, example_image
from tests.pipelines.stand_ins import Tokenizer
from tests.support.tiny import WIDTH, qwen


def tokenizer() -> Tokenizer:
    plain = qwen()["tokenizer"]
    return Tokenizer(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        padding_side="left",
        model_max_length=plain.model_max_length,
    )


def kolors() -> dict[str, Any]:
    # it warns of what torch deprecated
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    words = tokenizer()
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(words),
        hidden_size=WIDTH,
        ffn_hidden_size=WIDTH,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=256,  # to which prompts are cut
        add_qkv_bias=True,
        original_rope=True,
    )
    network = ChatGLMModel(config, empty_init=False)
    for parameter in network.parameters():  # some are left as the memory was
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else nn.init.ones_(parameter)
    parts = diffusion_xl(
        **XL_BLOCKS
        | {
            "cross_attention_dim": WIDTH,
            "encoder_hid_dim": WIDTH,
            "encoder_hid_dim_type": "text_proj",
        }
    )
    kept = {name: part for name, part in parts.items() if name in ("unet", "scheduler", "vae")}
    return {**kept, "text_encoder": network, "tokenizer": words}


KOLORS: dict[str, Any] = {"max_sequence_length": 32}


@entry(**SQUARE, **NUMBERS, **KOLORS, guidance_scale=5.0)
def kolors_text() -> diffusers.KolorsPipeline:
    return diffusers.KolorsPipeline(**kolors())


@entry(**NUMBERS, **KOLORS, guidance_scale=5.0, image=example_image, strength=strength)
def kolors_img2img() -> diffusers.KolorsImg2ImgPipeline:
    return diffusers.KolorsImg2ImgPipeline(**kolors())


@entry(**PAG, **SQUARE, **KOLORS)
def kolors_pag() -> diffusers.KolorsPAGPipeline:
    return diffusers.KolorsPAGPipeline(**kolors(), **MID)
