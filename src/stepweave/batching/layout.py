"""Descriptions of calls, by which like is told from unlike: by the values of the arguments, not by
model."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from enum import Enum
from typing import Any

import numpy as np
import torch

from stepweave.batching import leaves
from stepweave.batching.batch_axes import ITEMS, PER_ROW, Guess, Path
from stepweave.batching.call import Call, Group, Unmergeable
from stepweave.batching.fingerprints import Fingerprints
from stepweave.batching.leaves import Layout, Leaf
from stepweave.compat.isolation import is_plain
from stepweave.compat.nested import COLLECTIONS, DEEPEST, contents, is_holder, keys

logger = logging.getLogger(__name__)

_OF_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout)
_CONSTANTS = (type(None), bool, int, str, bytes, *_OF_TORCH, Enum, type)
TIMES = ("timestep", "timesteps")
_TIME_TYPES = (torch.int32, torch.int64, torch.float32)  # of schedulers, which modules take alike


class LayoutReader:
    """Works out a call's rows, layout, kind and key."""

    def __init__(self, digests: Fingerprints) -> None:
        self._digests = digests

    def read(self, call: Call) -> Call:
        """The call with its group, and all that merging needs to know. One that fits no rule gets
        a group of its own."""
        try:
            call = _sized(call)
            return self._read(call)
        except Exception as error:
            if not isinstance(error, Unmergeable):
                logger.exception("a call of %s cannot be read; it runs alone", call.target.name)
            return call.by_itself(reason=str(error) or type(error).__name__)

    def _read(self, call: Call) -> Call:
        target = call.target
        if target.module.training or call.ambient.grad:
            raise Unmergeable(
                "gradients, or layers that draw random numbers, may depend on the batch"
            )
        if call.sample is None:
            raise Unmergeable("no argument has rows")
        walk = _Walk(call, self._digests)
        masks = {mask: name for name, mask in target.masks.items() if walk.maskable(name, mask)}
        layouts = []
        for name, value in call.arguments.items():
            path = (name,)
            if name in masks.values():
                node = walk.padded(value, path)
            elif name in masks:
                node = walk.mask(value, path)
            elif isinstance(value, list) and len(value) == call.rows:
                node = walk.row_list(value, path)
            elif type(value) in (int, float) and name in TIMES:
                node = walk.number(value, path)
            else:
                node = walk.node(value, path)
            layouts.append((name, node))
        layout = tuple(layouts)
        look = look_of(call.processors)
        # processors may cut a batch in parts; with a chunk for each row, parts of all calls lie
        # together, however many they are
        chunks = 1 if look is None else call.rows
        kind = (target, layout, tuple(walk.sizes), call.ambient, chunks, look)
        constants = tuple(walk.exact)
        listed = isinstance(call.sample, list)
        return call.but(
            group=Group((kind, constants), kind, constants, layout, listed, look, chunks),
            leaves=walk.leaves,
            paths=walk.paths,
            guesses=walk.guesses,
            ragged=tuple(walk.ragged),
            extents=walk.extents,
            opaque=walk.opaque,
            holds=walk.holds,
        )


