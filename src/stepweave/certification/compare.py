"""Whether results of merged and of single calls agree, and whose result is whose.

Results are held against each other slice by slice along every axis but the batch, so that neither a
channel of large numbers nor a quiet row hides an error elsewhere. In single precision a slice may
be off by `SHARE` of its own spread over rows; where it has none, and in half precision, by little
more than the call's own noise: what the same call gives in a batch of copies of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepweave.compat.nested import leaves, tensors

SHARE = 1e-4  # of a slice's spread over rows
# roundings of a slice's spread or largest number, beyond which a call's own noise must explain an
# error
STRICT = 64
APART = 10.0  # how much closer a row must be to its own single result than to any other's
NOISY = 2.0  # times the call's own noise, in the mean of a slice; four times as much in one number
# noise itself, as a share of the slice's largest number
LOUDEST = {torch.float16: 4e-2, torch.bfloat16: 4e-2}
LOUDEST_OTHERS = 1e-4
ROUNDINGS = 8  # of the slice's largest number, which are no error
# numbers of a slice that tell how large it is and how noisy: of fewer, all may by chance be near
# zero
FEWEST = 16

# a call's results in a batch of copies of itself; None: it cannot be had
Copies = Callable[[], Sequence[Any] | None]


@dataclass(frozen=True)
class Pair:
    """What one call gave merged and alone."""

    merged: Any
    single: Any
    copies: Copies = lambda: None
    # whether calls were merged that do not differ in size, so that copies make the same noise
    alike: bool = False


class Differ(Exception):
    """Results do not agree; the message says in what."""


class NotFinite(Exception):
    """Results are not finite in the same places, which says nothing."""


def compare(pairs: Sequence[Pair], rows: Sequence[Any] = ()) -> float:
    """The largest difference, as a share of the slice's spread or largest number. `rows`: results
    that tell the spread, too.

    Raises Differ, or NotFinite if what is finite agrees and some of it is not.
    """
    worst, finite = 0.0, True
    singles = [leaves(pair.single) for pair in pairs]
    company = [*singles, *map(leaves, rows)]
    for number, pair in enumerate(pairs):
        ours, theirs = leaves(pair.merged), singles[number]
        if [_form(leaf) for leaf in ours] != [_form(leaf) for leaf in theirs]:
            raise Differ("merged and alone give results of different shapes")
        noise = _Noise(pair)
        for i, (a, b) in enumerate(zip(map(_numbers, ours), map(_numbers, theirs), strict=True)):
            if not isinstance(a, torch.Tensor):
                if a != b:
                    raise Differ(
                        f"merged and alone give different constants, {a!r} and {b!r}"[:200]
                    )
            elif not (a.dtype.is_floating_point or a.dtype.is_complex):
                if not torch.equal(a, b):
                    raise Differ("merged and alone give different whole numbers")
            elif not torch.equal(a, b):
                others = [_numbers(other[i]) for other in company if i < len(other)]
                others = [one for one in others if isinstance(one, torch.Tensor)]
                error, whole = _tensor(
                    a, b, [one for one in others if one.shape[1:] == b.shape[1:]], noise, i
                )
                worst, finite = max(worst, error), finite and whole
    if not finite:
        raise NotFinite
    return worst


def agree(merged: Any, single: Any) -> bool:
    """Whether two results of one call, had in different batches, agree."""
    try:
        compare([Pair(merged, single)])
    except (Differ, NotFinite):
        return False
    return True


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same to the last bit."""
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
    """Whether two results of one call differ by no more than `again`, had at once after `other`,
    does from that: on devices whose sums come in any order."""
    if not [_form(leaf) for leaf in leaves(one)] == [_form(leaf) for leaf in leaves(other)]:
        return False
    for a, b, c in zip(tensors(one), tensors(other), tensors(again), strict=False):
        if not _is_inexact(a):
            if not torch.equal(a, b):
                return False
        elif a.shape == c.shape:
            if not torch.equal(a.isfinite(), b.isfinite()):
                return False
            first, second, third = (_wide(one).nan_to_num(0.0, 0.0, 0.0) for one in (a, b, c))
            noise = float((third - second).abs().max()) if third.numel() else 0.0
            step = torch.finfo(a.dtype).eps * float(second.abs().max() if second.numel() else 0.0)
            if (
                not float((first - second).abs().max() if first.numel() else 0.0)
                <= 4 * noise + step
            ):
                return False
    return True


def effect(changed: Any, base: Any, others: Sequence[Any]) -> float:
    """How many times the error allowed two results differ by, where they differ most; infinite if
    in shape. `others` tell the spread over rows, as for `compare`."""
    most = 0.0
    company = [[_numbers(leaf) for leaf in leaves(one)] for one in (base, *others)]
    for i, (a, b) in enumerate(
        zip(map(_numbers, leaves(changed)), map(_numbers, leaves(base)), strict=False)
    ):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not _is_inexact(b):
            most = max(most, 0.0 if type(a) is type(b) and equal(a, b) else float("inf"))
        elif a.shape != b.shape:
            return float("inf")
        elif not torch.equal(a, b):
            first, second = _wide(a), _wide(b)
            rows = torch.cat(
                [
                    _wide(one[i])
                    for one in company
                    if i < len(one) and one[i].shape[1:] == b.shape[1:]
                ]
            )
            difference = torch.nan_to_num((first - second).abs(), nan=0.0, posinf=0.0)
            spreads = _slices((rows.amax(0) - rows.amin(0)).nan_to_num(0.0, 0.0)[None])
            for moved, spread, level in zip(
                _slices(difference), spreads, _slices(second.abs()), strict=True
            ):
                allowed = _allowed(b.dtype, spread.amax(-1), level.amax(-1))
                most = max(
                    most,
                    float((moved.amax(-1) / allowed).nan_to_num(0.0).max())
                    if moved.numel()
                    else 0.0,
                )
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
    """An array as a tensor, where there are such tensors; whatever else as it is."""
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(leaf.copy()) if leaf.dtype.kind in "fiub" else leaf.tolist()
    return leaf


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision, on the CPU first: not every device has that. Complex numbers as
    pairs."""
    here = tensor.detach().cpu()
    return torch.view_as_real(here).double() if here.is_complex() else here.double()


def _slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's slices along each axis but the first, as (slices, numbers); a tensor of one axis
    is one slice."""
    if tensor.ndim < 2:
        yield tensor.reshape(1, -1)
    for axis in range(1, tensor.ndim):
        yield tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


