"""Values that contain others, such as the arguments and results of modules: what is in them, and
others like them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from stepweave.compat.isolation import is_plain

DEEPEST = 6  # objects and lists in each other
COLLECTIONS = (dict, list, tuple)
CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
_LEAVES = (torch.Tensor, np.ndarray, *CONSTANTS)


def is_holder(value: Any) -> bool:
    """Whether an object consists of its attributes only, so that one with other values can be
    made."""
    return is_plain(type(value)) and not callable(value)  # type: ignore[arg-type]


def contents(value: Any) -> Collection[Any]:
    """What is in a collection, or in an object, as its attributes."""
    if isinstance(value, (list, tuple)):
        return value
    return (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()


def keys(value: Any) -> Collection[Any]:
    """Of the contents, in their order: keys, indices or names of attributes."""
    if isinstance(value, (list, tuple)):
        return range(len(value))
    return (value if isinstance(value, dict) else getattr(value, "__dict__", {})).keys()


def refilled(value: Any, inside: list[Any]) -> Any:
    """A value like another, with other contents."""
    if isinstance(value, (list, tuple)):
        return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)
    items = dict(zip(keys(value), inside, strict=True))
    if type(value) is dict:
        return items
    if dataclasses.is_dataclass(value) and isinstance(value, dict):
        # an output of diffusers or transformers: a dictionary without the fields that are None
        names = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: items.get(name) for name in names})
    twin = copy.copy(value)
    (twin if isinstance(value, dict) else twin.__dict__).update(items)
    return twin


def copied(value: Any, _depth: int = 0) -> Any:
    """Arguments with tensors of their own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if not isinstance(value, COLLECTIONS):
        if not is_holder(value) or _depth == DEEPEST:
            return value
        _depth += 1
    return refilled(value, [copied(item, _depth) for item in contents(value)])


def cloned(output: Any) -> Any:
    """A copy of a result that shares no memory with it."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, CONSTANTS):
        return output
    if isinstance(output, COLLECTIONS):
        return refilled(output, [cloned(item) for item in contents(output)])
    return copy.deepcopy(output)


def leaves(value: Any, _above: tuple[int, ...] = ()) -> list[Any]:
    """All tensors, arrays and constants in a result, in order; what contains itself is followed
    once."""
    if isinstance(value, _LEAVES):
        return [value]
    if id(value) in _above:
        return []
    inside = list(contents(value))
    if isinstance(value, Cache):
        inside = [part for layer in value.layers for part in (layer.keys, layer.values)]
    return [leaf for item in inside for leaf in leaves(item, (*_above, id(value)))]


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a result, or in arguments, in order."""
    return [one for one in leaves(value) if isinstance(one, torch.Tensor)]


def flat(value: Any) -> Iterator[Any]:
    """Yield all that is in collections within each other, in order and however deep, but not the
    collections; each collection is read once, since it may contain itself."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if not isinstance(item, COLLECTIONS):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            pending += reversed(list(contents(item)))
