"""Parts that several tiny pipelines share: text encoders, tokenizers and autoencoders besides those
of tests.support.tiny."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers.processors import TemplateProcessing

from tests.pipelines.stand_ins import VisionProcessor
from tests.support.tiny import SIDE, WIDTH, autoencoder, clip, qwen, t5

# Skips the system's messages, which would take hundreds of tokens here
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{% if m['content'] is string "
    "%}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% "
    "endfor %}{% endif %}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
DECODER: dict[str, Any] = {  # of every language model
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
}


def strength(number: int) -> float:
    """How much of an image to paint anew."""
    return 0.5 + 0.08 * number


def t5_tokenizer() -> Any:
    """A token for each character."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("!"), ord("~") + 1))]
    return transformers.T5Tokenizer(vocab=[(piece, -2.0) for piece in pieces], extra_ids=0)


def t5_text(suffix: str = "") -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {f"text_encoder{suffix}": t5(tokenizer), f"tokenizer{suffix}": tokenizer}


def chat_tokenizer() -> Any:
    """Of bytes, with a chat template; puts a token before the text, so that none is empty."""
    tokenizer = qwen()["tokenizer"]
    start = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def language_model(
    kind: str = "Qwen3", suffix: str = "ForCausalLM", **config: Any
) -> dict[str, Any]:
    """A decoder of transformers by its prefix, as text_encoder and tokenizer."""
    tokenizer = chat_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        **DECODER,
        **config,
    }
    model = getattr(transformers, kind + suffix)(getattr(transformers, f"{kind}Config")(**settings))
    return {"text_encoder": model, "tokenizer": tokenizer}


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def dynamic(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return flow(use_dynamic_shifting=True, **config)


def plain_autoencoder(**config: Any) -> diffusers.AutoencoderKL:
    """As Flux has it: 2x down, 4 channels, no quantising convolutions."""
    given = {"scaling_factor": 0.3611, "shift_factor": 0.1159, **config}
    return autoencoder(use_quant_conv=False, use_post_quant_conv=False, **given)


def flux2_autoencoder() -> diffusers.AutoencoderKLFlux2:
    """2x down, 4 channels, and 2x2 of them side by side."""
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIDE,
    )


def deep_autoencoder() -> diffusers.AutoencoderDC:
    """4x down, 4 channels."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )


@torch.no_grad()
def without_noise(vae: diffusers.AutoencoderKL) -> diffusers.AutoencoderKL:
    """Let the encoder's distribution have no width: some pipelines sample it with the global
    generator."""
    half = vae.quant_conv.out_channels // 2
    vae.quant_conv.weight[half:] = 0
    vae.quant_conv.bias[half:] = -30
    return vae


def vision_language() -> dict[str, Any]:
    """Qwen2.5-VL that sees, with its processor."""
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(VISION_TOKENS)}, replace_extra_special_tokens=False
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for token, name in VISION_TOKENS.items()}
    old = qwen()["text_encoder"].config
    text = {**old.text_config.to_dict(), "vocab_size": len(tokenizer)}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=old.vision_config.to_dict(), **ids
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return {
        "text_encoder": model,
        "tokenizer": tokenizer,
        "processor": VisionProcessor.of(tokenizer),
    }


VISION_TOKENS = {
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}


def small_autoencoder(blocks: int = 2, **config: Any) -> diffusers.AutoencoderKL:
    """4 channels; every block but one halves the size."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * (blocks - 1) + (8,),
        norm_num_groups=2,
        sample_size=SIDE,
        **{"latent_channels": 4, "shift_factor": 0.1, **config},
    )


def wide_clip(suffix: str = "", *, projection: bool = True) -> dict[str, Any]:
    """For pipelines that pad to 77 tokens whatever the tokenizer says."""
    text = clip(suffix, projection=projection)
    name = f"text_encoder{suffix}"
    config = {**text[name].config.to_dict(), "max_position_embeddings": 77}
    return {**text, name: type(text[name])(transformers.CLIPTextConfig(**config))}
