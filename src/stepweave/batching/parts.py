"""Dividing: one call's rows into several forwards, for calls that do not fit into memory at once;
the reverse of merging."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepweave.batching.call import Call, Unmergeable
from stepweave.batching.leaves import REPEATED
from stepweave.batching.merge import has_rows
from stepweave.compat.nested import COLLECTIONS, CONSTANTS, contents, keys, refilled


def part(call: Call, start: int, stop: int, *, repeat: bool = True) -> dict[str, Any]:
    """The arguments of a call that stands for some of the rows of `call`. For `repeat` see
    merge."""
    given = {}
    for name, node in call.group.layout:
        if name in call.arguments:
            value = given[name] = call.arguments[name]
            if value is not None and (repeat or node[0] is not REPEATED):
                given[name] = node[0].part(node, value, call.rows, slice(start, stop))
    return given


def chunk(call: Call, number: int) -> Call:
    """One of the parts of which a call's batch is made, as a call."""
    rows = call.rows // call.group.chunks
    return dataclasses.replace(
        call, arguments=part(call, number * rows, (number + 1) * rows), rows=rows
    )


def join(outputs: Sequence[Any], rows: Sequence[int], *, listed: bool = False) -> Any:
    """The parts' results, of so many rows each, as one. Raises Unmergeable for what has no rows.
    For `listed` see split."""
    first = outputs[0]
    if isinstance(first, torch.Tensor) and all(
        has_rows(one, count) for one, count in zip(outputs, rows, strict=True)
    ):
        return torch.cat(list(outputs))
    if isinstance(first, np.ndarray) and first.ndim and len(first) == rows[0]:
        return np.concatenate(outputs)
    if isinstance(first, CONSTANTS) and all(one == first for one in outputs):
        return first
    if (
        isinstance(first, list)
        and len(first) == rows[0]
        and (listed or not all(has_rows(one, rows[0]) for one in first))
    ):
        return [item for one in outputs for item in one]
    names = list(keys(first))
    alike = all(list(keys(one)) == names for one in outputs)
    whole = isinstance(first, torch.Tensor) or not (names or isinstance(first, COLLECTIONS))
    if whole or not alike:
        raise Unmergeable(f"results of type {type(first).__name__} cannot be put together")
    inside = zip(*map(contents, outputs), strict=True)
    return refilled(first, [join(items, rows, listed=listed) for items in inside])
