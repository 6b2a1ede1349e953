"""Whether results of merged and of single calls agree, and whose result is whose.

Results are compared slice by slice along every axis but the batch, so that channels of large
numbers and small rows do not hide errors elsewhere. In single precision, the error of a slice may
be `SHARE` of its spread over rows. Without a spread, and in half precision, it may be little more
than the call's own noise: the difference if the same call runs in a batch of copies of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepweave.compat.nested import leaves, tensors

SHARE = 1e-4  # allowed error, as a share of a slice's spread over rows
# larger errors must be explained by the call's noise; in roundings of a slice's spread or largest
# number
STRICT = 64
APART = 10.0  # how many times closer a row must be to its own single result than to any other's
NOISY = 2.0  # allowed error in noise of the call: mean of a slice; four times that for one number
# allowed noise, as a share of the slice's largest number
LOUDEST = {torch.float16: 4e-2, torch.bfloat16: 4e-2}
LOUDEST_OTHERS = 1e-4
ROUNDINGS = 8  # of the slice's largest number, that are always allowed
FEWEST = 16  # numbers of a slice, to measure its size and noise: fewer may all be near zero

# a call's results in a batch of copies of itself; None if that fails
Copies = Callable[[], Sequence[Any] | None]


@dataclass(frozen=True)
class Pair:
    """The results of one call, merged and alone."""

    merged: Any
    single: Any
    copies: Copies = lambda: None
    # whether all merged calls are equal in size, so that copies have the same noise
    alike: bool = False


class Differ(Exception):
    """Results do not agree; the message says how they differ."""


class NotFinite(Exception):
    """Results agree, but contain numbers that are not finite, so they are no evidence."""


def compare(pairs: Sequence[Pair], rows: Sequence[Any] = ()) -> float:
    """The largest difference, as a share of its slice's spread or largest number. `rows`: more
    results, to measure the spread.

    Raises Differ; or NotFinite if results agree, with infinities or NaN in the same places.
    """
    worst, finite = 0.0, True
    singles = [leaves(pair.single) for pair in pairs]
    results = [*singles, *map(leaves, rows)]
    for number, pair in enumerate(pairs):
        ours, theirs = leaves(pair.merged), singles[number]
        if [_form(leaf) for leaf in ours] != [_form(leaf) for leaf in theirs]:
            raise Differ("merged and alone give results of different shapes")
        noise = _Noise(pair)
        for i, (a, b) in enumerate(zip(map(_numbers, ours), map(_numbers, theirs), strict=True)):
            if not isinstance(a, torch.Tensor):
                if a != b:
                    reason = f"merged and alone give different constants, {a!r} and {b!r}"
                    raise Differ(reason[:200])
            elif not (a.dtype.is_floating_point or a.dtype.is_complex):
                if not torch.equal(a, b):
                    raise Differ("merged and alone give different whole numbers")
            elif not torch.equal(a, b):
                others = [_numbers(result[i]) for result in results if i < len(result)]
                others = [item for item in others if isinstance(item, torch.Tensor)]
                others = [item for item in others if item.shape[1:] == b.shape[1:]]
                error, whole = _tensor(a, b, others, noise, i)
                worst, finite = max(worst, error), finite and whole
    if not finite:
        raise NotFinite
    return worst


def agree(merged: Any, single: Any) -> bool:
    """Whether two results of one call, from different batches, agree."""
    try:
        compare([Pair(merged, single)])
    except (Differ, NotFinite):
        return False
    return True


def equal(one: Any, other: Any) -> bool:
    """Whether two results are bitwise equal."""
    ours, theirs = leaves(one), leaves(other)
    if [_form(leaf) for leaf in ours] != [_form(leaf) for leaf in theirs]:
        return False
    return all(
        bool(((a == b) | (a.isnan() & b.isnan())).all())
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else torch.equal(a, b)
        if isinstance(a, torch.Tensor)
        else a == b
        for a, b in zip(map(_numbers, ours), map(_numbers, theirs), strict=True)
    )


def close(one: Any, other: Any, again: Any) -> bool:
    """Whether two results of one call differ by no more than `other` and `again` do, which ran one
    after the other: on devices that sum in any order."""
    if not [_form(leaf) for leaf in leaves(one)] == [_form(leaf) for leaf in leaves(other)]:
        return False
    for a, b, c in zip(tensors(one), tensors(other), tensors(again), strict=False):
        if not _is_inexact(a):
            if not torch.equal(a, b):
                return False
        elif a.shape == c.shape:
            if not torch.equal(a.isfinite(), b.isfinite()):
                return False
            first, second, third = (_wide(item).nan_to_num(0.0, 0.0, 0.0) for item in (a, b, c))
            step = torch.finfo(a.dtype).eps * _largest(second)
            if not _largest(first - second) <= 4 * _largest(third - second) + step:
                return False
    return True


def _largest(numbers: torch.Tensor) -> float:
    return float(numbers.abs().max()) if numbers.numel() else 0.0


def effect(changed: Any, base: Any, others: Sequence[Any]) -> float:
    """The largest difference of two results, in units of the allowed error; infinite if they differ
    in shape. `others`: more results, to measure the spread over rows."""
    most = 0.0
    results = [[_numbers(leaf) for leaf in leaves(result)] for result in (base, *others)]
    for i, (a, b) in enumerate(zip(map(_numbers, leaves(changed)), results[0], strict=False)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not _is_inexact(b):
            most = max(most, 0.0 if type(a) is type(b) and equal(a, b) else float("inf"))
        elif a.shape != b.shape:
            return float("inf")
        elif not torch.equal(a, b):
            first, second = _wide(a), _wide(b)
            leaf_of_each = [result[i] for result in results if i < len(result)]
            rows = torch.cat(
                [_wide(leaf) for leaf in leaf_of_each if leaf.shape[1:] == b.shape[1:]]
            )
            difference = torch.nan_to_num((first - second).abs(), nan=0.0, posinf=0.0)
            spreads = _slices((rows.amax(0) - rows.amin(0)).nan_to_num(0.0, 0.0)[None])
            for moved, spread, level in zip(
                _slices(difference), spreads, _slices(second.abs()), strict=True
            ):
                allowed = _allowed(b.dtype, spread.amax(-1), level.amax(-1))
                if moved.numel():
                    most = max(most, float((moved.amax(-1) / allowed).nan_to_num(0.0).max()))
    return most


def _is_inexact(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _allowed(dtype: torch.dtype, spread: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    if dtype in LOUDEST:
        return LOUDEST[dtype] / 8 * largest
    return torch.maximum(SHARE * spread, ROUNDINGS * torch.finfo(dtype).eps * largest)


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, (torch.Tensor, np.ndarray)) else type(leaf)


def _numbers(leaf: Any) -> Any:
    """A NumPy array as a tensor, or as a list if torch has no such type; others unchanged."""
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(leaf.copy()) if leaf.dtype.kind in "fiub" else leaf.tolist()
    return leaf


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in double precision on the CPU, since some devices have none; complex numbers as
    pairs."""
    here = tensor.detach().cpu()
    return torch.view_as_real(here).double() if here.is_complex() else here.double()


