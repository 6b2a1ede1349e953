"""What a proof is tried on: the values of a call's arguments, and calls made up with other values
in their places.

That two calls agree merged and alone says nothing of an argument in which they hardly differ. It is
proven only if the value of the other call, in its place, would have changed the result by clearly
more than the error allowed. Arguments of few numbers a row, such as times and guidance, are tried
with values far apart, too: with the ends of what has been seen, and with 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from stepweave.batching.call import Call
from stepweave.batching.leaves import LISTED, MASK, NUMBER, ROWS, SCALAR
from stepweave.compat.nested import contents, keys, refilled

SMALL = 4  # numbers a row
FEW = 64  # numbers that are read one by one
EVIDENT = 4.0  # times the error allowed
SLIGHT = 1e-6  # the spread of sizes that differ in shape only


class Span(NamedTuple):
    """The least and the largest of some numbers."""

    low: float
    high: float

    def covers(self, other: Span) -> bool:
        return self.low <= other.low and other.high <= self.high

    @property
    def width(self) -> float:
        return self.high - self.low


def hull(spans: Iterable[Span]) -> Span:
    known = list(spans)
    return Span(min(one.low for one in known), max(one.high for one in known))


def samples(call: Call) -> frozenset[int]:
    """The places among the leaves of the sample, by which rows are told apart."""
    return frozenset(
        i
        for i, (path, _) in enumerate(call.paths)
        if call.arguments.get(str(path[0])) is call.sample
    )


def scalars(call: Call) -> tuple[int, ...]:
    """The places among the leaves of arguments of few numbers a row, but for the sample."""
    found = []
    for i, (leaf, (_, kind)) in enumerate(zip(call.leaves, call.paths, strict=True)):
        value = leaf[0]
        if kind is NUMBER:
            found.append(i)
        elif kind in (SCALAR, ROWS) and value is not call.sample and value.dtype is not torch.bool:
            if (
                value.numel() <= SMALL * max(1, value.shape[0] if value.ndim else 1)
                and not value.dtype.is_complex
            ):
                found.append(i)
    return tuple(found)


def span(call: Call, i: int) -> Span:
    """The least and the largest number of one argument. Waits for the device."""
    known = call.spans.get(i)
    if known is None:
        known = call.spans[i] = hull(_span(value) for value in call.leaves[i])
    return known


def _span(value: Any) -> Span:
    if not isinstance(value, torch.Tensor):
        return Span(float(value), float(value))
    if value.numel() <= FEW:
        numbers = value.reshape(-1).tolist()
        return Span(min(numbers), max(numbers)) if numbers else Span(0.0, 0.0)
    plain = (
        torch.view_as_real(value)
        if value.is_complex()
        else value.byte()
        if value.dtype is torch.bool
        else value
    )
    low, high = torch.aminmax(plain.detach())
    return Span(float(low), float(high))


def ends(seen: Span, whole: bool) -> Span:
    """How far to try an argument whose values were `seen`: from 0 to twice as far, or as far again
    where they are less than 0.

    Whole numbers may be indices of a table, beyond whose end nothing is tried.
    """
    if seen.low >= 0:
        return Span(0.0, seen.high if whole else 2 * seen.high)
    return seen if whole else Span(seen.low - seen.width, seen.high + seen.width)


def filled(call: Call, i: int, number: float) -> Call:
    """The call with this number throughout an argument."""
    value = call.leaves[i][0]
    new: Any = (
        torch.full_like(value, number) if isinstance(value, torch.Tensor) else type(value)(number)
    )
    return _with(call, {i: (new,)})


def flooded(call: Call, i: int, number: float, *, noise: bool = False) -> Call:
    """The call with one number throughout an argument of many, or with noise of its size. Whole
    ones, which may be indices of a table, are 0 or as large as its largest; masks let nothing
    through for 0, everything for another number."""
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
    """The call with an argument so many times as large."""
    return _with(call, {i: tuple(factor * value for value in call.leaves[i])})


def is_whole(value: Any) -> bool:
    """Whether numbers may be indices of a table, beyond whose end nothing is tried. On a GPU, where
    that would end the process, floats without fractions may be so, too."""
    if not isinstance(value, torch.Tensor):
        return isinstance(value, int)
    if value.is_complex() or not value.is_floating_point():
        return not value.is_complex()
    return value.device.type != "cpu" and bool((value == value.round()).all())


def units(call: Call) -> list[tuple[int, ...]]:
    """The leaves, those that are exchanged at once in one: of one argument, and of its mask."""
    masks = {mask: name for name, mask in call.target.masks.items()}
    found: dict[str, list[int]] = {}
    for i, (path, kind) in enumerate(call.paths):
        name = str(path[0])
        found.setdefault(masks.get(name, name) if kind is MASK else name, []).append(i)
    return [tuple(one) for one in found.values()]


def exchanged(call: Call, other: Call, unit: Sequence[int]) -> Call:
    """The call with another's values of some leaves, repeated or cut to as many rows."""
    return _with(call, {i: call.paths[i][1].fit(other.leaves[i], call.leaves[i]) for i in unit})


def _with(call: Call, changes: dict[int, tuple[Any, ...]]) -> Call:
    """The call with other leaves in these places."""
    arguments, found = call.arguments, list(call.leaves)
    for i, leaf in changes.items():
        path, kind = call.paths[i]
        value = list(leaf) if kind is LISTED else leaf[0]
        name = str(path[0])
        arguments = {**arguments, name: _put(arguments[name], path[1:], value)}
        found[i] = leaf
    return dataclasses.replace(call, arguments=arguments, leaves=found, spans={})


def _put(value: Any, path: Sequence[Hashable], new: Any) -> Any:
    """A value with `new` at a path within it."""
    if not path:
        return new
    inside = zip(keys(value), contents(value), strict=True)
    return refilled(
        value, [_put(item, path[1:], new) if key == path[0] else item for key, item in inside]
    )


def distance(one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """The largest difference between the numbers of two leaves, of which a single row counts for
    all; infinite where they are of different shapes."""
    most = 0.0
    for a, b in zip(one, other, strict=False):
        if (
            not isinstance(a, torch.Tensor)
            or not isinstance(b, torch.Tensor)
            or a.shape[1:] != b.shape[1:]
        ):
            return float("inf")
        if a.shape != b.shape and 1 not in (a.shape[0], b.shape[0]):
            return float("inf")
        if a.numel():
            difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs()
            most = max(most, float(difference.nan_to_num(0.0).max()))
    return most if len(one) == len(other) else float("inf")


def spread(calls: Sequence[Call]) -> float:
    """How much calls differ in the sizes that may differ, 0 to 1; more than 0 if they differ at
    all."""
    if all(call.ragged == calls[0].ragged for call in calls):
        return 0.0
    shares = [
        1 - min(least for least, _ in sizes) / (max(most for _, most in sizes) or 1)
        for sizes in zip(*(call.extents for call in calls), strict=True)
    ]
    return max(*shares, SLIGHT) if shares else SLIGHT


def readable(call: Call, i: int) -> bool:
    """Whether an argument can be read without waiting for a device."""
    value = call.leaves[i][0]
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"
