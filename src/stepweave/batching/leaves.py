"""The kinds of leaves of a call's arguments: how those of several calls become one, and one that of
some of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepweave.compat.nested import contents, refilled

# What is equal for calls that may share a forward: the leaf's kind, and whatever a kind needs to be
# equal. Tuples, since they are hashed and compared many times a call: frozen dataclasses would take
# four times as long to read, twice as long to hash.
Layout = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A kind of leaf. This one counts for all rows, and is equal for all calls."""

    name: str

    def merge(self, node: Layout, values: Sequence[Any], rows: Sequence[int]) -> Any:
        """One value for calls of so many rows, from theirs."""
        return values[0]

    def part(self, node: Layout, value: Any, rows: int, span: slice) -> Any:
        """The value for some of a call's rows."""
        return value

    def fit(self, leaf: tuple[Any, ...], own: tuple[Any, ...]) -> tuple[Any, ...]:
        """Another call's leaf, repeated or cut to as many rows as a call's own has."""
        return leaf


@dataclass(frozen=True, eq=False)
class Rows(Leaf):
    """A tensor of one or more entries for each row, along an axis; or of one that counts for all
    rows."""

    axis: int = 0

    def merge(self, node: Layout, values: Sequence[Any], rows: Sequence[int]) -> Any:
        every = [
            value.expand(count, *value.shape[1:]) if value.shape[self.axis] == 1 != count else value
            for value, count in zip(values, rows, strict=True)
        ]
        return torch.cat(every, dim=self.axis)

    def part(self, node: Layout, value: Any, rows: int, span: slice) -> Any:
        each = value.shape[self.axis] // rows
        if not each:
            return value
        return value.narrow(self.axis, span.start * each, (span.stop - span.start) * each)

    def fit(self, leaf: tuple[Any, ...], own: tuple[Any, ...]) -> tuple[Any, ...]:
        given, wanted = leaf[0].shape[self.axis], own[0].shape[self.axis]
        if given == wanted:
            return leaf
        order = torch.arange(wanted, device=leaf[0].device) % given
        return (leaf[0].index_select(self.axis, order),)


class Number(Leaf):
    """A number for all rows of a call: a tensor without dimensions, or one of Python's."""

    def merge(self, node: Layout, values: Sequence[Any], rows: Sequence[int]) -> Any:
        """On the device of the layout, which is not waited for: the host's memory is read at
        once."""
        _, dtype, device = node
        every = [
            value.reshape(1).expand(count)
            if isinstance(value, torch.Tensor)
            else torch.tensor([value] * count, dtype=dtype)
            for value, count in zip(values, rows, strict=True)
        ]
        if any(value.device == device for value in every):
            return torch.cat([value.to(device, non_blocking=True) for value in every])
        return torch.cat(every).to(device, non_blocking=True)


class PerRow(Leaf):
    """A list with an entry for each row."""

    def merge(self, node: Layout, values: Sequence[Any], rows: Sequence[int]) -> Any:
        return list(itertools.chain.from_iterable(values))

    def part(self, node: Layout, value: Any, rows: int, span: slice) -> Any:
        return value[span]

    def fit(self, leaf: tuple[Any, ...], own: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(leaf[row % len(leaf)] for row in range(len(own)))


class Repeated(PerRow):
    """A list with the same constant for each row."""

    def merge(self, node: Layout, values: Sequence[Any], rows: Sequence[int]) -> Any:
        return [values[0][0]] * sum(rows)


class Nested(Leaf):
    """A collection, or an object that is what it holds: its type, its keys, then what is in it."""

    def merge(self, node: Layout, values: Sequence[Any], rows: Sequence[int]) -> Any:
        inside = zip(node[3:], *map(contents, values), strict=True)
        return refilled(values[0], [child[0].merge(child, items, rows) for child, *items in inside])

    def part(self, node: Layout, value: Any, rows: int, span: slice) -> Any:
        inside = zip(node[3:], contents(value), strict=True)
        return refilled(value, [child[0].part(child, item, rows, span) for child, item in inside])


ROWS = Rows("rows")
PADDED, MASK = Rows("padded"), Rows("mask")  # that merge() puts together
SEVERAL, ACROSS = Rows("several"), Rows("across", axis=1)
SCALAR, NUMBER = Number("scalar"), Number("number")
LISTED, REPEATED = PerRow("per row"), Repeated("repeated")
SHARED, CONSTANT, NESTED = Leaf("shared"), Leaf("constant"), Nested("nested")
