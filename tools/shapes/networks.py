"""The untrained parts of the embedded model: standard diffusers and transformers classes, small
enough for a laptop."""

from __future__ import annotations

import re

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tools.shapes.scenes import COLOURS, HORIZONTAL, SHAPES, SIDE, SYNONYMS, VERTICAL

TOKENS = 16  # tokens per prompt, start and end included
TEXT_WIDTH = 96  # of each text encoder; the transformer sees both side by side
WIDTH = 2 * TEXT_WIDTH
LAYERS = 5
CONTROL_LAYERS = 3
LATENT_CHANNELS = 16


def make_autoencoder() -> AutoencoderKL:
    """AutoencoderKL, 8x down, 16 channels; no attention, since it would cost more than it gives on
    flat shapes."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 48, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE whose merges make each word of the grammar one token; other text
    tokenizes byte by byte.

    The merges are laid down word by word (tokenizers' own trainer breaks ties at random between
    processes).
    """
    words = [
        "a",
        "an",
        "on",
        "at",
        "the",
        "background",
        *COLOURS,
        *SHAPES,
        *HORIZONTAL[1:],
        *VERTICAL[1:],
    ]
    words += dict.fromkeys(word for group in SYNONYMS.values() for word in group)
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate([*alphabet, *(symbol + "</w>" for symbol in alphabet)])
    }
    merges: list[tuple[str, str]] = []
    for word in words:
        # earlier merges outrank later ones, so a word that is one token stays one
        while len(pieces := BPE(vocabulary, merges, end_of_word_suffix="</w>").tokenize(word)) > 1:
            merges.append((pieces[0].value, pieces[1].value))
            vocabulary.setdefault(pieces[0].value + pieces[1].value, len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A CLIP text encoder of three narrow layers; SD3 reads the last but one."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH // 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_transformer() -> SD3Transformer2DModel:
    """SD3's multimodal diffusion transformer over the 8 x 8 latent, one token per latent pixel."""
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )
    _start_as_identity(transformer)
    return transformer


def _start_as_identity(network: nn.Module) -> None:
    """adaLN-zero: every block starts as the identity (Peebles and Xie 2023,
    https://arxiv.org/abs/2212.09748, 3.2)."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and (
            re.search(r"norm\w*\.linear$", name) or name == "proj_out"
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def make_controlnet(transformer: SD3Transformer2DModel) -> SD3ControlNetModel:
    """SD3's ControlNet of three narrow blocks without text, for a transformer of
    `make_transformer`. It sees the outline's latent beside the noisy one, and shares the
    transformer's embedding of places, as pipelines do; that of times starts as the transformer's.
    """
    config = transformer.config
    controlnet = SD3ControlNetModel(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=CONTROL_LAYERS,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        joint_attention_dim=None,
        caption_projection_dim=config.caption_projection_dim,
        pooled_projection_dim=config.pooled_projection_dim,
        use_pos_embed=False,  # the transformer's
        force_zeros_for_pooled_projection=False,
    )
    controlnet.time_text_embed.load_state_dict(transformer.time_text_embed.state_dict())
    # not zeros: what its blocks give out starts as zeros already
    controlnet.pos_embed_input.proj.load_state_dict(transformer.pos_embed.proj.state_dict())
    _start_as_identity(controlnet)
    return controlnet


def make_pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """The pipeline around a trained autoencoder, its transformer and text encoders still random."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
