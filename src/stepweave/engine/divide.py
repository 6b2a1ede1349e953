"""Dividing: one call's rows into several forwards, for calls that do not fit into memory at once; the reverse of merging."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepweave.engine.call import Call, Layout, Unmergeable
from stepweave.engine.merge import has_rows, is_constant, rebuilt, remade


def part(call: Call, start: int, stop: int) -> dict[str, Any]:
    """The arguments of a call that stands for some of the rows of `call`. Raises Unmergeable where they cannot be told apart."""
    given = {}
    for name, node in call.layout:
        if name in call.arguments:
            given[name] = _part(node, call.arguments[name], call.rows, slice(start, stop))
    return given


def _part(node: Layout, value: Any, rows: int, span: slice) -> Any:
    tag = node[0]
    if value is None or tag in ("constant", "shared", "scalar", "number"):
        return value
    if tag in ("rows", "padded", "mask"):
        return value if value.shape[0] != rows else value[span]
    if tag == "several":
        return value[span.start * node[1] : span.stop * node[1]]
    if tag == "across":
        return value[:, span]
    if tag in ("per row", "repeated"):
        return value[span]
    if tag == "generator":
        raise Unmergeable("rows that draw from one generator depend on each other")
    if tag == "dict":
        return {key: _part(child, value[key], rows, span) for key, child in node[1:]}
    if tag == "object":
        twin = copy.copy(value)
        for name, child in node[2:]:
            twin.__dict__[name] = _part(child, vars(value)[name], rows, span)
        return twin
    return rebuilt(value, [_part(child, item, rows, span) for child, item in zip(node[2:], value, strict=True)])


def join(outputs: Sequence[Any], rows: Sequence[int]) -> Any:
    """The parts' results, of so many rows each, as one. What has no rows is the first part's."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs)) if has_rows(first, rows[0]) else first
    if isinstance(first, np.ndarray):
        return np.concatenate(outputs) if first.ndim and len(first) == rows[0] else first
    if is_constant(first):
        return first
    if isinstance(first, dict):
        return remade(first, {key: join([one[key] for one in outputs], rows) for key in first})
    if isinstance(first, list) and len(first) == rows[0] and not all(has_rows(item, rows[0]) for item in first):
        return [item for one in outputs for item in one]
    if isinstance(first, (list, tuple)):
        return rebuilt(first, [join(items, rows) for items in zip(*outputs, strict=True)])
    attributes = getattr(first, "__dict__", None)
    if not attributes:
        raise Unmergeable(f"results of type {type(first).__name__} cannot be put together")
    twin = copy.copy(first)
    twin.__dict__.update({name: join([vars(one)[name] for one in outputs], rows) for name in attributes})
    return twin
