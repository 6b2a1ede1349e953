"""Modular pipelines: the blocks of diffusers with tiny components."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.modular_pipelines.ideogram4 import encoders as ideogram_encoders
from diffusers.modular_pipelines.krea2 import encoders as krea_encoders
from diffusers.modular_pipelines.qwenimage import encoders as qwen_encoders

from tests.pipelines.registry import ABSENT, GUIDANCE, STEPS, entry, example_image, mask
from tests.pipelines.transformers_flux import FLUX, FLUX2, flux2_parts, flux_parts, reference
from tests.pipelines.transformers_more import ALIKE, ernie_parts, krea2_parts, qwen3_vl
from tests.pipelines.transformers_parts import (
    chat_tokenizer,
    flow,
    flux2_autoencoder,
    language_model,
    strength,
    t5_tokenizer,
    vision_language,
)
from tests.pipelines.transformers_qwen import layered_parts, layers, z_image_parts
from tests.support.tiny import WIDTH, qwen_image, sd3, stable_diffusion_xl, t5

SIZE: dict[str, Any] = {"height": 16, "width": 16, "output_type": "np", "output": "images"}
MODULAR: dict[str, Any] = {"output": "images"}


def made(kind: Any, **parts: Any) -> Any:
    """A pipeline with the class's own blocks, and those of these components that it takes."""
    pipeline = kind()
    known = pipeline.component_names
    pipeline.update_components(**{name: part for name, part in parts.items() if name in known})
    return pipeline


# Flux


@entry(**FLUX, **MODULAR)
def flux_modular() -> diffusers.FluxModularPipeline:
    return made(diffusers.FluxModularPipeline, **flux_parts())


@entry(**FLUX, **MODULAR, image=example_image, strength=strength)
def flux_modular_img2img() -> diffusers.FluxModularPipeline:
    return made(diffusers.FluxModularPipeline, **flux_parts())


@entry(**FLUX, **MODULAR, image=example_image, max_area=256, _auto_resize=False)
def flux_kontext_modular() -> diffusers.FluxKontextModularPipeline:
    return made(diffusers.FluxKontextModularPipeline, **flux_parts())


# Flux.2

KLEIN: dict[str, Any] = {
    **{name: value for name, value in FLUX2.items() if name != "guidance_scale"}, **MODULAR
}  # fmt: skip


@entry(**FLUX2, **MODULAR)
def flux2_modular() -> diffusers.Flux2ModularPipeline:
    return made(diffusers.Flux2ModularPipeline, **flux2_parts(**language_model("Mistral")))


@entry(**FLUX2, **MODULAR, image=reference)
def flux2_modular_edit() -> diffusers.Flux2ModularPipeline:
    return made(diffusers.Flux2ModularPipeline, **flux2_parts(**language_model("Mistral")))


@entry(**KLEIN)
def flux2_klein_modular() -> diffusers.Flux2KleinModularPipeline:
    return made(diffusers.Flux2KleinModularPipeline, **flux2_parts(**language_model()))


@entry(**KLEIN, image=reference)
def flux2_klein_modular_edit() -> diffusers.Flux2KleinModularPipeline:
    return made(diffusers.Flux2KleinModularPipeline, **flux2_parts(**language_model()))


@entry(**KLEIN)
def flux2_klein_base_modular() -> diffusers.Flux2KleinBaseModularPipeline:
    """With a guider."""
    return made(diffusers.Flux2KleinBaseModularPipeline, **flux2_parts(**language_model()))


# Stable Diffusion


def sd3_parts() -> dict[str, Any]:
    """With a T5 as wide as both CLIPs."""
    tokenizer = t5_tokenizer()
    encoder = t5(tokenizer, d_model=2 * WIDTH)
    return {**sd3(flow()).components, "text_encoder_3": encoder, "tokenizer_3": tokenizer}


@entry(**SIZE, max_sequence_length=16)
def stable_diffusion_3_modular() -> diffusers.StableDiffusion3ModularPipeline:
    return made(diffusers.StableDiffusion3ModularPipeline, **sd3_parts())


@entry(**SIZE, max_sequence_length=16, image=example_image, strength=strength)
def stable_diffusion_3_modular_img2img() -> diffusers.StableDiffusion3ModularPipeline:
    return made(diffusers.StableDiffusion3ModularPipeline, **sd3_parts())


@entry(**SIZE, negative_prompt="black")
def stable_diffusion_xl_modular() -> diffusers.StableDiffusionXLModularPipeline:
    return made(diffusers.StableDiffusionXLModularPipeline, **stable_diffusion_xl().components)


@entry(**SIZE, image=example_image, strength=strength)
def stable_diffusion_xl_modular_img2img() -> diffusers.StableDiffusionXLModularPipeline:
    return made(diffusers.StableDiffusionXLModularPipeline, **stable_diffusion_xl().components)


@entry(**SIZE, image=example_image, mask_image=mask, strength=strength)
def stable_diffusion_xl_modular_inpaint() -> diffusers.StableDiffusionXLModularPipeline:
    return made(diffusers.StableDiffusionXLModularPipeline, **stable_diffusion_xl().components)


# Qwen-Image


def small_images() -> None:
    """The blocks scale every image to 1024 x 1024; here to 16 x 16."""
    qwen_encoders.calculate_dimensions = lambda area, ratio: (16, 16, None)


