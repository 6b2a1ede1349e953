"""Merging: many calls' arguments into one call's, one result into many; and dividing one call's
rows into several forwards, for calls that do not fit into memory at once."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from stepweave.batching.call import Call, Unmergeable
from stepweave.batching.leaves import MASK, PADDED, REPEATED
from stepweave.compat.nested import COLLECTIONS, CONSTANTS, contents, keys, refilled, tensors


def merge(calls: Sequence[Call], *, repeat: bool = True) -> dict[str, Any]:
    """The arguments of one call that stands for all of `calls`, which are of one kind.

    A list of equal constants, one for each row, is made as long as there are rows in all; without
    `repeat` it is passed as it is, since it may be something else that happens to have as many
    entries.
    """
    rows = [call.rows for call in calls]
    first = calls[0]
    merged = {}
    for name, node in first.group.layout:
        if node[0] is MASK:
            continue
        values = [call.arguments[name] for call in calls]
        if node[0] is PADDED:
            mask = first.target.masks[name]
            merged[name], masks = _padded(values, [call.arguments.get(mask) for call in calls])
            if masks is not None:
                merged[mask] = masks
        else:
            whole = node[0] is REPEATED and not repeat
            merged[name] = values[0] if whole else node[0].merge(node, values, rows)
    return merged


def _padded(
    values: list[torch.Tensor], masks: list[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tensors (rows, length, ...) of different lengths as one, filled with zeros that the mask
    tells from the rest."""
    longest = max(value.shape[1] for value in values)
    if all(value.shape[1] == longest for value in values) and all(mask is None for mask in masks):
        return torch.cat(values), None
    dtype = next((mask.dtype for mask in masks if mask is not None), torch.bool)
    shape = (sum(value.shape[0] for value in values), longest)
    merged = values[0].new_zeros((*shape, *values[0].shape[2:]))
    merged_mask = torch.zeros(shape, dtype=dtype, device=values[0].device)
    start = 0
    for value, mask in zip(values, masks, strict=True):
        rows, length = value.shape[:2]
        merged[start : start + rows, :length] = value
        merged_mask[start : start + rows, :length] = 1 if mask is None else mask
        start += rows
    return merged, merged_mask


def masked(call: Call) -> Call:
    """The call with masks for all that merging may pad, as if it were padded by nothing."""
    masks = {}
    for name, node in call.group.layout:
        if node[0] is PADDED and call.arguments.get(mask := call.target.masks[name]) is None:
            value = call.arguments[name]
            masks[mask] = value.new_ones(value.shape[:2], dtype=torch.bool)
    return dataclasses.replace(call, arguments={**call.arguments, **masks}) if masks else call


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


def split(output: Any, rows: Sequence[int], *, listed: bool = False) -> list[Any]:
    """A merged call's output as the calls', in order. Raises Unmergeable for what has no rows.

    With `listed`, a list with as many entries as rows has an entry for each row, whatever the
    entries' shapes.
    """
    return _split(output, list(itertools.accumulate(rows, initial=0)), listed)


def _split(output: Any, starts: list[int], listed: bool) -> list[Any]:
    total = starts[-1]
    spans = list(itertools.pairwise(starts))
    if isinstance(output, torch.Tensor):
        if not _has_rows(output, total):
            raise Unmergeable(f"a result of shape {tuple(output.shape)} does not have {total} rows")
        if output.stride(0) == 0:  # rows that share memory must not share it between jobs
            output = output.contiguous()
        return [output.narrow(0, a, b - a) for a, b in spans]
    if isinstance(output, np.ndarray) and output.ndim and output.shape[0] == total:
        return [output[a:b] for a, b in spans]
    if isinstance(output, CONSTANTS):
        return [output] * len(spans)
    if (
        isinstance(output, list)
        and len(output) == total
        and (listed or not all(_has_rows(item, total) for item in output))
    ):
        return [output[a:b] for a, b in spans]
    if isinstance(output, Cache):
        return [_selected(output, a, b) for a, b in spans]
    inside = contents(output)
    if not inside and not isinstance(output, COLLECTIONS):
        raise Unmergeable(f"a result of type {type(output).__name__} cannot be taken apart")
    # an object may be a distribution, such as an autoencoder's encoder gives
    parts = [_split(item, starts, listed) for item in inside]
    return [refilled(output, [part[i] for part in parts]) for i in range(len(spans))]


def join(outputs: Sequence[Any], rows: Sequence[int], *, listed: bool = False) -> Any:
    """The parts' results, of so many rows each, as one. Raises Unmergeable for what has no rows.
    For `listed` see split."""
    first = outputs[0]
    if isinstance(first, torch.Tensor) and all(
        _has_rows(one, count) for one, count in zip(outputs, rows, strict=True)
    ):
        return torch.cat(list(outputs))
    if isinstance(first, np.ndarray) and first.ndim and len(first) == rows[0]:
        return np.concatenate(outputs)
    if isinstance(first, CONSTANTS) and all(one == first for one in outputs):
        return first
    if (
        isinstance(first, list)
        and len(first) == rows[0]
        and (listed or not all(_has_rows(one, rows[0]) for one in first))
    ):
        return [item for one in outputs for item in one]
    names = list(keys(first))
    alike = all(list(keys(one)) == names for one in outputs)
    whole = isinstance(first, torch.Tensor) or not (names or isinstance(first, COLLECTIONS))
    if whole or not alike:
        raise Unmergeable(f"results of type {type(first).__name__} cannot be put together")
    inside = zip(*map(contents, outputs), strict=True)
    return refilled(first, [join(items, rows, listed=listed) for items in inside])


def _has_rows(item: Any, total: int) -> bool:
    return isinstance(item, torch.Tensor) and item.ndim > 0 and item.shape[0] == total


def _selected(cache: Cache, start: int, stop: int) -> Cache:
    selected = copy.deepcopy(cache)
    devices = {one.device for one in tensors(cache)}
    # else each layer waits for a copy
    indices = torch.arange(start, stop, device=devices.pop() if len(devices) == 1 else None)
    selected.batch_select_indices(indices)
    return selected
