"""Where components beside a model are, and how their weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import CONFIG_NAME
from huggingface_hub import snapshot_download

from stepweave.config.components import ComponentSource
from stepweave.errors import LoadError, shown
from stepweave.loading.components import INDEX, Component
from stepweave.loading.files import find_damage
from stepweave.loading.hub import explained, fetch
from stepweave.loading.reading import Reading, check_placed
from stepweave.loading.variants import only_variant
from stepweave.reasons import reason_of

ENCODER = "image_encoder"
_FILES = (CONFIG_NAME, "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json")


def folder_of(source: ComponentSource, base: Path | None) -> Path:
    """The component's directory, once it is there."""
    on_the_hub = source.on_the_hub()
    folder = source.directory(base)
    if not folder.is_dir():
        if on_the_hub is None:
            raise LoadError(
                f"{shown(source.source)} is neither an existing directory nor a repository of the "
                "hub at a commit (OWNER/NAME@COMMIT, 40 hex digits)"
            )
        repository, commit = on_the_hub
        part = f"{source.subfolder}/" if source.subfolder else ""
        files = [part + file for file in _FILES]
        if source.weights is not None:
            encoder = source.image_encoder or f"{part}{ENCODER}"
            files = [part + source.weights, *(f"{encoder}/{file}" for file in _FILES)]
        with explained(repository, commit):
            indices = [part + INDEX, part + CONFIG_NAME]
            folder = Path(snapshot_download(repository, revision=commit, allow_patterns=indices))
            if not is_pipeline(folder / part):
                snapshot_download(repository, revision=commit, allow_patterns=files)
        if is_pipeline(folder / part):
            if part:
                raise LoadError(
                    "it is a pipeline in a subfolder, which is not downloaded: give its directory"
                )
            folder, _ = fetch(repository, commit, None)
    return folder / source.subfolder if source.subfolder else folder


def is_pipeline(folder: Path) -> bool:
    """Whether a directory has the parts of a pipeline, as a refiner's has, rather than a model."""
    return (folder / INDEX).is_file() and not (folder / CONFIG_NAME).exists()


def read_model(name: str, kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model of a class in a directory. Raises LoadError."""
    component = Component(name, kind)
    reading = Reading(folder, [component])
    files = [f"{name}/{file.name}" for file in folder.glob("*.safetensors")]
    try:
        with reading.watched():
            options = {"torch_dtype": dtype} if issubclass(kind, ModelMixin) else {"dtype": dtype}
            model = kind.from_pretrained(
                str(folder), variant=only_variant(component, files), use_safetensors=True, **options
            )
        check_placed({name: model})
    except LoadError:
        raise
    except Exception as error:
        damage = find_damage(folder.parent, folder.name)
        raise LoadError(damage or reason_of(error, folder)) from error
    return model.eval()
