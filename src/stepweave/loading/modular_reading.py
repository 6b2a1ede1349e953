"""Makes a modular pipeline of the components in a directory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

from stepweave.compat.modular import with_declared_call
from stepweave.loading.components import SAFELY, Component, pipeline_class
from stepweave.loading.files import files_of
from stepweave.loading.modular import ModularIndex, blocks_of
from stepweave.loading.variants import has_variant


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
    for component in components:
        # of a library that only diffusers knows, such as one that the server's own code imports
        kind = component.kind or simple_get_class_obj(*index[component.name])
        options: dict[str, Any] = {}
        if component.weights is not None:
            options = {"dtype": dtype, **SAFELY}
            if has_variant(component, files, variant):
                options["variant"] = variant
            if component.name in quantized:
                options["quantization_config"] = quantized[component.name]
        elif kind.__name__.startswith("Auto"):
            options = {"trust_remote_code": False}
        parts[component.name] = kind.from_pretrained(str(folder / component.name), **options)
    pipeline.update_components(**parts)
    return with_declared_call(pipeline)
