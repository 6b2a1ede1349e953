"""Pipelines in stages: Kandinsky, Stable Cascade, Wuerstchen, unCLIP."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import (
    PaellaVQModel,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
)
from torch import nn

from tests.pipelines.parts import NUMBERS, calm, features, parts_of, strength, unclip_prior, vision
from tests.pipelines.registry import ABSENT, entry, example_image, mask
from tests.pipelines.transformers_parts import t5_text
from tests.support.tiny import STEPS, WIDTH, clip, stable_cascade

CANVAS: dict[str, Any] = {"height": 32, "width": 32}  # the autoencoder's factor applies twice


def embedding(number: int) -> torch.Tensor:
    """What a prior would give."""
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(200 + number))


def latent(number: int, side: int = 2) -> torch.Tensor:
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(300 + number))


def photo(number: int) -> Any:
    return example_image(number, 32)


# Kandinsky 2.2


def prior() -> dict[str, Any]:
    """`unclip_prior` with the encoder of images."""
    return {**unclip_prior(), "image_encoder": vision(), **clip(), "image_processor": features()}


def decoder(**config: Any) -> dict[str, Any]:
    network = diffusers.UNet2DConditionModel(
        **{
            "in_channels": 4,
            "out_channels": 8,
            "addition_embed_type": "image",
            "layers_per_block": 1,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "norm_num_groups": 4,
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "block_out_channels": (8, 16),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "encoder_hid_dim": WIDTH,
            "encoder_hid_dim_type": "image_proj",
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 4,
            "resnet_time_scale_shift": "scale_shift",
        }
        | config
    )
    calm(network.conv_out)
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.002,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {"unet": network, "scheduler": scheduler, "movq": movq()}


def movq(blocks: int = 2) -> diffusers.VQModel:
    network = diffusers.VQModel(
        block_out_channels=(32,) * blocks,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )
    calm(network.decoder.conv_out, 0.3)
    return network


def combined(parts: dict[str, Any]) -> dict[str, Any]:
    return {**parts, **{f"prior_{name}": part for name, part in prior().items()}}


EMBEDDED: dict[str, Any] = {
    "prompt": ABSENT,
    "image_embeds": embedding,
    "negative_image_embeds": lambda number: embedding(number + 50),
}
PRIOR: dict[str, Any] = {"prior_num_inference_steps": 3, "prior_guidance_scale": 4.0}


@entry(**NUMBERS, guidance_scale=4.0)
def kandinsky_v22_prior() -> diffusers.KandinskyV22PriorPipeline:
    return diffusers.KandinskyV22PriorPipeline(**prior())


@entry(**NUMBERS, guidance_scale=4.0, image=example_image, strength=strength)
def kandinsky_v22_prior_emb2emb() -> diffusers.KandinskyV22PriorEmb2EmbPipeline:
    return diffusers.KandinskyV22PriorEmb2EmbPipeline(**prior())


@entry(**NUMBERS, **CANVAS, **EMBEDDED, guidance_scale=4.0)
def kandinsky_v22_text() -> diffusers.KandinskyV22Pipeline:
    return diffusers.KandinskyV22Pipeline(**decoder())


@entry(**NUMBERS, **CANVAS, **EMBEDDED, guidance_scale=4.0, image=photo, strength=strength)
def kandinsky_v22_img2img() -> diffusers.KandinskyV22Img2ImgPipeline:
    return diffusers.KandinskyV22Img2ImgPipeline(**decoder())


@entry(
    **NUMBERS,
    **CANVAS,
    **EMBEDDED,
    guidance_scale=4.0,
    image=photo,
    mask_image=lambda number: mask(number, 32),
)
def kandinsky_v22_inpaint() -> diffusers.KandinskyV22InpaintPipeline:
    return diffusers.KandinskyV22InpaintPipeline(**decoder(in_channels=9))


def depth(number: int) -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(400 + number))


def guided() -> dict[str, Any]:
    return decoder(in_channels=8, addition_embed_type="image_hint") | {"movq": movq(4)}


@entry(**NUMBERS, **EMBEDDED, height=64, width=64, guidance_scale=4.0, hint=depth)
def kandinsky_v22_controlnet_text() -> diffusers.KandinskyV22ControlnetPipeline:
    return diffusers.KandinskyV22ControlnetPipeline(**guided())


@entry(
    **NUMBERS,
    **EMBEDDED,
    height=64,
    width=64,
    guidance_scale=4.0,
    hint=depth,
    image=lambda number: example_image(number, 64),
    strength=strength,
)
def kandinsky_v22_controlnet_img2img() -> diffusers.KandinskyV22ControlnetImg2ImgPipeline:
    return diffusers.KandinskyV22ControlnetImg2ImgPipeline(**guided())


@entry(**NUMBERS, **CANVAS, **PRIOR, guidance_scale=4.0)
def kandinsky_v22_combined_text() -> diffusers.KandinskyV22CombinedPipeline:
    return diffusers.KandinskyV22CombinedPipeline(**combined(decoder()))


@entry(**NUMBERS, **CANVAS, **PRIOR, guidance_scale=4.0, image=photo, strength=strength)
def kandinsky_v22_combined_img2img() -> diffusers.KandinskyV22Img2ImgCombinedPipeline:
    return diffusers.KandinskyV22Img2ImgCombinedPipeline(**combined(decoder()))


@entry(
    **NUMBERS,
    **CANVAS,
    **PRIOR,
    guidance_scale=4.0,
    image=photo,
    mask_image=lambda number: mask(number, 32),
)
def kandinsky_v22_combined_inpaint() -> diffusers.KandinskyV22InpaintCombinedPipeline:
    return diffusers.KandinskyV22InpaintCombinedPipeline(**combined(decoder(in_channels=9)))


# Kandinsky 3


def kandinsky3() -> dict[str, Any]:
    network = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(32, 64), cross_attention_dim=8, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    return {**t5_text(), "unet": network, "scheduler": diffusers.DDPMScheduler(), "movq": movq()}


EVEN = ("a red star", "a big ring", "blue cross", "tiny stars", "two rings!", "red square")


def even(number: int) -> str:
    """Prompts of one length: its pooling of the prompt heeds no mask."""
    return EVEN[number]


@entry(**NUMBERS, height=16, width=16, guidance_scale=4.0)
def kandinsky3_lengths() -> diffusers.Kandinsky3Pipeline:
    """Prompts of different lengths."""
    return diffusers.Kandinsky3Pipeline(**kandinsky3())


@entry(**NUMBERS, height=16, width=16, guidance_scale=4.0, prompt=even)
def kandinsky3_text() -> diffusers.Kandinsky3Pipeline:
    return diffusers.Kandinsky3Pipeline(**kandinsky3())


@entry(**NUMBERS, guidance_scale=4.0, prompt=even, image=example_image, strength=strength)
def kandinsky3_img2img() -> diffusers.Kandinsky3Img2ImgPipeline:
    return diffusers.Kandinsky3Img2ImgPipeline(**kandinsky3())


# Stable Cascade


def cascade_prior() -> dict[str, Any]:
    parts = parts_of(stable_cascade)
    calm(parts["prior_prior"].clf, 0.02)
    return {**clip(), "prior": parts["prior_prior"], "scheduler": parts["prior_scheduler"]}


@entry(**NUMBERS, height=84, width=84, guidance_scale=4.0)
def stable_cascade_prior() -> diffusers.StableCascadePriorPipeline:
    return diffusers.StableCascadePriorPipeline(**cascade_prior())


@entry(
    **NUMBERS,
    height=84,
    width=84,
    guidance_scale=4.0,
    images=lambda number: [example_image(number)],
)
def stable_cascade_prior_images() -> diffusers.StableCascadePriorPipeline:
    """With images besides the prompt."""
    return diffusers.StableCascadePriorPipeline(
        **cascade_prior(), feature_extractor=features(), image_encoder=vision()
    )


@entry(**NUMBERS, guidance_scale=4.0, image_embeddings=latent)
def stable_cascade_decoder() -> diffusers.StableCascadeDecoderPipeline:
    parts = parts_of(stable_cascade)
    return diffusers.StableCascadeDecoderPipeline(
        **{
            name: parts[name]
            for name in ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")
        }
    )


@entry(**NUMBERS, height=84, width=84, prior_num_inference_steps=STEPS, prior_guidance_scale=4.0)
def stable_cascade_combined() -> diffusers.StableCascadeCombinedPipeline:
    return diffusers.StableCascadeCombinedPipeline(**parts_of(stable_cascade))


# Wuerstchen


def wuerstchen_prior() -> dict[str, Any]:
    network = WuerstchenPrior(c_in=4, c=8, depth=2, c_cond=WIDTH, c_r=8, nhead=2)
    calm(network.out, 0.01)
    return {**clip(projection=False), "prior": network, "scheduler": DDPMWuerstchenScheduler()}


def wuerstchen_decoder() -> dict[str, Any]:
    network = WuerstchenDiffNeXt(
        c_cond=WIDTH,
        c_hidden=[16],
        nhead=[2],
        blocks=[1],
        level_config=["CTA"],
        clip_embd=WIDTH,
        effnet_embd=4,
        c_r=16,
        inject_effnet=[True],
    )
    vqgan = PaellaVQModel(
        embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=16, scale_factor=0.003
    )
    # the pipeline clamps to [0, 1] and shifts nothing
    nn.init.constant_(vqgan.out_block[0].bias, 0.5)
    return {
        **clip(projection=False), "decoder": network, "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": vqgan,
    }  # fmt: skip


@entry(**NUMBERS, height=96, width=96, guidance_scale=4.0)
def wuerstchen_prior_stage() -> diffusers.WuerstchenPriorPipeline:
    return diffusers.WuerstchenPriorPipeline(**wuerstchen_prior(), latent_mean=1.0)


@entry(**NUMBERS, guidance_scale=4.0, image_embeddings=lambda number: latent(number, 3))
def wuerstchen_decoder_stage() -> diffusers.WuerstchenDecoderPipeline:
    return diffusers.WuerstchenDecoderPipeline(**wuerstchen_decoder())


@entry(**NUMBERS, height=96, width=96, prior_num_inference_steps=STEPS, prior_guidance_scale=4.0)
def wuerstchen_combined() -> diffusers.WuerstchenCombinedPipeline:
    parts = {f"prior_{name}": part for name, part in wuerstchen_prior().items()}
    return diffusers.WuerstchenCombinedPipeline(**wuerstchen_decoder(), **parts)
