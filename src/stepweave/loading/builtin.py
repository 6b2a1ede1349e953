"""Built-in presets for distilled models, whose pipelines' defaults (50 steps with guidance) give
bad images.

A model is recognised by its configuration alone: the pipeline's class, and members of
`model_index.json` and of its components' configurations. Names of directories and repositories are
only used to exclude models whose distillation was undone, since their configuration is unchanged.

Models that have the same configuration as their undistilled base have no preset: Stable Diffusion
3.5 Large Turbo, SDXL-Lightning, Hyper-SD and others. LatentConsistencyModelPipeline and
SanaSprintPipeline need none: their defaults fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepweave.config.preset import Preset
from stepweave.loading.components import INDEX, read_index

_SOME = object()  # any value but null
_INDEX = "model_index"
_CONFIGS = ("config.json", "scheduler_config.json")
_UNDONE = re.compile(r"de-?distil|undistil|libre-?flux|open-?flux|de-?turbo", re.IGNORECASE)

_ANCESTRAL = ("EulerAncestralDiscreteScheduler",)
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_TURBO = {
    "unet.sample_size": 64,
    "unet.time_cond_proj_dim": None,
    "scheduler.timestep_spacing": "trailing",
    "scheduler.prediction_type": "epsilon",
}


@dataclass(frozen=True)
class BuiltIn:
    """A preset, the signs of its models, and the page that documents it.

    `signs` map members of configurations, such as `unet.sample_size`, to a value, or to a tuple of
    possible values. A missing member has the value None.
    """

    name: str
    card: str
    pipelines: tuple[str, ...]
    signs: Mapping[str, Any]
    preset: Preset


@dataclass(frozen=True)
class Recognised:
    """A preset that fits, and the signs by which it was recognised."""

    built_in: BuiltIn
    signs: str

    @property
    def preset(self) -> Preset:
        return self.built_in.preset.named(f"built-in preset {self.built_in.name}")


BUILT_IN = (
    BuiltIn(
        "sdxl-turbo",
        "https://huggingface.co/stabilityai/sdxl-turbo",
        ("StableDiffusionXLPipeline",),
        {**_TURBO, "unet.cross_attention_dim": 2048, "scheduler._class_name": _ANCESTRAL},
        Preset(width=512, height=512, num_inference_steps=4, guidance_scale=0.0),
    ),
    BuiltIn(
        "sd-turbo",
        "https://huggingface.co/stabilityai/sd-turbo",
        ("StableDiffusionPipeline",),
        {**_TURBO, "unet.cross_attention_dim": 1024, "scheduler._class_name": _EULER},
        Preset(width=512, height=512, num_inference_steps=4, guidance_scale=0.0),
    ),
    BuiltIn(
        "flux-schnell",
        "https://huggingface.co/black-forest-labs/FLUX.1-schnell",
        ("FluxPipeline",),
        {
            "transformer._class_name": "FluxTransformer2DModel",
            "transformer.guidance_embeds": False,
            "transformer.num_layers": 19,
            "transformer.num_single_layers": 38,
            "scheduler._class_name": "FlowMatchEulerDiscreteScheduler",
            "scheduler.use_dynamic_shifting": False,
            "scheduler.shift": 1.0,
        },
        Preset(num_inference_steps=4, guidance_scale=0.0, call={"max_sequence_length": 256}),
    ),
    BuiltIn(
        "flux2-klein",
        "https://huggingface.co/black-forest-labs/FLUX.2-klein-4B",
        ("Flux2KleinPipeline",),
        {f"{_INDEX}.is_distilled": True},
        Preset(num_inference_steps=4, guidance_scale=1.0),
    ),
    BuiltIn(
        "krea2-turbo",
        "https://huggingface.co/docs/diffusers/main/en/api/pipelines/krea2",
        ("Krea2Pipeline",),
        {f"{_INDEX}.is_distilled": True},
        Preset(num_inference_steps=8, guidance_scale=0.0),
    ),
    BuiltIn(
        "hunyuan-image-distilled",
        "https://huggingface.co/docs/diffusers/main/en/api/pipelines/hunyuanimage21",
        ("HunyuanImagePipeline",),
        {"transformer.use_meanflow": True, "transformer.guidance_embeds": True},
        Preset(num_inference_steps=8),
    ),
    BuiltIn(
        "z-image-turbo",
        "https://huggingface.co/Tongyi-MAI/Z-Image-Turbo",
        ("ZImagePipeline",),
        {
            "scheduler._class_name": "FlowMatchEulerDiscreteScheduler",
            "scheduler.use_dynamic_shifting": False,
            "scheduler.shift": 3.0,  # 6 in the undistilled model
        },
        Preset(num_inference_steps=9, guidance_scale=0.0),
    ),
    BuiltIn(
        "lcm",  # guidance is an input of the UNet
        "https://huggingface.co/latent-consistency/lcm-sdxl",
        ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        {"scheduler._class_name": "LCMScheduler", "unet.time_cond_proj_dim": _SOME},
        Preset(num_inference_steps=4, guidance_scale=8.0),
    ),
    BuiltIn(
        "lcm-lora",  # fused into a model
        "https://huggingface.co/latent-consistency/lcm-lora-sdxl",
        ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        {
            "scheduler._class_name": "LCMScheduler",
            "unet._class_name": "UNet2DConditionModel",
            "unet.time_cond_proj_dim": None,
        },
        Preset(num_inference_steps=4, guidance_scale=1.0),
    ),
    BuiltIn(
        "pixart-lcm",
        "https://huggingface.co/PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
        ("PixArtAlphaPipeline",),
        {"scheduler._class_name": "LCMScheduler"},
        Preset(num_inference_steps=4, guidance_scale=0.0),
    ),
)


def recognise(folder: Path, name: str) -> Recognised | None:
    """The built-in preset for the model `name` in a directory. Raises LoadError if there is no
    `model_index.json`."""
    configs = {_INDEX: read_index(folder)}
    for entry in (entry for entry in folder.iterdir() if entry.is_dir()):
        for file in _CONFIGS:
            configs.setdefault(entry.name, {}).update(_read(entry / file))
    names = (name, *(str(config.get("_name_or_path", "")) for config in configs.values()))
    return recognise_configs(configs, names)


def recognise_configs(
    configs: Mapping[str, Mapping[str, Any]], names: Iterable[str] = ()
) -> Recognised | None:
    """The built-in preset for a model with these configurations, by component; `model_index` is
    the pipeline's."""
    if any(_UNDONE.search(name) for name in names):
        return None
    kind = configs.get(_INDEX, {}).get("_class_name")
    for built_in in BUILT_IN:
        if kind in built_in.pipelines and all(
            _has(configs, sign, value) for sign, value in built_in.signs.items()
        ):
            signs = ", ".join(f"{sign}={_value(configs, sign)}" for sign in built_in.signs)
            return Recognised(built_in, f"{INDEX} names {kind}, {signs}")
    return None


def _has(configs: Mapping[str, Mapping[str, Any]], sign: str, wanted: Any) -> bool:
    value = _value(configs, sign)
    if wanted is _SOME:
        return value is not None
    if isinstance(wanted, bool) or isinstance(value, bool):  # 0 is not False
        return value is wanted
    return value in wanted if isinstance(wanted, tuple) else bool(value == wanted)


def _value(configs: Mapping[str, Mapping[str, Any]], sign: str) -> Any:
    component, _, member = sign.partition(".")
    return configs.get(component, {}).get(member)


def _read(file: Path) -> dict[str, Any]:
    """A configuration, or {} if it cannot be read: other checks report that."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
