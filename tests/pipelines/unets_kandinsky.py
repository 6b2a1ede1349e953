"""Kandinsky 2.1, which gives its decoder the prompt beside the image's embedding."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from tests.pipelines.parts import NUMBERS, strength
from tests.pipelines.registry import entry, mask
from tests.pipelines.transformers_parts import t5_tokenizer
from tests.pipelines.unets_priors import CANVAS, EMBEDDED, PRIOR, combined, decoder, photo, prior
from tests.support.tiny import WIDTH


def prompted(**config: Any) -> dict[str, Any]:
    """`unets_priors.decoder` with the text encoder that has XLM-RoBERTa's shape, and another
    tokenizer."""
    tokenizer = t5_tokenizer()
    settings = MCLIPConfig(
        transformerDimSize=WIDTH,
        imageDimSize=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=80,
    )
    parts = decoder(
        encoder_hid_dim_type="text_image_proj", addition_embed_type="text_image", **config
    )
    return {**parts, "text_encoder": MultilingualCLIP(settings), "tokenizer": tokenizer}


GIVEN = {name: value for name, value in EMBEDDED.items() if name != "prompt"}


def masked(number: int) -> Any:
    return mask(number, 32)


@entry(**NUMBERS, guidance_scale=4.0)
def kandinsky_prior() -> diffusers.KandinskyPriorPipeline:
    return diffusers.KandinskyPriorPipeline(**prior())


@entry(**NUMBERS, **CANVAS, **GIVEN, guidance_scale=4.0)
def kandinsky_text() -> diffusers.KandinskyPipeline:
    return diffusers.KandinskyPipeline(**prompted())


@entry(**NUMBERS, **CANVAS, **GIVEN, guidance_scale=4.0, image=photo, strength=strength)
def kandinsky_img2img() -> diffusers.KandinskyImg2ImgPipeline:
    return diffusers.KandinskyImg2ImgPipeline(**prompted())


@entry(**NUMBERS, **CANVAS, **GIVEN, guidance_scale=4.0, image=photo, mask_image=masked)
def kandinsky_inpaint() -> diffusers.KandinskyInpaintPipeline:
    return diffusers.KandinskyInpaintPipeline(**prompted(in_channels=9))


@entry(**NUMBERS, **CANVAS, **PRIOR, guidance_scale=4.0)
def kandinsky_combined_text() -> diffusers.KandinskyCombinedPipeline:
    return diffusers.KandinskyCombinedPipeline(**combined(prompted()))


@entry(**NUMBERS, **CANVAS, **PRIOR, guidance_scale=4.0, image=photo, strength=strength)
def kandinsky_combined_img2img() -> diffusers.KandinskyImg2ImgCombinedPipeline:
    return diffusers.KandinskyImg2ImgCombinedPipeline(**combined(prompted()))


@entry(**NUMBERS, **CANVAS, **PRIOR, guidance_scale=4.0, image=photo, mask_image=masked)
def kandinsky_combined_inpaint() -> diffusers.KandinskyInpaintCombinedPipeline:
    return diffusers.KandinskyInpaintCombinedPipeline(**combined(prompted(in_channels=9)))