def _slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's slices along each axis but the first, each as (slices, numbers); a tensor of one
    axis is one slice."""
    if tensor.ndim < 2:
        yield tensor.reshape(1, -1)
    for axis in range(1, tensor.ndim):
        yield tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


class _Noise:
    """A call's results in a batch of copies of itself, computed on first use."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self.alike = pair.alike
        self._computed = False
        self._copies: list[list[Any]] | None = None

    def of(self, i: int) -> list[torch.Tensor] | None:
        if not self._computed:
            self._computed = True
            copies = self._pair.copies()
            self._copies = None if copies is None else [leaves(copy) for copy in copies]
        return None if self._copies is None else [_wide(_numbers(copy[i])) for copy in self._copies]


def _tensor(
    merged: torch.Tensor,
    single: torch.Tensor,
    others: Sequence[torch.Tensor],
    noise: _Noise,
    i: int,
) -> tuple[float, bool]:
    """The largest error, as a share of its slice's spread or largest number, and whether all
    numbers are finite. Raises Differ."""
    ours, alone = _wide(merged), _wide(single)
    here, there = ours.isfinite(), alone.isfinite()
    whole = bool(there.all())
    if not torch.equal(here, there):
        raise Differ("merged and alone are not finite in different places")
    if not whole:
        ours, alone = ours.where(here, 0.0), alone.where(there, 0.0)
    error = (ours - alone).abs()
    rows = torch.cat([_wide(other) for other in others])
    rows = rows.where(rows.isfinite(), 0.0)
    half = single.dtype in LOUDEST
    eps = torch.finfo(single.dtype).eps
    worst = 0.0
    doubtful = False
    spreads = _slices((rows.amax(0) - rows.amin(0))[None])
    for wrong, spread, level in zip(_slices(error), spreads, _slices(alone.abs()), strict=True):
        off, span, largest = wrong.amax(-1), spread.amax(-1), level.amax(-1)
        rounding = ROUNDINGS * eps * largest
        if half:
            doubtful = doubtful or bool((off > 0).any())
        else:
            allowed = torch.maximum(SHARE * span, rounding)
            if noise.alike:
                allowed = torch.minimum(allowed, STRICT * eps * torch.maximum(span, largest))
            doubtful = doubtful or bool((off > allowed).any())
        size = torch.maximum(span, largest) if half else torch.where(span > 0, span, largest)
        share = off / torch.where(size > 0, size, torch.ones_like(size))
        worst = max(worst, _largest(share))
    if doubtful:
        allowed = SHARE * (rows.amax(0) - rows.amin(0))
        _compare_with_noise(ours, alone, noise.of(i), single.dtype, allowed, worst, noise.alike)
    return worst, whole


