"""The reference: calls of the plain pipeline, and their images."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from PIL import Image

from tests.pipelines.registry import Entry
from tests.served.saving import INDEX, IP_ADAPTER, MODULAR_INDEX
from tests.support.ip_adapters import load_ip_adapter

# members of a call's result that are images, in the order in which they are looked for
RESULTS = ("images", "image", "rgb", "prediction")
# where the default, `pil`, does not work: its depth is of a mode that Pillow no longer makes
OUTPUT_TYPES = {"StableDiffusionLDM3DPipeline": "np"}
COUNTS = ("num_images_per_prompt", "batch_size")  # how pipelines call the number of images


@dataclass(frozen=True)
class Case:
    """One call: what a request asks for, and what the plain pipeline is called with."""

    name: str  # `call 2`, or the argument in which it differs from call 0
    arguments: dict[str, Any]  # without generator, output type and number of images
    seed: int
    n: int = 1

    def with_changes(self, name: str, **changes: Any) -> Case:
        return replace(self, name=name, arguments={**self.arguments, **changes})


def case(entry: Entry, number: int) -> Case:
    """An entry's call by its number. Its prompt is not empty: for a form, that is none."""
    arguments = entry.arguments(number)
    for name in ("output", "output_type"):
        arguments.pop(name, None)
    if arguments.get("prompt") == "":
        arguments["prompt"] = "a"
    seed = arguments.pop("generator").initial_seed()
    return Case(f"call {number}", arguments, seed)


class Plain:
    """A pipeline of a directory, loaded with diffusers alone."""

    def __init__(self, folder: Path, first: Case) -> None:
        """With a call by which to find out whether it takes a list of generators, or only one."""
        self._folder = folder
        self.parameters: Mapping[str, inspect.Parameter] = {}
        self.takes_lists = True
        self.load()
        try:
            self.images(first)
        except Exception:
            self.takes_lists = False
            self.load()

    def load(self) -> None:
        """Load it, also again: calls that raise may leave it changed."""
        if (self._folder / MODULAR_INDEX).exists():
            self._load_modular()
            return
        index = json.loads((self._folder / INDEX).read_text())
        absent = {name: None for name, value in index.items() if value == [None, None]}
        self.pipeline: Any = DiffusionPipeline.from_pretrained(
            str(self._folder), use_safetensors=True, **absent
        )
        if (self._folder / IP_ADAPTER).exists():
            load_ip_adapter(self.pipeline, self._folder / IP_ADAPTER)
        self.pipeline.set_progress_bar_config(disable=True)
        self.parameters: Mapping[str, inspect.Parameter] = inspect.signature(
            type(self.pipeline).__call__
        ).parameters

    def _load_modular(self) -> None:
        self.pipeline = ModularPipeline.from_pretrained(str(self._folder))
        self.pipeline.load_components()
        for block in self.pipeline._blocks.sub_blocks.values():
            _quiet(block)
        self.parameters = {
            item.name: inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=item.default,
                annotation=item.type_hint or _usual_type(item.name),
            )
            for item in self.pipeline.blocks.inputs
            if item.name is not None
        }

    @property
    def takes_count(self) -> str | None:
        """The argument for the number of images; `batch_size` is something else where a call takes
        images."""
        if "image" in self.parameters and COUNTS[0] not in self.parameters:
            return None
        return next((name for name in COUNTS if name in self.parameters), None)

    def makes_several(self, case: Case) -> bool:
        """Whether the plain call, asked for two images, makes the one of a second generator's seed
        as second, given the image to begin with once, or once for each."""
        if self.takes_count is None or not self.takes_lists:
            return False
        second = self.images(replace(case, seed=case.seed + 1))
        image = case.arguments.get("image")
        for given in ({}, {"image": [image, image]}) if image is not None else ({},):
            try:
                both = self._call(case, case.seed, case.seed + 1, **{self.takes_count: 2}, **given)
            except Exception:
                self.load()
                continue
            made = both[len(second) :]
            if len(both) == 2 * len(second) and all(map(_alike, made, second)):
                return True
        return False

    def images(self, case: Case) -> list[np.ndarray]:
        """The images of a call: height x width x 3 or 4 bytes each. Of several, each is that of a
        call with a seed of its own, as image i of n has seed + i in every answer."""
        if case.n != 1:
            ones = [replace(case, n=1, seed=case.seed + i) for i in range(case.n)]
            return [image for one in ones for image in self.images(one)]
        return self._call(case, case.seed)

    def _call(self, case: Case, *seeds: int, **changes: Any) -> list[np.ndarray]:
        kind = type(self.pipeline).__name__
        arguments = {**case.arguments, **changes}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        arguments["generator"] = generators if self.takes_lists else generators[0]
        if kind in OUTPUT_TYPES:
            arguments["output_type"] = OUTPUT_TYPES[kind]
        with np.errstate(invalid="raise"):  # numbers that are not finite become pixels
            if isinstance(self.pipeline, ModularPipeline):
                found = self.pipeline(output="images", **arguments)
            else:
                output = self.pipeline(**arguments)
                found = next(
                    value for name in RESULTS if (value := getattr(output, name, None)) is not None
                )
        return list(_arrays(found, signed="Normals" in kind))


def _usual_type(name: str) -> Any:
    """The type of a modular pipeline's input without one, as usual pipelines have it."""
    if re.fullmatch(r"(negative_)?prompt(_\d)?", name):
        return str
    return {"sigmas": list[float], "clip_skip": int}.get(name)


def _quiet(block: Any) -> None:
    """Show no bars of a modular pipeline's block, or of those in it."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in block.sub_blocks.values():
        _quiet(inner)


def _alike(image: np.ndarray, other: np.ndarray) -> bool:
    """Whether they are the same, but for rounding."""
    return image.shape == other.shape and int(np.ptp(image.astype(int) - other)) <= 2


def _arrays(value: Any, *, signed: bool) -> Iterator[np.ndarray]:
    if isinstance(value, Image.Image):
        yield as_array(value)
    elif isinstance(value, np.ndarray):
        assert value.ndim == 4
        assert np.isfinite(value).all(), "the plain call gives no finite numbers"
        shares = (value + 1) / 2 if signed else value
        for image in np.rint(shares * 255).astype(np.uint8):
            yield np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    else:
        for item in value:
            yield from _arrays(item, signed=signed)


def as_array(image: Image.Image) -> np.ndarray:
    """Grey images are compared as colours, with what transparency there is."""
    return np.asarray(image.convert("RGBA" if "A" in image.getbands() else "RGB"))