class _Walk:
    """One pass over a call's arguments."""

    def __init__(self, call: Call, digests: Fingerprints) -> None:
        self._call = call
        self._rows = call.rows
        self._sample = sample = call.sample
        self._device = (sample[0] if isinstance(sample, list) else sample).device
        self._digests = digests
        self._readings = call.target.readings
        self._depth = 0
        self.leaves: list[tuple[Any, ...]] = []
        self.paths: list[tuple[Path, Leaf]] = []
        self.extents: list[tuple[int, int]] = []
        self.guesses: list[Guess] = []
        self.opaque = False
        self.holds = False
        self.sizes: list[Hashable] = []  # of the sample: part of the kind
        self.exact: list[Hashable] = []  # must be equal, yet a certificate covers every value of it
        self.ragged: list[Hashable] = []

    def maskable(self, name: str, mask: str) -> bool:
        value, given = self._call.arguments.get(name), self._call.arguments.get(mask)
        if not isinstance(value, torch.Tensor) or value.ndim < 3 or value.shape[0] != self._rows:
            return False
        return given is None or (isinstance(given, torch.Tensor) and given.shape == value.shape[:2])

    def padded(self, value: torch.Tensor, path: Path) -> Layout:
        self.ragged.append(value.shape[1])
        self.extents.append((value.shape[1], value.shape[1]))
        self.exact.append(value.shape[2:])
        return self._leaf(path, (leaves.PADDED, value.ndim, value.dtype, value.device), value)

    def number(self, value: float, path: Path) -> Layout:
        dtype = torch.float32 if type(value) is float else torch.int64
        return self._leaf(path, (leaves.NUMBER, dtype, self._device), value)

    def mask(self, value: torch.Tensor | None, path: Path) -> Layout:
        if value is None:
            return (leaves.MASK,)
        return self._leaf(path, (leaves.MASK, value.dtype), value)

    def row_list(self, values: list[Any], path: Path) -> Layout:
        """A list with as many entries as there are rows: most likely one for each row."""
        if all(isinstance(value, torch.Tensor) for value in values):
            return self._tensors(values, path)
        if all(isinstance(value, torch.Generator) for value in values):
            self.opaque = True
            return (leaves.LISTED, torch.Generator)
        first = frozen(values[0])
        if (
            first is None
            and not isinstance(values[0], COLLECTIONS)
            and all(one is values[0] for one in values)
        ):
            self._identity(values[0])
            return (leaves.REPEATED, type(values[0]))
        if first is not None and all(frozen(value) == first for value in values):
            return (leaves.REPEATED, first)
        return self.node(values, path)

    def _tensors(self, values: list[torch.Tensor], path: Path) -> Layout:
        batches = all(value.ndim and value.shape[0] == self._rows for value in values)
        if batches and not isinstance(self._sample, list):
            if self._readings.of(path) != PER_ROW:
                self.guesses.append((path, ITEMS))
                return self.node(values, path)
            self.guesses.append((path, PER_ROW))
        elif values is not self._sample:
            # of calls whose entries happen to have as many rows, too
            self._readings.suppose([path], PER_ROW)
        shapes = tuple(value.shape for value in values)
        if values is self._sample:
            if len(set(shapes)) > 1:
                raise Unmergeable("samples of one call differ in size")
            self.sizes.append(shapes[0])
        else:
            self.ragged.append(shapes)
            counts = [value.numel() for value in values]
            self.extents.append((min(counts), max(counts)))
        first = values[0]
        return self._leaf(path, (leaves.LISTED, first.ndim, first.dtype, first.device), *values)

    def node(self, value: Any, path: Path) -> Layout:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if type(value) is float or isinstance(value, np.generic):
            self.exact.append((type(value), value))
            return (leaves.CONSTANT,)
        if isinstance(value, _CONSTANTS):
            return (leaves.CONSTANT, type(value), value)
        if isinstance(value, COLLECTIONS):
            return self._nested(value, path)
        if isinstance(value, torch.Generator):
            self.opaque = True
            return (leaves.CONSTANT, torch.Generator)
        if isinstance(value, np.ndarray):
            self.exact.append((value.shape, value.dtype.str, value.tobytes()))
            return (leaves.CONSTANT,)
        if is_holder(value) and self._depth < DEEPEST:
            self.holds = True
            self._depth += 1
            node = self._nested(value, path)
            self._depth -= 1
            return node
        self._identity(value)
        return (leaves.CONSTANT, type(value))

    def _nested(self, value: Any, path: Path) -> Layout:
        """A collection, or an object that is what it holds, such as a cache of keys and values."""
        names, inside = tuple(keys(value)), contents(value)
        nodes = [self.node(item, (*path, name)) for name, item in zip(names, inside, strict=True)]
        return (leaves.NESTED, type(value), names, *nodes)

    def _identity(self, value: Any) -> None:
        self.opaque = True
        self.exact.append(id(value))  # the call keeps it alive while the key is in use

    def _leaf(self, path: Path, node: Layout, *values: Any) -> Layout:
        self.leaves.append(values)
        self.paths.append((path, node[0]))
        return node

    def _tensor(self, value: torch.Tensor, path: Path) -> Layout:
        if value.requires_grad:
            raise Unmergeable("gradients are wanted")
        dtype: Any = "time" if value.dtype in _TIME_TYPES and path[0] in TIMES else value.dtype
        if value.ndim == 0:
            # one on the CPU goes with tensors of any device, as one with a row for each call would
            # not
            device = self._device if value.device.type == "cpu" else value.device
            return self._leaf(path, (leaves.SCALAR, dtype, device), value)
        reading = self._readings.of(path)
        if value.shape[0] in (1, self._rows):
            shared = reading == "shared" and value is not self._sample
            if not shared or not self._readings.remains(
                path, self._context(value), self._digests.of(value)
            ):
                (self.sizes if value is self._sample else self.exact).append(value.shape[1:])
                return self._leaf(path, (leaves.ROWS, value.ndim, dtype, value.device), value)
            self.guesses.append((path, "shared"))
        elif others := self._others(value):
            if reading is None:
                reading = self._readings.vary(
                    path, self._context(value), self._digests.of(value), others
                )
            if reading in others:
                return self._entries(value, path, reading)
        self.exact.append(self._digests.of(value))
        return (leaves.SHARED, value.shape, value.dtype, value.device)

    def _context(self, value: torch.Tensor) -> Hashable:
        """In what an argument's values may be held against each other."""
        return (self._rows, value.shape, value.dtype, tuple(self.sizes))

    def _others(self, value: torch.Tensor) -> list[str]:
        """What a tensor with as many entries may be, if it is no constant."""
        across = value.ndim > 2 and value.shape[1] == self._rows
        several = value.shape[0] > self._rows and value.shape[0] % self._rows == 0
        return ["across"] * across + ["several"] * several

    def _entries(self, value: torch.Tensor, path: Path, reading: str) -> Layout:
        self.guesses.append((path, reading))
        rest = (value.ndim, value.dtype, value.device)
        if reading == "across":
            self.exact.append((value.shape[0], *value.shape[2:]))
            return self._leaf(path, (leaves.ACROSS, *rest), value)
        self.exact.append(value.shape[1:])
        return self._leaf(path, (leaves.SEVERAL, value.shape[0] // self._rows, *rest), value)


def frozen(value: Any) -> Hashable | None:
    """A hashable twin of a value made of constants only, types told apart; None for any other."""
    if isinstance(value, (*_CONSTANTS, float, np.generic)):
        return (type(value), value)
    if isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        return None
    items = [frozen(item) for item in value]
    return None if any(item is None for item in items) else (type(value), *items)


def look_of(processors: tuple[Any, ...] | None) -> Hashable:
    """Equal for attention processors that do the same."""
    if processors is None:
        return None
    return tuple(
        (type(one), state) if (state := _state(one)) is not None else one for one in processors
    )


def _state(processor: Any) -> Hashable | None:
    """What a processor is beside its class; None if it is only like itself, as functions are."""
    return frozen(vars(processor)) if is_plain(type(processor)) else None  # type: ignore[arg-type]


def _sized(call: Call) -> Call:
    """The call with its arguments by name, its sample and its rows, as far as it has them."""
    arguments = call.target.bind(call.args, call.kwargs)
    sample = _sample(arguments)
    if sample is None:
        return call.but(arguments=arguments)
    rows = len(sample) if isinstance(sample, list) else sample.shape[0]
    every = sample if isinstance(sample, list) else [sample]
    size = sum(tensor.numel() for tensor in every) // max(1, rows)
    return call.but(arguments=arguments, sample=sample, rows=rows, size=size)


def _sample(arguments: dict[str, Any]) -> Any:
    """The first argument that has rows: a tensor, or a list of tensors, one for each row; None if
    none has."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim:
            return value
        if isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):
            return value
    return None