def _compare_with_noise(
    ours: torch.Tensor,
    alone: torch.Tensor,
    copies: list[torch.Tensor] | None,
    dtype: torch.dtype,
    allowed: torch.Tensor,
    worst: float,
    alike: bool,
) -> None:
    """Raise Differ if a call's result depends on the other calls by more than its own noise."""
    half = dtype in LOUDEST
    eps = torch.finfo(dtype).eps
    loudest = LOUDEST.get(dtype, LOUDEST_OTHERS)
    message = f"merged and alone differ by {worst:.2g} of the results' spread"
    if copies is None:  # they failed: the effect of other calls cannot be separated from noise
        copies, alike = [alone], False
        if half:
            eps = LOUDEST[dtype] / 2
    copies = [copy.where(copy.isfinite(), 0.0) for copy in copies if copy.shape == alone.shape]
    if not copies:
        raise Differ(message)
    steady = copies[0]
    by_axis = zip(
        _slices((ours - steady).abs()),  # effect of the other calls
        _slices((steady - alone).abs()),  # effect of the batch's size
        # effect of the position in the batch
        _slices(torch.stack([(copy - steady).abs() for copy in copies]).amax(0)),
        _slices(alone.abs()),
        _slices(allowed[None].expand(1, *allowed.shape)),
        strict=True,
    )
    loud = float(_rms((steady - alone).flatten()) / (_rms(alone.flatten()) + 1e-300))
    for others, size, place, level, spread in by_axis:
        largest, mean, off_by = level.amax(-1), _rms(level), _rms(size)
        if level.shape[-1] < FEWEST:  # such as a pooled embedding: slices of one number
            off_by = off_by.clamp(min=off_by.median())
            if half:
                largest, mean = (item.clamp(min=item.median()) for item in (largest, mean))
        floor = ROUNDINGS * eps * largest
        share = torch.zeros_like(largest) if half else spread.amax(-1)
        if alike:
            share = torch.minimum(share, STRICT * eps * torch.maximum(share / SHARE, largest))
        audible = torch.maximum(loudest * largest, torch.maximum(share, floor))
        if half and loud <= loudest:
            # layers add channels up, so quiet ones have the noise of the others
            audible = audible.clamp(min=4 * NOISY * float(off_by.median()))
        too_loud = size.amax(-1) > audible
        noise = torch.maximum(off_by, loud * mean)
        peak = torch.maximum(size.amax(-1), 4 * noise)
        # calls of other lengths add up in another order, which changes last bits
        small = eps * mean / (4 if alike else 1) if half else floor
        for moved in (others, place):
            off = _rms(moved) > torch.maximum(NOISY * noise + small, share)
            high = moved.amax(-1) > torch.maximum(4 * NOISY * peak + 4 * small, share)
            if bool((off | high | too_loud).any()):
                raise Differ(message)


def _rms(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.square().mean(-1).sqrt()


def told_apart(merged: Sequence[Any], single: Sequence[Any]) -> bool:
    """Whether every merged row is far closer to its own single result than to those of other calls,
    and at least two of these differ. Only results of equal shapes are compared."""
    rows = [(_rows(ours), _rows(own)) for ours, own in zip(merged, single, strict=True)]
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
    """The inexact numbers of a result, as (rows, numbers)."""
    values = [item for item in map(_numbers, leaves(output)) if isinstance(item, torch.Tensor)]
    values = [item for item in values if item.ndim and _is_inexact(item)]
    if not values:
        return torch.empty(0, 0)
    rows = values[0].shape[0]
    values = [_wide(item).nan_to_num(0.0, 0.0, 0.0) for item in values if item.shape[0] == rows]
    return torch.cat([item.reshape(rows, -1) for item in values], dim=1)
