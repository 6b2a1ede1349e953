"""The further inputs of a pipeline, and values of them that change the plain call's result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.pipelines.registry import CALLS, Entry, example_image, mask
from tests.served.plain import Case, Plain

# not for requests: the server's own, tensors, functions, dictionaries of options
_OTHERS = re.compile(
    r"generator|output_type|return_dict|callback|latents|embed|attention_mask|kwargs|phrases_mask"
    r"|prior_token|num_images_per_prompt|batch_size"
)
# what they turn on takes minutes: images of a million pixels, or prompts written by the encoder
SLOW = {
    "_auto_resize",
    "caption_upsample_temperature",
    "enable_prompt_rewrite",
    "max_area",
    "use_pe",
    "use_resolution_binning",
}
_SIZES = ("width", "height")  # a request says both as `size`
_IMAGES = re.compile(r"(^|_)(images?|masks?)$")
_PLAIN = re.compile(r"\b(int|float|bool|str)\b")  # in annotations of what is no image

FLOATS: tuple[float, ...] = (0.5, 0.3, 1.5, 2.0, 1.0, 0.1, 0.0)
INTEGERS = (1, 2, 3, 17, 0)
TEXTS = ("blue", "two small rings")
LISTS: dict[str, tuple[list[Any], ...]] = {  # by a part of the argument's name
    "sigmas": ([1.0, 0.7, 0.5, 0.2], [10.0, 4.0, 1.0, 0.1]),
    # of Wuerstchen, from 1 to 0
    "prior_timesteps": ([1.0, 0.7, 0.3, 0.0],),
    "decoder_timesteps": ([1.0, 0.7, 0.3, 0.0],),
    "timesteps": ([900, 600, 300, 1], [999, 749, 499, 249]),
    "size": ([32, 32], [8, 24]),
    "coords": ([4, 8],),
    "": ([1], [0], [0.5], [1, 2]),
}


@dataclass
class Options:
    """What came of a pipeline's further arguments on the plain pipeline."""

    cases: list[tuple[Case, list[np.ndarray]]] = field(default_factory=list)
    no_effect: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # the plain pipeline raises
    random: list[str] = field(default_factory=list)  # it draws without its generator


def options(entry: Entry, plain: Plain, base: Case, expected: list[np.ndarray]) -> Options:
    """For every optional image, number, flag and text a case that differs in it from `base`, whose
    images are `expected`."""
    found = Options()
    for name, cases in _candidates(entry, plain, base):
        ran = False
        for case in cases:
            try:
                images = plain.images(case)
            except Exception:
                _recover(plain, base, expected)
                continue
            if name == "size" and not _has_size(images, case):
                continue  # the plain call makes another one, which the server does not offer
            ran = True
            if not _differ(images, expected):
                continue
            if _differ(images, plain.images(case)):
                found.random.append(name)
            else:
                found.cases.append((case, images))
            break
        else:
            (found.no_effect if ran else found.refused).append(name)
    return found


def _has_size(images: list[np.ndarray], case: Case) -> bool:
    height, width = images[0].shape[:2]
    return (width, height) == (case.arguments["width"], case.arguments["height"])


def _differ(images: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(images) != len(others) or not all(map(np.array_equal, images, others))


def _recover(plain: Plain, base: Case, expected: list[np.ndarray]) -> None:
    """Load the pipeline again if a call that raised has changed it."""
    try:
        changed = _differ(plain.images(base), expected)
    except Exception:
        changed = True
    if changed:
        plain.load()


def _candidates(entry: Entry, plain: Plain, base: Case) -> Iterator[tuple[str, list[Case]]]:
    """Names of arguments, each with cases to try."""
    calls = [entry.arguments(number) for number in range(CALLS)]
    for name, parameter in plain.parameters.items():
        kinds = (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if name == "self" or parameter.kind not in kinds or name in SLOW or name in _SIZES:
            continue
        if _OTHERS.search(name) or _varies([call.get(name) for call in calls]):
            continue
        current = base.arguments.get(name, parameter.default)
        current = None if current is parameter.empty else current
        values = _values(name, str(parameter.annotation), current, _side(base))
        yield name, [base.with_changes(name, **{name: value}) for value in values]
    if all(name in base.arguments for name in _SIZES):
        width, height = (base.arguments[name] for name in _SIZES)
        sizes = ((2 * width, height), (2 * width, 2 * height))
        yield "size", [base.with_changes("size", width=w, height=h) for w, h in sizes]
    if plain.makes_several(base):
        yield "n", [replace(base, name="n", n=2)]


def _varies(values: list[Any]) -> bool:
    """Whether the entry's own calls differ in an argument; in images and tensors they do."""
    if any(isinstance(value, torch.Tensor) for value in values):
        return True
    first = values[0][0] if isinstance(values[0], list) and values[0] else values[0]
    return isinstance(first, Image.Image) or any(value != values[0] for value in values)


def _side(case: Case) -> int:
    """The width of the images of a call."""
    images = [value for value in case.arguments.values() if isinstance(value, Image.Image)]
    return images[0].width if images else 16


def _values(name: str, annotation: str, current: Any, side: int) -> list[Any]:
    """Values to try for an argument; none for what a request cannot say."""
    if "bool" in annotation or isinstance(current, bool):
        return [not current]
    if _IMAGES.search(name) and not _PLAIN.search(annotation):
        draw = mask if "mask" in name else example_image
        return [draw(77, one) for one in dict.fromkeys((side, 16, 64))]
    if re.search(r"(list|tuple|List|Tuple)\[(int|float)", annotation) and not isinstance(
        current, int | float
    ):
        part = next(part for part in LISTS if part in name)
        make = list if "list" in annotation.lower() else tuple
        return [make(value) for value in LISTS[part] if value != list(current or ())]
    if "float" in annotation or isinstance(current, float):
        near = [] if not current else [current * 1.5, current / 2]
        return [value for value in (*near, *FLOATS) if value != current]
    if "int" in annotation or isinstance(current, int):
        near = [] if not current else [current + 1, current * 2]
        return [value for value in (*near, *INTEGERS) if value != current]
    if annotation.replace(" | None", "") == "list[str]":
        return [[value] for value in TEXTS]
    if "str" in annotation or isinstance(current, str):
        return [value for value in TEXTS if value != current]
    return []
