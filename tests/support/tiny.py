"""Tiny, randomly initialised pipelines of diffusers' real classes: made in memory, deterministic,
milliseconds per step.

    for family in FAMILIES.values():
        pipeline = family.build() images = pipeline(**family.arguments("a red circle",
        seed=1)).images  # (1, height, width, 3), floats in [0, 1]

The images are noise, but they depend on every input: prompt, seed, steps, guidance and size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from tools.shapes.networks import make_tokenizer

STEPS = 4
SIDE = 16  # pixels, of all but Stable Cascade
WIDTH = 16  # of every text encoder

# Schedulers: a class and what its from_config takes besides the pipeline's own configuration

Schedulers = dict[str, tuple[type, dict[str, Any]]]

DPM = {"algorithm_type": "dpmsolver++"}
FLOW_PREDICTION = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

DIFFUSION: Schedulers = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "EulerAncestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "DPM++2M": (DPMSolverMultistepScheduler, DPM),
    "DPM++2M-Karras": (DPMSolverMultistepScheduler, DPM | {"use_karras_sigmas": True}),
    "DPM++2M-SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
}
# without stochastic_sampling=True: no pipeline gives the generator to step, so that noise is the
# global generator's
FLOW_SIGMAS: Schedulers = {  # for pipelines that pass sigmas
    "FlowMatchEuler": (FlowMatchEulerDiscreteScheduler, {}),
    "FlowMatchEuler-Karras": (FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "UniPC": (diffusers.UniPCMultistepScheduler, FLOW_PREDICTION),
}
# that pass mu
FLOW_MU: Schedulers = FLOW_SIGMAS | {
    "DPM++2M": (DPMSolverMultistepScheduler, FLOW_PREDICTION | DPM)
}
# that pass neither
FLOW: Schedulers = FLOW_MU | {"FlowMatchHeun": (diffusers.FlowMatchHeunDiscreteScheduler, {})}
CASCADE: Schedulers = {"DDPMWuerstchen": (diffusers.DDPMWuerstchenScheduler, {})}
# Families


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of pipeline, cheap arguments of its call, and its schedulers."""

    name: str
    build: Callable[[], Any]
    # besides prompt, num_inference_steps and generator; its height and width may be doubled
    call: dict[str, Any]
    schedulers: Schedulers

    def arguments(
        self, prompt: str, *, seed: int = 0, steps: int = STEPS, **changes: Any
    ) -> dict[str, Any]:
        """The keyword arguments of a call, with a new generator."""
        generator = torch.Generator().manual_seed(seed)
        return {
            "prompt": prompt,
            "num_inference_steps": steps,
            "generator": generator,
            **self.call,
            **changes,
        }

    def build_with(self, scheduler: str) -> Any:
        """The pipeline with one of `schedulers` instead of its own, swapped as users do."""
        pipeline = self.build()
        kind, changes = self.schedulers[scheduler]
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
        return pipeline


FAMILIES: dict[str, Family] = {}


def cases() -> list[tuple[Family, str]]:
    """Every family with every scheduler it takes."""
    return [(family, scheduler) for family in FAMILIES.values() for scheduler in family.schedulers]


def networks(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [
        component for component in pipeline.components.values() if isinstance(component, nn.Module)
    ]


def with_fixed(kind: Any, **attributes: Any) -> Any:
    """The pipeline class, in which these attributes have such values whatever it sets: those are
    for real models, and are not saved."""
    for name, value in attributes.items():
        setattr(kind, name, property(lambda _, value=value: value, lambda _, ignored: None))
    return kind


@torch.no_grad()
def enliven(network: nn.Module) -> None:
    """Make every input have an effect: replace zero weights, from which training starts, by random
    ones, and enlarge the others."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
        elif parameter.ndim > 1:
            parameter.mul_(1.5)


def family(schedulers: Schedulers, **call: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a builder; its pipelines are deterministic, in eval mode and quiet, and the caller's
    RNG is restored."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(build)
        def built() -> Any:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed the accelerators too
                torch.default_generator.manual_seed(0)
                pipeline = build()
                for network in networks(pipeline):
                    enliven(network.eval())
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        arguments = {"output_type": "np", "height": SIDE, "width": SIDE, **call}
        FAMILIES[build.__name__] = Family(build.__name__, built, arguments, schedulers)
        return built

    return register


@family(DIFFUSION, guidance_scale=5.0)
def stable_diffusion() -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(**diffusion_parts(), requires_safety_checker=False)


@family(
    DIFFUSION,
    guidance_scale=5.0,
    image=torch.linspace(0, 1, 3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE),
)
def controlnet_sd() -> DiffusionPipeline:
    controlnet = diffusers.ControlNetModel(
        **DOWN_BLOCKS, cross_attention_dim=WIDTH, conditioning_embedding_out_channels=(4, 8)
    )
    return diffusers.StableDiffusionControlNetPipeline(
        **diffusion_parts(), controlnet=controlnet, requires_safety_checker=False
    )


@family(DIFFUSION, guidance_scale=5.0)
def stable_diffusion_xl() -> DiffusionPipeline:
    network = unet(
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading"),
        vae=autoencoder(),
        **clip(projection=False),
        **clip("_2"),
        add_watermarker=False,
    )


@family(FLOW, guidance_scale=5.0, max_sequence_length=16)
def stable_diffusion_3() -> DiffusionPipeline:
    return sd3(FlowMatchEulerDiscreteScheduler(shift=3.0))


@family(FLOW_MU, guidance_scale=5.0, max_sequence_length=16)
def stable_diffusion_3_dynamic() -> DiffusionPipeline:
    return sd3(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


@family(FLOW_SIGMAS, guidance_scale=3.5, max_sequence_length=16)
def flux() -> DiffusionPipeline:
    """Guidance as an input, as in FLUX.1-dev."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("!"), ord("~") + 1))]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -2.0) for piece in pieces], extra_ids=0)
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        **clip(projection=False),
        text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
    )


