"""Chooses the variant of a model's weights, such as `fp16`, that is complete."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

from stepweave.errors import LoadError, shown
from stepweave.loading.components import Component, components_of
from stepweave.loading.files import check_folders
from stepweave.loading.reading import listed

logger = logging.getLogger(__name__)

SETTING = "STEPWEAVE_VARIANT"
WEIGHTS = ".safetensors"
_ALL_WEIGHTS = (WEIGHTS, ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")

# missing files by variant; None is the one without a name
Variants = dict[str | None, list[str]]


def choose_variant(
    index: dict[str, Any],
    files: Collection[str],
    wanted: str | None,
    held: Collection[str] = (),
) -> str | None:
    """Choose the variant of a model to load; None for files without a variant.

    `files` are the model's, relative to its directory; each component must have some, except those
    that a single file holds (`held`). A component without the variant is read from its files
    without one, as diffusers does. If none is `wanted`, and some component has only variants, the
    only one that completes the model is chosen. Raises LoadError naming the missing files, and the
    setting if it helps.
    """
    components = components_of(index)
    check_folders(components, files)
    components = [part for part in components if part.name not in held]
    found = {
        component.name: _variants(component, files) for component in components if component.weights
    }
    if wanted is not None:
        return _wanted(found, files, wanted)
    lacking = [name for name, variants in found.items() if variants.get(None, ["?"])]
    if not lacking:
        return None
    names = {variant for name in lacking for variant in found[name] if variant is not None}
    whole = sorted(
        name for name in names if all(_complete(variants, name) for variants in found.values())
    )
    if len(whole) == 1:
        names_of = ", ".join(lacking)
        logger.info("loading the variant %r: %s has no other weights", whole[0], names_of)
        return whole[0]
    if whole:
        raise LoadError(
            f"{lacking[0]}/ has only weights of variants, and {', '.join(whole)} are complete; "
            f"choose one with {SETTING}"
        )
    raise LoadError(_what_is_missing(lacking[0], found, files))


def files_read(
    files: Mapping[str, int], components: Collection[str], variant: str | None
) -> dict[str, int]:
    """Those of a model's files, with their sizes, that are read with a variant."""
    usable, _ = variant_compatible_siblings(list(files), variant=variant)
    weights = {name for name in usable if name.endswith(WEIGHTS)}
    return {
        name: size
        for name, size in files.items()
        if name.partition("/")[0] in (name, *components)
        if name in weights or not name.endswith(_ALL_WEIGHTS)
    }


def has_variant(component: Component, files: Collection[str], variant: str | None) -> bool:
    """Whether a component has weights of a variant; others are read from files without one."""
    if variant is None or component.weights is None:
        return False
    return variant in _variants(component, files)


def only_variant(component: Component, files: Collection[str]) -> str | None:
    """The variant of a component's weights if there is one, and no weights without a variant."""
    names = list(_variants(component, files)) if component.weights is not None else []
    return names[0] if len(names) == 1 else None


def _wanted(found: dict[str, Variants], files: Collection[str], wanted: str) -> str:
    """The variant of the setting. Raises LoadError unless it exists and is complete."""
    there = sorted(
        {variant for variants in found.values() for variant in variants if variant is not None}
    )
    if wanted not in there:
        known = f"its variants are {', '.join(there)}" if there else "it has none; unset it"
        raise LoadError(
            f"{SETTING}={shown(wanted)}: no component of the model has that variant; {known}"
        )
    for name, variants in found.items():
        if variants.get(wanted):
            raise LoadError(f"{SETTING}={shown(wanted)}: {name}/ lacks {listed(variants[wanted])}")
        if not _complete(variants, wanted):
            raise LoadError(f"{SETTING}={shown(wanted)}: {_what_is_missing(name, found, files)}")
    return wanted


def _complete(variants: Variants, name: str) -> bool:
    """Whether all files of a component exist if a variant is loaded."""
    return not variants[name] if name in variants else not variants.get(None, ["?"])


def _what_is_missing(name: str, found: dict[str, Variants], files: Collection[str]) -> str:
    variants = found[name]
    if variants.get(None):
        return f"{name}/ lacks {listed(variants[None])}"
    names = [variant for variant in variants if variant is not None]
    if len(names) == 1 and variants[names[0]]:
        return (
            f"{name}/ lacks {listed(variants[names[0]])}, of the variant {names[0]!r}, and has no "
            f"other weights"
        )
    if names:
        others = [
            other
            for other, theirs in found.items()
            if other != name and not any(_complete(theirs, variant) for variant in names)
        ]
        return (
            f"{name}/ has weights of the variant {' and '.join(map(repr, names))} only, and "
            f"{', '.join(others) or name} none that go with them; {SETTING} chooses one variant "
            "for all components"
        )
    pickle = re.compile(rf"{re.escape(name)}/[^/]+\.(bin|pt|pth|ckpt|msgpack|h5)")
    pickles = sorted(filter(pickle.fullmatch, files))
    if pickles:
        return (
            f"{name}/ has weights as {PurePosixPath(pickles[0]).name} only; Stepweave reads "
            "safetensors: load the model with diffusers once, and write it with `save_pretrained`"
        )
    return f"{name}/ has no weights: no *.safetensors file is there"


def _variants(component: Component, files: Collection[str]) -> Variants:
    """The missing files of each variant of a component's weights, in shards or in one file.

    Names of shards: `model.fp16-00001-of-00002.safetensors`, formerly
    `model-00001-of-00002.fp16.safetensors`.
    """
    assert component.weights is not None
    stem = re.escape(component.weights.removesuffix(".safetensors"))
    file = re.compile(
        rf"{stem}(?:\.(?P<new>[\w-]+?))?(?:-(?P<i>\d{{5}})-of-(?P<count>\d{{5}}))?(?:\.(?P<old>[\w-]+))?\.safetensors"
    )
    folder, paths = PurePosixPath(component.name), map(PurePosixPath, files)
    inside = {path.name for path in paths if path.parent == folder}
    whole: set[str | None] = set()
    shards: dict[str | None, dict[int, str]] = defaultdict(dict)
    for name in inside:
        if match := file.fullmatch(name):
            variant = match["new"] or match["old"]
            if match["i"] is None:
                whole.add(variant)
            else:
                shards[variant][int(match["i"])] = name
    found: Variants = {variant: [] for variant in whole}
    for variant, parts in shards.items():
        if variant not in whole:
            found[variant] = _absent(variant, parts, component.weights, inside)
    return found


def _absent(
    variant: str | None, parts: dict[int, str], weights: str, inside: set[str]
) -> list[str]:
    """The missing shards, and their index if it is missing."""
    some = next(iter(parts.values()))
    match = re.search(r"-(\d{5})-of-(\d{5})", some)
    assert match is not None
    absent = [
        some.replace(match[0], f"-{i:05}-of-{match[2]}")
        for i in range(1, int(match[2]) + 1)
        if i not in parts
    ]
    indexes = [f"{weights}.index.json"]
    if variant is not None:
        indexes = [f"{weights}.index.{variant}.json", f"{weights}.{variant}.index.json"]
    return absent if inside.intersection(indexes) else [*absent, indexes[0]]
