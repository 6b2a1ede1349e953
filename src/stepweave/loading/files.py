"""Checks the files of a model's directory, and finds damaged ones after a failure."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stepweave.errors import LoadError
from stepweave.loading.components import INDEX, Component
from stepweave.reasons import reason_of

# transformers can make any tokenizer from one of these
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")
_OF_A_VOCABULARY = ("vocab_file", "merges_file", "spm_file")


def files_of(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files in a model's directory and its components' folders, by relative
    name. Raises LoadError."""
    sizes = {}
    try:
        for entry in folder.iterdir():
            for file in entry.iterdir() if entry.is_dir() else (entry,):
                # a broken link counts as missing
                with contextlib.suppress(FileNotFoundError):
                    sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    except OSError as error:
        reason = reason_of(error, folder)
        raise LoadError(f"the model's directory cannot be read: {reason}") from None
    return sizes


def check_folders(components: Iterable[Component], files: Collection[str]) -> None:
    """Raise LoadError for a component without a folder, which from_pretrained would look for in the
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
    """Raise LoadError for a tokenizer whose vocabulary files are missing or empty."""
    for component in components:
        names = getattr(component.kind, "vocab_files_names", None)
        if not component.is_tokenizer or not names:  # a tokenizer of bytes needs no files
            continue
        needed = [file for key, file in names.items() if key in _OF_A_VOCABULARY]
        needed = needed or list(names.values())
        absent = [file for file in needed if not sizes.get(f"{component.name}/{file}")]
        if absent and not any(sizes.get(f"{component.name}/{file}") for file in _VOCABULARIES):
            files = (*absent, "tokenizer.json")
            empty = [file for file in files if f"{component.name}/{file}" in sizes]
            what = f"it lacks {' and '.join(absent)} (or tokenizer.json)"
            what = f"{empty[0]} is empty" if empty else what
            kind = component.kind.__name__
            raise LoadError(f"{component.name}/ has no vocabulary for {kind}: {what}")


def find_damage(folder: Path, component: str | None) -> str | None:
    """Describe the first file that cannot be read, of a component or of all; None if all can."""
    entries = [folder / component] if component else sorted(folder.iterdir())
    for entry in filter(Path.is_dir, entries):
        for suffix in ("json", "safetensors", "txt", "model"):
            for file in sorted(entry.glob(f"*.{suffix}")):
                if problem := _damage(file):
                    return f"{file.relative_to(folder).as_posix()}: {problem}"
    return None


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
        return f"damaged or cut off at {size} bytes ({reason_of(error)}); download it again"
    except OSError as error:
        return error.strerror or reason_of(error)
    return None


def _absent_shard(index: Path, content: object) -> str | None:
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        return "it has no weight_map"
    files = {file.name for file in index.parent.iterdir()}
    absent = sorted({str(name) for name in weights.values()} - files)
    return f"it names {absent[0]}, which is missing" if absent else None
