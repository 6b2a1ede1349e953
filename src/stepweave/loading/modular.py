"""Reads `modular_model_index.json`: a modular pipeline's class, blocks and components.

Only blocks of diffusers are run, never code from the model's files.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModularPipelineBlocks

from stepweave.compat.modular import class_of_blocks, lacking
from stepweave.errors import LoadError, shown

MODULAR_INDEX = "modular_model_index.json"
BLOCKS = "_blocks_class_name"
CODE = "modular_config.json"  # names the code of a repository's own blocks


class ModularIndex(dict[str, Any]):
    """The file in the form of a `model_index.json`: the library and class of each component, null
    for those that the model does not have. `specs` say where the files of the others are."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.specs: dict[str, dict[str, Any]] = {}
        for name, entry in content.items():
            if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)):
                continue
            *own, spec = entry
            hint = spec.get("type_hint") or own
            path = spec.get("pretrained_model_name_or_path") or spec.get("repo")
            if path is None:
                self[name] = [None, None]
                continue
            if not (_is_pair(hint) and all(isinstance(item, str) for item in hint)):
                raise LoadError(f"{MODULAR_INDEX}: {name} has no class; its type is {shown(hint)}")
            self[name] = hint
            self.specs[name] = {**spec, "pretrained_model_name_or_path": path}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def check_no_code(folder: Path) -> None:
    """Raise LoadError for blocks whose code is in the model's files."""
    if (folder / CODE).is_file():
        raise LoadError(f"{CODE} names code from the model's files, which is not run")


def modular_class(kind: type[Any], index: ModularIndex) -> type[Any]:
    """The class of a modular pipeline with the blocks and components of an index. Raises LoadError
    for blocks that are not diffusers' own, or that lack a component."""
    blocks, present = blocks_of(kind, index), frozenset(index.specs)
    if absent := lacking(blocks, present):
        raise LoadError(
            f"{MODULAR_INDEX} has no files for {', '.join(absent)}, which {type(blocks).__name__} "
            "needs"
        )
    return class_of_blocks(kind, blocks, present)


def blocks_of(kind: type[Any], index: Mapping[str, Any]) -> Any:
    """The blocks of a modular pipeline. Raises LoadError."""
    if "auto_map" in index:
        raise LoadError(f"{MODULAR_INDEX}: auto_map names code from the model's files: not run")
    name = index.get(BLOCKS, kind.default_blocks_name)
    made = _blocks(name) if isinstance(name, str) else None
    if made is None:
        raise LoadError(
            f"{MODULAR_INDEX}: {BLOCKS} is {shown(name)}; only the blocks of diffusers "
            f"{diffusers.__version__} are run, not code from the model's files, or blocks composed "
            "by code"
        )
    return made


@functools.cache
def _blocks(name: str) -> Any:
    kind = getattr(diffusers, name, None)
    is_blocks = isinstance(kind, type) and issubclass(kind, ModularPipelineBlocks)
    made = kind() if is_blocks else None  # type: ignore[misc]
    return made if made is not None and made.sub_blocks else None
