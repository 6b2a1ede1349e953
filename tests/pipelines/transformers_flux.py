"""Stable Diffusion 3, Flux, Flux.2 and Chroma."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image

from tests.pipelines.registry import ABSENT, entry, example_image, mask
from tests.pipelines.transformers_parts import (
    dynamic,
    flow,
    flux2_autoencoder,
    language_model,
    plain_autoencoder,
    strength,
    t5_text,
)
from tests.support.tiny import WIDTH, clip, sd3

SIZE: dict[str, Any] = {"height": 16, "width": 16, "output_type": "np"}

# Stable Diffusion 3

SD3: dict[str, Any] = {**SIZE, "guidance_scale": 5.0, "max_sequence_length": 16}


@entry(**SD3)
def stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    return sd3(flow())


@entry(**SD3, negative_prompt="blue", skip_guidance_layers=[0])
def stable_diffusion_3_skip_layer_guidance() -> diffusers.StableDiffusion3Pipeline:
    return sd3(flow())


@entry(**SD3, image=example_image, strength=strength)
def stable_diffusion_3_img2img() -> diffusers.StableDiffusion3Img2ImgPipeline:
    return diffusers.StableDiffusion3Img2ImgPipeline(**sd3(flow()).components)


@entry(**SD3, image=example_image, mask_image=mask, strength=strength)
def stable_diffusion_3_inpaint() -> diffusers.StableDiffusion3InpaintPipeline:
    """Takes transformers of 16 channels only."""
    parts = sd3(flow()).components
    config = {**parts["transformer"].config, "in_channels": 16, "out_channels": 16}
    parts["transformer"] = diffusers.SD3Transformer2DModel(**config)
    parts["vae"] = diffusers.AutoencoderKL(**{**parts["vae"].config, "latent_channels": 16})
    return diffusers.StableDiffusion3InpaintPipeline(**parts)


# Flux

FLUX: dict[str, Any] = {**SIZE, "guidance_scale": 3.5, "max_sequence_length": 16}


def flux_parts(in_channels: int = 16, *, guidance: bool = True) -> dict[str, Any]:
    """Guidance as an input, as in FLUX.1-dev, or none, as in FLUX.1-schnell."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    text = {**clip(projection=False), **t5_text("_2")}
    return {"transformer": transformer, "scheduler": dynamic(), "vae": plain_autoencoder(), **text}


@entry(**FLUX)
def flux() -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(**flux_parts())


@entry(**FLUX | {"guidance_scale": 0})
def flux_schnell() -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(**flux_parts(guidance=False) | {"scheduler": flow(shift=1.0)})


@entry(**FLUX, true_cfg_scale=4.0, negative_prompt="black")
def flux_true_cfg() -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(**flux_parts())


@entry(**FLUX, image=example_image, strength=strength)
def flux_img2img() -> diffusers.FluxImg2ImgPipeline:
    return diffusers.FluxImg2ImgPipeline(**flux_parts())


@entry(**FLUX, image=example_image, mask_image=mask, strength=strength)
def flux_inpaint() -> diffusers.FluxInpaintPipeline:
    return diffusers.FluxInpaintPipeline(**flux_parts())


@entry(**FLUX, image=example_image, max_area=256, _auto_resize=False)
def flux_kontext() -> diffusers.FluxKontextPipeline:
    return diffusers.FluxKontextPipeline(**flux_parts())


@entry(
    **FLUX,
    image=example_image,
    mask_image=mask,
    strength=strength,
    max_area=256,
    _auto_resize=False,
)
def flux_kontext_inpaint() -> diffusers.FluxKontextInpaintPipeline:
    return diffusers.FluxKontextInpaintPipeline(**flux_parts())


@entry(**FLUX, image=example_image, mask_image=mask)
def flux_fill() -> diffusers.FluxFillPipeline:
    return diffusers.FluxFillPipeline(**flux_parts(16 + 16 + 16))


@entry(**FLUX, control_image=example_image)
def flux_control() -> diffusers.FluxControlPipeline:
    return diffusers.FluxControlPipeline(**flux_parts(32))


@entry(
    **FLUX,
    image=example_image,
    control_image=lambda number: example_image(number + 6),
    strength=strength,
)
def flux_control_img2img() -> diffusers.FluxControlImg2ImgPipeline:
    return diffusers.FluxControlImg2ImgPipeline(**flux_parts(32))


@entry(
    **FLUX,
    image=example_image,
    control_image=lambda number: example_image(number + 6),
    mask_image=mask,
    strength=strength,
)
def flux_control_inpaint() -> diffusers.FluxControlInpaintPipeline:
    return diffusers.FluxControlInpaintPipeline(**flux_parts(32))


@entry(image=example_image, num_inference_steps=ABSENT, generator=ABSENT)
def flux_prior_redux() -> diffusers.FluxPriorReduxPipeline:
    """Makes embeddings of an image, for FluxPipeline."""
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return diffusers.FluxPriorReduxPipeline(
        image_encoder=transformers.SiglipVisionModel(config),
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        image_embedder=ReduxImageEncoder(WIDTH, WIDTH),
        **clip(projection=False),
        **t5_text("_2"),
    )


# Flux.2

FLUX2: dict[str, Any] = {
    **SIZE, "guidance_scale": 4.0, "max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)
}  # fmt: skip


def reference(number: int) -> Image.Image:
    """As small as a reference may be."""
    return example_image(number, 64)


def flux2_parts(**text: Any) -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return {"transformer": transformer, "scheduler": dynamic(), "vae": flux2_autoencoder(), **text}


@entry(**FLUX2)
def flux2() -> diffusers.Flux2Pipeline:
    return diffusers.Flux2Pipeline(**flux2_parts(**language_model("Mistral")))


@entry(**FLUX2, image=reference)
def flux2_edit() -> diffusers.Flux2Pipeline:
    return diffusers.Flux2Pipeline(**flux2_parts(**language_model("Mistral")))


@entry(**FLUX2)
def flux2_klein() -> diffusers.Flux2KleinPipeline:
    return diffusers.Flux2KleinPipeline(**flux2_parts(**language_model()))


@entry(**FLUX2, image=reference)
def flux2_klein_edit() -> diffusers.Flux2KleinPipeline:
    return diffusers.Flux2KleinPipeline(**flux2_parts(**language_model()))


@entry(**FLUX2, image=example_image, mask_image=mask, strength=strength)
def flux2_klein_inpaint() -> diffusers.Flux2KleinInpaintPipeline:
    return diffusers.Flux2KleinInpaintPipeline(**flux2_parts(**language_model()))


@entry(
    **{name: value for name, value in FLUX2.items() if name != "guidance_scale"}, image=reference
)
def flux2_klein_kv() -> diffusers.Flux2KleinKVPipeline:
    """Remembers the reference's keys and values from the first step on."""
    return diffusers.Flux2KleinKVPipeline(**flux2_parts(**language_model()))


# Chroma

CHROMA: dict[str, Any] = {
    **SIZE,
    "guidance_scale": 5.0,
    "max_sequence_length": 32,
    "negative_prompt": "black",
}


def chroma_parts() -> dict[str, Any]:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return {
        "transformer": transformer,
        "scheduler": dynamic(),
        "vae": plain_autoencoder(),
        **t5_text(),
    }


@entry(**CHROMA)
def chroma() -> diffusers.ChromaPipeline:
    return diffusers.ChromaPipeline(**chroma_parts())


@entry(**CHROMA, image=example_image, strength=strength)
def chroma_img2img() -> diffusers.ChromaImg2ImgPipeline:
    return diffusers.ChromaImg2ImgPipeline(**chroma_parts())
