"""Whether results of merged and of single calls agree, and whose result is whose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stepweave.engine.merge import leaves, tensors

TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}  # of the largest output
APART = 10.0  # how much closer a row must be to its own single result than to any other's


def compare(merged: list[Any], single: list[Any]) -> tuple[float, str | None]:
    """The largest difference, as a share of the largest output, and what is wrong, if anything is."""
    worst = 0.0
    for one, other in zip(merged, single, strict=True):
        ours, theirs = leaves(one), leaves(other)
        if [_form(leaf) for leaf in ours] != [_form(leaf) for leaf in theirs]:
            return worst, "merged and alone give results of different shapes"
        for a, b in zip(map(_numbers, ours), map(_numbers, theirs), strict=True):
            if not isinstance(a, torch.Tensor):
                if a != b:
                    return worst, f"merged and alone give different constants, {a!r} and {b!r}"[:200]
                continue
            if not a.dtype.is_floating_point:
                if not torch.equal(a, b):
                    return worst, "merged and alone give different whole numbers"
                continue
            tolerance = TOLERANCE.get(a.dtype, TOLERANCE[torch.float32])
            error = _relative(a, b)
            if not error <= tolerance:  # also NaN in one and not in the other
                return max(worst, error), f"merged and alone differ by {error:.2g} of the largest output"
            worst = max(worst, error)
    return worst, None


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, (torch.Tensor, np.ndarray)) else type(leaf)


def _numbers(leaf: Any) -> Any:
    """An array as a tensor, where there are such tensors; whatever else as it is."""
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(leaf.copy()) if leaf.dtype.kind in "fiub" else leaf.tolist()
    return leaf


def _relative(merged: torch.Tensor, single: torch.Tensor) -> float:
    if torch.equal(merged, single):
        return 0.0
    ours, alone = (one.detach().cpu().double() for one in (merged, single))  # not every device has doubles
    return float((ours - alone).abs().max()) / (float(alone.abs().max()) or 1.0)


def told_apart(merged: list[Any], single: list[Any]) -> bool:
    """Whether every merged row is far closer to its own single result than to those of other calls, and some differ at all.

    Only calls with results of the same shapes can be held against each other.
    """
    rows = [(_rows(one), _rows(other)) for one, other in zip(merged, single, strict=True)]
    evidence = False
    for i, (ours, own) in enumerate(rows):
        for j, (_, others) in enumerate(rows):
            if i == j or own.shape[1:] != others.shape[1:]:
                continue
            for row in range(len(ours)):
                apart = (others - own[row]).norm(dim=1)
                differing = others[apart > 0]
                if not len(differing):
                    continue
                distance = (ours[row] - own[row]).norm()
                if (APART * distance > (differing - ours[row]).norm(dim=1)).any():
                    return False
                evidence = True
    return evidence


def _rows(output: Any) -> torch.Tensor:
    """All numbers of a result, as (rows, numbers)."""
    found = [t for t in tensors(output) if t.ndim and t.dtype.is_floating_point]
    if not found:
        return torch.empty(0, 0)
    rows = found[0].shape[0]
    flat = [t.detach().double().cpu().reshape(rows, -1) for t in found if t.shape[0] == rows]
    return torch.cat(flat, dim=1)
