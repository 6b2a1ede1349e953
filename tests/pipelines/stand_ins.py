"""Stand-ins for components that need packages which are not here; like those, they can be saved and
loaded."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from diffusers.pipelines.prx import T5GemmaEncoder

# diffusers looks in the module of a component for the base class that loads it
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

__all__ = [
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "ProcessorMixin",
    "PromptEncoder",
    "Tokenizer",
    "VisionProcessor",
]

IMAGE_PAD = "<|image_pad|>"


class VisionProcessor(ProcessorMixin):
    """Text and images for Qwen-VL. transformers' own processor wants one of videos, and that
    torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(image_processor, tokenizer, **options)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)

    @classmethod
    def of(cls, tokenizer: Any, patch: int = 14, **config: Any) -> VisionProcessor:
        """With images of two by two patches."""
        pixels = (2 * patch) ** 2
        images = transformers.Qwen2VLImageProcessorPil(
            patch_size=patch, min_pixels=pixels, max_pixels=pixels, **config
        )
        return cls(images, tokenizer, chat_template=tokenizer.chat_template)

    def __call__(
        self, text: Any = None, images: Any = None, **options: Any
    ) -> transformers.BatchFeature:
        texts = [text] if isinstance(text, str) else list(text)
        found: dict[str, Any] = {}
        if images is not None:
            found = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = iter((found["image_grid_thw"].prod(dim=1) // 4).tolist())
            for i, one in enumerate(texts):
                first, *rest = one.split(IMAGE_PAD)
                texts[i] = first + "".join(IMAGE_PAD * next(counts) + piece for piece in rest)
        options.pop("videos", None)
        return transformers.BatchFeature({**self.tokenizer(texts, **options), **found})

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(*args, **options)


class Tokenizer(PreTrainedTokenizerFast):
    """Of bytes. ChatGLM's own reads a file of sentencepiece's and was written for transformers
    4."""

    def __call__(self, text: Any, **options: Any) -> transformers.BatchEncoding:
        tokens = super().__call__(text, **options)
        if isinstance(tokens["attention_mask"], torch.Tensor):
            tokens["position_ids"] = (tokens["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return tokens


class PromptEncoder(T5GemmaEncoder):
    """Saves the configuration of the whole T5Gemma, as PRX's models have it; that is what diffusers
    reads."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        super().save_pretrained(save_directory, **options)
        whole = transformers.T5GemmaConfig(encoder=self.config, is_encoder_decoder=False)
        whole.save_pretrained(save_directory)
