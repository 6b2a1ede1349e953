"""Quantisation while loading: converts the setting's JSON to diffusers' configuration."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import diffusers.quantizers.auto
import torch
import transformers.quantizers.auto
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from stepweave.config import Quantization
from stepweave.errors import LoadError, shown

SETTING = "STEPWEAVE_QUANTIZATION"

# diffusers and transformers each have a configuration class for each backend
_LIBRARIES: dict[str, tuple[type, Any, Any]] = {
    "diffusers": (
        ModelMixin,
        diffusers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
        DiffusersAutoQuantizer,
    ),
    "transformers": (
        PreTrainedModel,
        transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
        AutoHfQuantizer,
    ),
}


def pipeline_quantization(
    wanted: Quantization, index: dict[str, Any], dtype: torch.dtype
) -> PipelineQuantizationConfig:
    """The configuration for `from_pretrained`, for the named components of a `model_index.json`, or
    all models. Raises LoadError, naming the component, backend or argument that does not exist or
    cannot be used here."""
    models = _models(index)
    names = list(models) if wanted.components_to_quantize is None else wanted.components_to_quantize
    mapping = {}
    for name in names:
        if name not in models:
            raise LoadError(
                f"{SETTING}: components_to_quantize has {shown(name)}; the models of "
                f"{index.get('_class_name')} are {', '.join(models)}"
            )
        mapping[name] = _component(wanted, name, models[name], dtype)
    return PipelineQuantizationConfig(quant_mapping=mapping)


def check_quantised(wanted: Quantization, pipeline: DiffusionPipeline) -> None:
    """Raise LoadError if a pipeline was loaded without the requested quantisation."""
    for name in wanted.components_to_quantize or ():
        if getattr(pipeline.components.get(name), "hf_quantizer", None) is None:
            raise LoadError(
                f"{SETTING} names {name!r}, which is not quantised in {type(pipeline).__name__}; "
                "quantise a pipeline that is made in code where it is made"
            )


def _models(index: dict[str, Any]) -> dict[str, str]:
    """The components that have weights, with their libraries."""
    models = {}
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, (list, tuple)) and entry[0] in _LIBRARIES:
            kind = getattr(importlib.import_module(entry[0]), entry[1], None)
            if isinstance(kind, type) and issubclass(kind, _LIBRARIES[entry[0]][0]):
                models[name] = entry[0]
    return models


def _component(wanted: Quantization, name: str, library: str, dtype: torch.dtype) -> Any:
    _, known, quantizer = _LIBRARIES[library]
    kind = known.get(wanted.quant_backend)
    if kind is None:
        raise LoadError(
            f"{SETTING}: quant_backend is {shown(wanted.quant_backend)}; {library} has "
            f"{', '.join(sorted(known))}"
        )
    # not all of them refuse unknown arguments
    arguments = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if name != "quant_method" and parameter.kind is not parameter.VAR_KEYWORD
    }
    called = f"{kind.__name__} of {library}"
    for argument in wanted.quant_kwargs:
        if argument not in arguments:
            names = ", ".join(arguments)
            raise LoadError(
                f"{SETTING}: quant_kwargs has {shown(argument)}; {called} takes {names}"
            )
    for argument, parameter in arguments.items():
        if parameter.default is parameter.empty and argument not in wanted.quant_kwargs:
            raise LoadError(f"{SETTING}: quant_kwargs lacks {argument!r}, which {called} needs")
    try:
        config = kind.from_dict(dict(wanted.quant_kwargs))
        quantizer.from_config(config, pre_quantized=False).validate_environment(
            torch_dtype=dtype, dtype=dtype, device_map=None, weights_only=None
        )
    except Exception as error:  # each backend has its own
        reason = str(error) or type(error).__name__
        raise LoadError(
            f"{SETTING}: {wanted.quant_backend} cannot quantise {name!r}: {reason.splitlines()[0]}"
        ) from error
    return config
