"""The files of a model's directory: what must be there before anything is read, and what is wrong
with one that cannot be."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stepweave.errors import LoadError
from stepweave.loading.components import INDEX, Component
from stepweave.reasons import reason_of

# transformers makes a tokenizer of one of these, too, whatever its class says
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")
_OF_A_VOCABULARY = ("vocab_file", "merges_file", "spm_file")


def files_of(folder: Path) -> dict[str, int]:
    """The bytes of the files of a model's directory and of its components' folders, by relative
    name. Raises LoadError."""
    sizes = {}
    try:
        for entry in folder.iterdir():
            for file in entry.iterdir() if entry.is_dir() else (entry,):
                # a link to nowhere: as if it were not there
                with contextlib.suppress(FileNotFoundError):
                    sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    except OSError as error:
        raise LoadError(
            f"the model's directory cannot be read: {reason_of(error, folder)}"
        ) from None
    return sizes


def check_folders(components: Iterable[Component], files: Collection[str]) -> None:
    """Raise LoadError for a component that has no folder: from_pretrained would look for it in the
    model's directory itself."""
    there = {name.partition("/")[0] for name in files if "/" in name}
    for component in components:
        config = component.config
        if component.name not in there and config not in files:
            kind = getattr(component.kind, "__name__", "a component")
            raise LoadError(
                f"{component.name}/ is missing or empty: {INDEX} says that it holds {kind}"
            )
        if config is not None and config not in files and f"{component.name}/{config}" not in files:
            raise LoadError(f"{component.name}/{config} is missing")


def check_vocabularies(components: Iterable[Component], sizes: dict[str, int]) -> None:
    """Raise LoadError for a tokenizer without the files that its class reads its vocabulary from,
    or with empty ones."""
    for component in components:
        names = (
            getattr(component.kind, "vocab_files_names", None) if component.is_tokenizer else None
        )
        if not names:  # it needs none, as one that tells bytes apart
            continue
        needed = [file for key, file in names.items() if key in _OF_A_VOCABULARY] or list(
            names.values()
        )
        absent = [file for file in needed if not sizes.get(f"{component.name}/{file}")]
        if absent and not any(sizes.get(f"{component.name}/{file}") for file in _VOCABULARIES):
            empty = [
                file for file in (*absent, "tokenizer.json") if f"{component.name}/{file}" in sizes
            ]
            what = (
                f"{empty[0]} is empty"
                if empty
                else f"it lacks {' and '.join(absent)} (or tokenizer.json)"
            )
            raise LoadError(
                f"{component.name}/ has no vocabulary for {component.kind.__name__}: {what}"
            )


def find_damage(folder: Path, component: str | None) -> str | None:
    """What is wrong with a file that cannot be read, of a component or else of all; None if all can
    be."""
    folders = (
        [folder / component]
        if component
        else [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    )
    for file in (file for one in folders if one.is_dir() for file in _in_order(one)):
        if problem := _damage(file):
            return f"{file.relative_to(folder).as_posix()}: {problem}"
    return None


def _in_order(folder: Path) -> Iterator[Path]:
    yield from (
        file
        for suffix in ("json", "safetensors", "txt", "model")
        for file in sorted(folder.glob(f"*.{suffix}"))
    )


def _damage(file: Path) -> str | None:
    try:
        size = file.stat().st_size
        if not size:
            return "the file is empty (0 bytes)"
        if file.suffix == ".json":
            content = json.loads(file.read_bytes())
            if file.name.endswith("index.json") or ".index." in file.name:
                return _absent_shard(file, content)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        else:
            os.close(os.open(file, os.O_RDONLY))
    except ValueError as error:
        return f"not JSON: {reason_of(error)}"
    except SafetensorError as error:
        return f"damaged or cut off at {size} bytes ({reason_of(error)}); fetch it again"
    except OSError as error:
        return error.strerror or reason_of(error)
    return None


def _absent_shard(index: Path, content: object) -> str | None:
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        return "it has no weight_map"
    absent = sorted(
        {str(one) for one in weights.values()} - {file.name for file in index.parent.iterdir()}
    )
    return f"it names {absent[0]}, which is missing" if absent else None
