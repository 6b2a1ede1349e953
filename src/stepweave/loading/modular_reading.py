"""Makes a modular pipeline of the components in a directory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, ConfigMixin, DiffusionPipeline, ModularPipeline
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from stepweave.compat.modular import with_declared_call
from stepweave.errors import LoadError, shown
from stepweave.loading.components import SAFELY, Component, pipeline_class
from stepweave.loading.files import files_of
from stepweave.loading.modular import MODULAR_INDEX, ModularIndex, blocks_of
from stepweave.loading.variants import has_variant

_NOT_PLAIN = (DiffusionPipeline, ModularPipeline, AutoModel)
_PLAIN = (  # without weights
    ConfigMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ImageProcessingMixin,
    FeatureExtractionMixin,
)
# choose a class by a configuration; these do not read weights
_CHOOSING = (AutoTokenizer, AutoProcessor, AutoImageProcessor, AutoFeatureExtractor)


def read_modular(
    folder: Path,
    index: ModularIndex,
    components: Iterable[Component],
    variant: str | None,
    dtype: torch.dtype,
    quantization_config: Any = None,
) -> Any:
    """The pipeline of an index, whose components are in the folders of their names. Its class is
    its `call_class`.

    Not by `load_components`, which only logs what fails, and may run code of a repository.
    """
    described: Any = pipeline_class(index)
    kind = described.__base__
    pipeline = kind(blocks=copy.deepcopy(blocks_of(kind, index)))
    configs = {spec.name for spec in pipeline.blocks.expected_configs}
    pipeline.update_components(**{name: index[name] for name in configs & index.keys()})
    files = list(files_of(folder))
    quantized = {} if quantization_config is None else quantization_config.quant_mapping
    parts = {}
    for component in map(partial(_known, index), components):
        options: dict[str, Any] = {}
        if component.weights is not None:
            options = {"dtype": dtype, **SAFELY}
            if has_variant(component, files, variant):
                options["variant"] = variant
            if component.name in quantized:
                options["quantization_config"] = quantized[component.name]
        elif component.kind in _CHOOSING:
            options = {"trust_remote_code": False}
        place = str(folder / component.name)
        parts[component.name] = component.kind.from_pretrained(place, **options)
    pipeline.update_components(**parts)
    return with_declared_call(pipeline)


def _known(index: ModularIndex, component: Component) -> Component:
    """The component with its class. Raises LoadError for one that is neither a model nor anything
    without weights: others, such as whole pipelines, read files that are not safetensors."""
    kind = component.kind
    if kind is None:  # of a library that diffusers does not know, but that has been imported
        kind = simple_get_class_obj(*index[component.name])
    found = Component(component.name, kind)
    plain = any(map(found.is_a, _PLAIN)) and not any(map(found.is_a, _NOT_PLAIN))
    if found.weights is None and not plain and kind not in _CHOOSING:
        name = shown(index[component.name])
        raise LoadError(
            f"{MODULAR_INDEX}: {component.name} is {name}, which is neither a model, "
            "a scheduler, a guider, a tokenizer nor a processor"
        )
    return found
