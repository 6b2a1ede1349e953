"""Qwen-Image's layout with random weights, with as many layers as fit a GPU.

Sizes: huggingface.co/Qwen/Qwen-Image, transformer/config.json, text_encoder/config.json.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from benchmarks.stable_diffusion import made_on, ready
from tests.support.tiny import qwen

LAYERS = 60  # of the transformer
LAYER_BYTES = 680 * 10**6  # in bfloat16
OTHER_BYTES = 24 * 10**9  # text encoder, activations of 16 rows
TEXT: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    # with the default, layers of this width amplify roundings, which trained ones do not
    "initializer_range": 0.01,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
}
VISION: dict[str, Any] = {  # not used for text to image
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 3584,
}
SHIFT: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


def layers_for(free: int) -> int:
    """How many of the transformer's layers fit in so many bytes, with the rest of the pipeline."""
    return max(1, min(LAYERS, (free - OTHER_BYTES) // LAYER_BYTES))


def qwen_image(device: torch.device, dtype: torch.dtype, layers: int) -> Any:
    with made_on(device, dtype):
        transformer = diffusers.QwenImageTransformer2DModel(num_layers=layers)
        vae = diffusers.AutoencoderKLQwenImage()
        text_encoder = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION)
        )
    return ready(
        diffusers.QwenImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SHIFT),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=qwen()["tokenizer"],
            transformer=transformer,
        )
    )
