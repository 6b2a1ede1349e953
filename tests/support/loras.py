"""Random LoRAs with an effect, in files as diffusers saves them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from stepweave.compat.row_adapters import LayerHook
from tests.support.project import ROOT

NAME = "made"


def shapes() -> Any:
    """The embedded model, as diffusers loads it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        ROOT / "models" / "shapes", text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_lora(
    file: Path,
    build: Callable[[], Any],
    targets: Mapping[str, Sequence[str]],
    *,
    rank: int = 4,
    alpha: float = 6.0,
    seed: int = 0,
    size: float = 1.0,
    told: bool = False,
    **config: Any,
) -> Path:
    """Write a random adapter for layers of each component of what `build` makes, whose names end
    as `targets` say. `size` multiplies its part; `told`: the file says its configuration."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pipeline, tensors, metadata = build(), {}, {}
    for component, layers in targets.items():
        module = getattr(pipeline, component)
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(layers), init_lora_weights=False, **config
        )
        module.add_adapter(lora, NAME)
        values = get_peft_model_state_dict(module, adapter_name=NAME)
        if component.startswith("text_encoder"):
            values = convert_state_dict_to_diffusers(values)
        for key, value in values.items():
            scaled = value * size if "lora_B" in key or "lora.up" in key else value
            tensors[f"{component}.{key}"] = scaled.contiguous()
        if told:
            given = module.peft_config[NAME].to_dict()
            metadata |= {
                f"{component}.{key}": sorted(value) if isinstance(value, set) else value
                for key, value in given.items()
            }
    header = {LORA_ADAPTER_METADATA_KEY: json.dumps(metadata)} if told else {}
    save_file(tensors, file, metadata={"format": "pt", **header})
    return file


def plain(pipeline: Any, files: Mapping[str, Path]) -> Callable[[Sequence[tuple[str, float]]], Any]:
    """Loads adapters into a pipeline as diffusers does. Returns what sets those of the next call,
    which is the pipeline's own."""
    for name, file in files.items():
        with warnings.catch_warnings(action="ignore"):  # PEFT's, about several adapters
            pipeline.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True
            )

    def using(lora: Sequence[tuple[str, float]]) -> Any:
        if lora:
            pipeline.enable_lora()
            pipeline.set_adapters([name for name, _ in lora], [scale for _, scale in lora])
        else:
            pipeline.disable_lora()
        return pipeline

    return using


def hooks_of(pipeline: Any) -> list[Any]:
    """The hooks of adapters on a pipeline's layers."""
    return [
        hook
        for component in pipeline.components.values()
        if isinstance(component, nn.Module)
        for part in component.modules()
        for hook in part._forward_hooks.values()
        if isinstance(hook, LayerHook)
    ]