@entry(**SIZE, negative_prompt="black")
def qwen_image_modular() -> diffusers.QwenImageModularPipeline:
    return made(diffusers.QwenImageModularPipeline, **qwen_image().components)


@entry(**SIZE, image=example_image, strength=strength)
def qwen_image_modular_img2img() -> diffusers.QwenImageModularPipeline:
    return made(diffusers.QwenImageModularPipeline, **qwen_image().components)


# it lays the image over the result, for which that must be one
OVERLAID: dict[str, Any] = {**SIZE, "output_type": "pil", "output": "latents"}


@entry(**OVERLAID, image=example_image, mask_image=mask, strength=strength)
def qwen_image_modular_inpaint() -> diffusers.QwenImageModularPipeline:
    """Its latents."""
    return made(diffusers.QwenImageModularPipeline, **qwen_image().components)


def edit_parts() -> dict[str, Any]:
    small_images()
    return {**qwen_image().components, **vision_language()}


@entry(**SIZE, image=example_image)
def qwen_image_edit_modular() -> diffusers.QwenImageEditModularPipeline:
    return made(diffusers.QwenImageEditModularPipeline, **edit_parts())


@entry(**SIZE, image=lambda number: [example_image(number), example_image(number + 6)])
def qwen_image_edit_plus_modular() -> diffusers.QwenImageEditPlusModularPipeline:
    """With two references."""
    return made(diffusers.QwenImageEditPlusModularPipeline, **edit_parts())


LAYERED: dict[str, Any] = {**SIZE, "height": ABSENT, "width": ABSENT, "image": layers, "layers": 2}


@entry(**LAYERED, prompt=lambda number: f"{number} rings")
def qwen_image_layered_modular() -> diffusers.QwenImageLayeredModularPipeline:
    small_images()
    return made(diffusers.QwenImageLayeredModularPipeline, **layered_parts())


# Z-Image


@entry(**SIZE, max_sequence_length=48)
def z_image_modular() -> diffusers.ZImageModularPipeline:
    return made(diffusers.ZImageModularPipeline, **z_image_parts())


@entry(**SIZE, max_sequence_length=48, image=example_image, strength=strength)
def z_image_modular_img2img() -> diffusers.ZImageModularPipeline:
    return made(diffusers.ZImageModularPipeline, **z_image_parts())


# Ernie, Krea 2, Anima, Ideogram 4


@entry(**SIZE, **ALIKE)
def ernie_image_modular() -> diffusers.ErnieImageModularPipeline:
    return made(diffusers.ErnieImageModularPipeline, **ernie_parts())


def krea2_modular_parts() -> dict[str, Any]:
    """A language model with fewer layers than the blocks read."""
    krea_encoders.KREA2_TEXT_ENCODER_SELECT_LAYERS = (1, 2)
    return krea2_parts()


@entry(**SIZE, max_sequence_length=48, negative_prompt="black")
def krea2_modular() -> diffusers.Krea2ModularPipeline:
    return made(diffusers.Krea2ModularPipeline, **krea2_modular_parts())


@entry(**SIZE, max_sequence_length=48)
def krea2_turbo_modular() -> diffusers.Krea2TurboModularPipeline:
    return made(diffusers.Krea2TurboModularPipeline, **krea2_modular_parts())


def anima_parts() -> dict[str, Any]:
    parts = qwen_image().components
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    tokenizer = t5_tokenizer()
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=WIDTH,
        target_dim=WIDTH,
        model_dim=WIDTH,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=len(tokenizer),
        min_sequence_length=16,
    )
    return {
        "vae": parts["vae"],
        "scheduler": flow(),
        "transformer": transformer,
        "text_conditioner": conditioner,
        "t5_tokenizer": tokenizer,
        **language_model("Qwen3", "Model"),
    }


@entry(**SIZE, **ALIKE, max_sequence_length=32)
def anima_modular() -> diffusers.AnimaModularPipeline:
    return made(diffusers.AnimaModularPipeline, **anima_parts())


@entry(**SIZE, **ALIKE, max_sequence_length=32, image=example_image, strength=strength)
def anima_modular_img2img() -> diffusers.AnimaModularPipeline:
    return made(diffusers.AnimaModularPipeline, **anima_parts())


def guidance_schedule(number: int) -> tuple[float, ...]:
    """One scale for each step."""
    return (GUIDANCE[number],) * STEPS[number]


@entry(**SIZE, max_sequence_length=64, guidance_schedule=guidance_schedule)
def ideogram4_modular() -> diffusers.Ideogram4ModularPipeline:
    """A transformer of its own for what has no prompt."""
    ideogram_encoders.QWEN3_VL_ACTIVATION_LAYERS = (0, 2)
    transformer = {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "adaln_dim": 8,
        "llm_features_dim": 2 * WIDTH,
        "mrope_section": (4, 2, 2),
    }
    tokenizer = chat_tokenizer()
    return made(
        diffusers.Ideogram4ModularPipeline,
        transformer=diffusers.Ideogram4Transformer2DModel(**transformer),
        unconditional_transformer=diffusers.Ideogram4Transformer2DModel(**transformer),
        text_encoder=qwen3_vl(len(tokenizer)),
        tokenizer=tokenizer,
        prompt_enhancer_head=diffusers.Ideogram4PromptEnhancerHead(WIDTH, len(tokenizer)),
        vae=flux2_autoencoder(),
        scheduler=flow(),
    )