@family(CASCADE, height=84, width=84, prior_num_inference_steps=STEPS, prior_guidance_scale=4.0)
def stable_cascade() -> DiffusionPipeline:
    """84 pixels: the prior's latent is ceil(84 / 42.67) = 2 wide, the decoder's int(2 * 10.67) =
    21, the image 4 times that."""
    shared: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 8,
        "conditioning_dim": WIDTH,
        "block_out_channels": (16, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": WIDTH,
    }
    prior = diffusers.StableCascadeUNet(
        clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH, switch_level=(False,), **shared
    )
    decoder = diffusers.StableCascadeUNet(
        effnet_in_channels=4, timestep_conditioning_type=("sca",), **shared
    )
    vqgan = PaellaVQModel(
        embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=16, scale_factor=0.003
    )
    # the pipeline clamps to [0, 1] and shifts nothing
    nn.init.constant_(vqgan.out_block[0].bias, 0.5)
    return diffusers.StableCascadeCombinedPipeline(
        **clip(),
        decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=vqgan,
        **{f"prior_{name}": part for name, part in clip().items()},
        prior_prior=prior,
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )


@family(FLOW_SIGMAS)
def hunyuan_image() -> DiffusionPipeline:
    """Its guiders carry momentum from step to step; quoted words in the prompt choose the second,
    and ByT5."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        spatial_compression_ratio=2,
        block_out_channels=(32, 32),
        sample_size=SIDE,
        scaling_factor=0.75,
    )
    tokenizer = transformers.ByT5Tokenizer()
    # to which it pads; 1000 and 128 are slow
    kind = with_fixed(
        diffusers.HunyuanImagePipeline, tokenizer_max_length=16, tokenizer_2_max_length=16
    )
    pipeline: DiffusionPipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        **qwen(),
        text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
        transformer=transformer,
        guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
    )
    return pipeline


@family(FLOW_SIGMAS, negative_prompt=" ", true_cfg_scale=4.0)
def qwen_image() -> DiffusionPipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=vae, **qwen(), transformer=transformer
    )


# Parts

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DOWN_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


def clip(suffix: str = "", *, projection: bool = True) -> dict[str, Any]:
    """A CLIP text encoder of two layers; its tokenizer has the words of the embedded model and
    truncates at 16 tokens."""
    tokenizer = make_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return {f"text_encoder{suffix}": kind(config), f"tokenizer{suffix}": tokenizer}


def t5(
    tokenizer: transformers.PreTrainedTokenizerBase, d_model: int = WIDTH
) -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=d_model, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config)


def qwen() -> dict[str, Any]:
    """Qwen2.5-VL; the template that the pipelines put before the prompt has 34 tokens, as many as
    they drop afterwards."""
    words = (
        "system user Describe the image by detailing the color shape size texture quantity text "
        "spatial relationships"
        " of the objects and background"
    )
    vocabulary = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in words.split():
        for form in (word, "Ġ" + word):  # the latter is the former after a space
            while len(pieces := BPE(vocabulary, merges).tokenize(form)) > 1:
                merges.append((pieces[0].value, pieces[1].value))
                vocabulary.setdefault(pieces[0].value + pieces[1].value, len(vocabulary))
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, additional_special_tokens=specials
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "initializer_range": 0.5,  # the pipelines read a hidden state before the norm
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer,
    }


def autoencoder(**config: Any) -> diffusers.AutoencoderKL:
    """2x down, 4 channels."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=SIDE, **config,
    )  # fmt: skip


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    up_blocks = ("CrossAttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, up_block_types=up_blocks, **DOWN_BLOCKS, **config
    )


def diffusion_parts() -> dict[str, Any]:
    """What the pipelines of Stable Diffusion 1.5 share."""
    return {
        "unet": unet(cross_attention_dim=WIDTH),
        "scheduler": diffusers.DDIMScheduler(
            **NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False
        ),
        "vae": autoencoder(),
        **clip(projection=False),
        "safety_checker": None,
        "feature_extractor": None,
    }


def sd3(scheduler: FlowMatchEulerDiscreteScheduler) -> DiffusionPipeline:
    """Stable Diffusion 3 without its T5."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        **clip(),
        **clip("_2"),
        text_encoder_3=None,
        tokenizer_3=None,
    )