class _Noise:
    """What a call gives in a batch of copies of itself, had only if it is needed."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self.alike = pair.alike
        self._had = False
        self._copies: list[list[Any]] | None = None

    def of(self, i: int) -> list[torch.Tensor] | None:
        if not self._had:
            self._had = True
            copies = self._pair.copies()
            self._copies = None if copies is None else [leaves(one) for one in copies]
        return None if self._copies is None else [_wide(_numbers(one[i])) for one in self._copies]


def _tensor(
    merged: torch.Tensor,
    single: torch.Tensor,
    others: Sequence[torch.Tensor],
    noise: _Noise,
    i: int,
) -> tuple[float, bool]:
    """The largest share that an error is of what it is held against, and whether all numbers are
    finite. Raises Differ."""
    ours, alone = _wide(merged), _wide(single)
    here, there = ours.isfinite(), alone.isfinite()
    whole = bool(there.all())
    if not torch.equal(here, there):
        raise Differ("merged and alone are not finite in different places")
    if not whole:
        ours, alone = ours.where(here, 0.0), alone.where(there, 0.0)
    error = (ours - alone).abs()
    rows = torch.cat([_wide(one) for one in others])
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
        held = torch.maximum(span, largest) if half else torch.where(span > 0, span, largest)
        share = off / torch.where(held > 0, held, torch.ones_like(held))
        worst = max(worst, float(share.max()) if share.numel() else 0.0)
    if doubtful:
        _hold_against_noise(
            ours,
            alone,
            noise.of(i),
            single.dtype,
            SHARE * (rows.amax(0) - rows.amin(0)),
            worst,
            noise.alike,
        )
    return worst, whole


def _hold_against_noise(
    ours: torch.Tensor,
    alone: torch.Tensor,
    copies: list[torch.Tensor] | None,
    dtype: torch.dtype,
    allowed: torch.Tensor,
    worst: float,
    alike: bool,
) -> None:
    """Raises Differ if a call's result depends on its company by more than its own noise."""
    half = dtype in LOUDEST
    eps = torch.finfo(dtype).eps
    loudest = LOUDEST.get(dtype, LOUDEST_OTHERS)
    message = f"merged and alone differ by {worst:.2g} of the results' spread"
    if copies is None:  # not to be had: the company's part cannot be told from the noise
        copies, alike = [alone], False
        if half:
            eps = LOUDEST[dtype] / 2
    copies = [one.where(one.isfinite(), 0.0) for one in copies if one.shape == alone.shape]
    if not copies:
        raise Differ(message)
    steady = copies[0]
    by_axis = zip(
        _slices((ours - steady).abs()),  # what the company did
        _slices((steady - alone).abs()),  # what the size of the batch did
        # what the place in it did
        _slices(torch.stack([(one - steady).abs() for one in copies]).amax(0)),
        _slices(alone.abs()),
        _slices(allowed[None].expand(1, *allowed.shape)),
        strict=True,
    )
    loud = float(_rms((steady - alone).flatten()) / (_rms(alone.flatten()) + 1e-300))
    for company, size, place, level, spread in by_axis:
        largest, mean, off_by = level.amax(-1), _rms(level), _rms(size)
        if half and level.shape[-1] < FEWEST:  # as those of a pooled embedding: a number each
            largest, mean, off_by = (one.clamp(min=one.median()) for one in (largest, mean, off_by))
        floor = ROUNDINGS * eps * largest
        share = torch.zeros_like(largest) if half else spread.amax(-1)
        if alike:
            share = torch.minimum(share, STRICT * eps * torch.maximum(share / SHARE, largest))
        too_loud = size.amax(-1) > torch.maximum(loudest * largest, torch.maximum(share, floor))
        noise = torch.maximum(off_by, loud * mean)
        peak = torch.maximum(size.amax(-1), 4 * noise)
        small = eps * mean / 4 if half else floor
        for moved in (company, place):
            off = _rms(moved) > torch.maximum(NOISY * noise + small, share)
            high = moved.amax(-1) > torch.maximum(4 * NOISY * peak + 4 * small, share)
            if bool((off | high | too_loud).any()):
                raise Differ(message)


def _rms(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.square().mean(-1).sqrt()


def told_apart(merged: Sequence[Any], single: Sequence[Any]) -> bool:
    """Whether every merged row is far closer to its own single result than to those of other calls,
    and some differ at all.

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
    found = [
        t
        for t in map(_numbers, leaves(output))
        if isinstance(t, torch.Tensor) and t.ndim and _is_inexact(t)
    ]
    if not found:
        return torch.empty(0, 0)
    rows = found[0].shape[0]
    flat = [
        _wide(t).nan_to_num(0.0, 0.0, 0.0).reshape(rows, -1) for t in found if t.shape[0] == rows
    ]
    return torch.cat(flat, dim=1)
