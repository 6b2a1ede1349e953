"""What can be told of a model from its files, without reading its weights."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stepweave.config import Settings
from stepweave.config.preset import read_preset
from stepweave.config.settings import SAFETENSORS
from stepweave.errors import LoadError, StepweaveError
from stepweave.loading.checkpoint import read_checkpoint
from stepweave.loading.components import components_of, has_index, pipeline_class, read_index
from stepweave.loading.files import check_vocabularies, files_of, find_damage
from stepweave.loading.kinds import check_served
from stepweave.loading.places import in_place
from stepweave.loading.single_file import config_folder, held_components, index_of_configs
from stepweave.loading.variants import WEIGHTS, choose_variant, files_read


@dataclass(frozen=True)
class Facts:
    """A model's files. `problem`: why it cannot be served; None if nothing speaks against it."""

    pipeline: str | None
    bytes: int  # of the files that would be read
    numbers: int  # in the weights
    problem: str | None = None
    incomplete: bool = False  # the problem is that files are missing


def inspect_model(folder: Path, wanted: str | None = None, given: Collection[str] = ()) -> Facts:
    """The facts of a model's directory; `wanted` is the variant, `given` the arguments that a
    preset gives to every call."""
    name, files, numbers, incomplete = None, {}, 0, False
    try:
        index = read_index(folder)
        kind: Any = pipeline_class(index)
        name = kind.__name__
        files = files_of(folder)
        check_served(kind, {*given, *_arguments(folder)})
        components = components_of(index)
        incomplete = True
        with in_place(folder, index) as whole:
            files = files_of(whole)
            variant = choose_variant(index, list(files), wanted)
            check_vocabularies(components, files)
            incomplete = False
            files = files_read(files, [part.name for part in components], variant)
            if problem := find_damage(whole, None):
                raise LoadError(problem)
            numbers = sum(_numbers(whole / file) for file in files if file.endswith(WEIGHTS))
    except StepweaveError as error:
        return Facts(name, sum(files.values()), numbers, error.message, incomplete)
    return Facts(name, sum(files.values()), numbers)


def inspect_file(file: Path, config_from: str | None = None, given: Collection[str] = ()) -> Facts:
    """The facts of a model in a single file; `config_from` is the setting, `given` the arguments
    that a preset gives to every call."""
    name, size, numbers = None, 0, 0
    try:
        size = file.stat().st_size
        checkpoint = read_checkpoint(file)
        numbers = checkpoint.numbers
        folder = config_folder(checkpoint, config_from)
        index = index_of_configs(folder)
        kind: Any = pipeline_class(index)
        name = kind.__name__
        check_served(kind, given)
        components, files = components_of(index), files_of(folder)
        held = [part.name for part in held_components(checkpoint, components, folder)]
        variant = choose_variant(index, list(files), None, held)
        rest = [part for part in components if part.name not in held]
        check_vocabularies(rest, files)
        if problem := find_damage(folder, None):
            raise LoadError(problem)
        read = files_read(files, [part.name for part in rest], variant)
        weights = [file for file in read if file.endswith(WEIGHTS)]
        size += sum(read[file] for file in weights)
        numbers += sum(_numbers(folder / file) for file in weights)
    except StepweaveError as error:
        return Facts(name, size, numbers, error.message)
    return Facts(name, size, numbers)


def inspect_settings(settings: Settings, folder: Path | None) -> Facts:
    """The facts of a server's model; `folder` is that of a model of the hub."""
    given = () if settings.preset is None else settings.preset.call
    file, folder = settings.model_file(), folder or settings.model_directory()
    if file is not None:
        return inspect_file(file, settings.config_from, given)
    assert folder is not None
    return inspect_model(folder, settings.variant, given)


def _arguments(folder: Path) -> Collection[str]:
    preset = read_preset(folder)
    return preset.call or ()


def _numbers(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())


def is_model(path: Path) -> bool:
    """Whether this is the directory of a pipeline, or a file that may be a model."""
    return has_index(path) or (path.suffix == SAFETENSORS and path.is_file())
