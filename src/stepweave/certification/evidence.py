"""Evidence for proofs: values of a call's arguments, and synthetic calls with other values.

That two calls agree merged and alone is no evidence for an argument in which they hardly differ. It
is proven only if the value of the other call, in its place, would have changed the result by
clearly more than the allowed error. Arguments of few numbers per row, such as times and guidance,
are also tried with values far apart: 0, and twice the largest one seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from stepweave.batching.call import Call
from stepweave.batching.leaves import LISTED, MASK, NUMBER, ROWS, SCALAR
from stepweave.compat.nested import contents, keys, refilled

SMALL = 4  # numbers per row
FEW = 64  # numbers that are read one by one
EVIDENT = 4.0  # a clear effect, in units of the allowed error
SLIGHT = 1e-6  # the spread of sizes that differ in shape only


class Span(NamedTuple):
    """The smallest and the largest of some numbers."""

    low: float
    high: float

    def covers(self, other: Span) -> bool:
        return self.low <= other.low and other.high <= self.high

    @property
    def width(self) -> float:
        return self.high - self.low


def hull(spans: Iterable[Span]) -> Span:
    lows, highs = zip(*spans, strict=True)
    return Span(min(lows), max(highs))


def samples(call: Call) -> frozenset[int]:
    """The positions of the sample's leaves, which distinguish rows."""
    names = enumerate(str(path[0]) for path, _ in call.paths)
    return frozenset(i for i, name in names if call.arguments.get(name) is call.sample)


def scalars(call: Call) -> tuple[int, ...]:
    """The positions of leaves with few numbers per row, except the sample's."""
    positions = []
    for i, (leaf, (_, kind)) in enumerate(zip(call.leaves, call.paths, strict=True)):
        value = leaf[0]
        if kind is NUMBER:
            positions.append(i)
        elif kind in (SCALAR, ROWS) and value is not call.sample:
            real = value.dtype is not torch.bool and not value.dtype.is_complex
            if real and value.numel() <= SMALL * max(1, value.shape[0] if value.ndim else 1):
                positions.append(i)
    return tuple(positions)


def span(call: Call, i: int) -> Span:
    """The smallest and the largest number of one argument. Waits for the device."""
    values: Span | None = call.spans.get(i)
    if values is None:
        values = call.spans[i] = hull(_span(value) for value in call.leaves[i])
    return values


def _span(value: Any) -> Span:
    if not isinstance(value, torch.Tensor):
        return Span(float(value), float(value))
    if value.numel() <= FEW:
        numbers = value.reshape(-1).tolist()
        return Span(min(numbers), max(numbers)) if numbers else Span(0.0, 0.0)
    if value.is_complex():
        value = torch.view_as_real(value)
    elif value.dtype is torch.bool:
        value = value.byte()
    low, high = torch.aminmax(value.detach())
    return Span(float(low), float(high))


def ends(seen: Span, whole: bool) -> Span:
    """The span to try for an argument whose values were `seen`: from 0 to twice the largest, or if
    any is negative, wider by its width at both ends.

    Whole numbers may be indices of a table, so nothing larger than the largest is tried.
    """
    if seen.low >= 0:
        return Span(0.0, seen.high if whole else 2 * seen.high)
    return seen if whole else Span(seen.low - seen.width, seen.high + seen.width)


def filled(call: Call, i: int, number: float) -> Call:
    """The call with an argument filled with this number."""
    value = call.leaves[i][0]
    new: Any = (
        torch.full_like(value, number) if isinstance(value, torch.Tensor) else type(value)(number)
    )
    return _with(call, {i: (new,)})


def flooded(call: Call, i: int, number: float, *, noise: bool = False) -> Call:
    """The call with an argument of many numbers filled with one number, or with noise of that size.
    Whole numbers, which may be indices of a table, become 0 or their largest; masks become False
    for 0, else True."""
    leaf = []
    for value in call.leaves[i]:
        if value.dtype is torch.bool:
            new = torch.full_like(value, bool(number))
        elif is_whole(value):
            new = torch.full_like(value, value.max() if number and value.numel() else 0)
        elif noise:
            new = number * torch.randn(
                value.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0)
            )
            new = new.to(value.device, value.dtype)
        else:
            new = torch.full_like(value, number)
        leaf.append(new)
    return _with(call, {i: tuple(leaf)})


def scaled(call: Call, i: int, factor: float) -> Call:
    """The call with an argument multiplied by `factor`."""
    return _with(call, {i: tuple(factor * value for value in call.leaves[i])})


def is_whole(value: Any) -> bool:
    """Whether numbers may be indices of a table, whose end must not be exceeded. On a GPU, where
    that would end the process, so may floats without fractions."""
    if not isinstance(value, torch.Tensor):
        return isinstance(value, int)
    if value.is_complex() or not value.is_floating_point():
        return not value.is_complex()
    return value.device.type != "cpu" and bool((value == value.round()).all())


def units(call: Call) -> list[tuple[int, ...]]:
    """Groups of leaves that are exchanged together: those of one argument and of its mask."""
    masks = {mask: name for name, mask in call.target.masks.items()}
    groups: dict[str, list[int]] = {}
    for i, (path, kind) in enumerate(call.paths):
        name = str(path[0])
        groups.setdefault(masks.get(name, name) if kind is MASK else name, []).append(i)
    return [tuple(group) for group in groups.values()]


def exchanged(call: Call, other: Call, unit: Sequence[int]) -> Call:
    """The call with another's values of some leaves, repeated or cut to its number of rows."""
    return _with(call, {i: call.paths[i][1].fit(other.leaves[i], call.leaves[i]) for i in unit})


def _with(call: Call, changes: dict[int, tuple[Any, ...]]) -> Call:
    """The call with other leaves at these positions."""
    arguments, leaves = call.arguments, list(call.leaves)
    for i, leaf in changes.items():
        path, kind = call.paths[i]
        value = list(leaf) if kind is LISTED else leaf[0]
        name = str(path[0])
        arguments = {**arguments, name: _put(arguments[name], path[1:], value)}
        leaves[i] = leaf
    return dataclasses.replace(call, arguments=arguments, leaves=leaves, spans={})


def _put(value: Any, path: Sequence[Hashable], new: Any) -> Any:
    """A copy of a value with `new` at a path within it."""
    if not path:
        return new
    inside = zip(keys(value), contents(value), strict=True)
    return refilled(
        value, [_put(item, path[1:], new) if key == path[0] else item for key, item in inside]
    )


def distance(one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """The largest difference between the numbers of two leaves; a single row is compared with all
    of the other's. Infinite for different shapes."""
    most = 0.0
    for a, b in zip(one, other, strict=False):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return float("inf")
        one_row = a.ndim and b.ndim and 1 in (a.shape[0], b.shape[0])
        if a.shape[1:] != b.shape[1:] or (a.shape != b.shape and not one_row):
            return float("inf")
        if a.numel():
            difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs()
            most = max(most, float(difference.nan_to_num(0.0).max()))
    return most if len(one) == len(other) else float("inf")


def spread(calls: Sequence[Call]) -> float:
    """How much calls differ in the sizes that may differ, from 0 (not at all) to 1."""
    if all(call.ragged == calls[0].ragged for call in calls):
        return 0.0
    shares = [
        1 - min(low for low, _ in sizes) / (max(high for _, high in sizes) or 1)
        for sizes in zip(*(call.extents for call in calls), strict=True)
    ]
    return max(*shares, SLIGHT) if shares else SLIGHT


def readable(call: Call, i: int) -> bool:
    """Whether an argument is on the CPU, so that reading it does not wait for a device."""
    value = call.leaves[i][0]
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"
