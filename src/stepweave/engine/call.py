"""Calls: what a fiber wants computed, described so that like can be told from unlike."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from stepweave.engine.ambient import Ambient
from stepweave.engine.digests import Digests

logger = logging.getLogger(__name__)

# A layout says for each argument how calls are merged; nested tuples, the tag first, so that it is hashable.
Layout = tuple[Any, ...]

_CONSTANTS = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout, Enum, type)
# diffusers' names of a padding mask for an argument, besides the argument's own name and "_mask"
_MASK_NAMES = {"encoder_hidden_states": ("encoder_attention_mask", "encoder_mask")}


class Unmergeable(Exception):
    """Calls, or their results, cannot be put together or taken apart; the message says why."""


@dataclass(frozen=True, eq=False)
class Target:
    """Something heavy that fibers call: a module's forward, or a method of an autoencoder."""

    name: str  # as in "transformer", "vae.decode"
    module: nn.Module
    function: Callable[..., Any]
    cap: int | None = None  # rows at a time, where it has a bound of its own
    cached: bool = False  # results are remembered: an encoder of prompts or pictures
    names: tuple[str, ...] = field(init=False)
    masks: dict[str, str] = field(init=False)  # argument -> the argument that masks its second dimension

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters.values()
        names = tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)
        masks = {}
        for name in names:
            for mask in (f"{name}_mask", *_MASK_NAMES.get(name, ())):
                if mask in names:
                    masks[name] = mask
                    break
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "masks", masks)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the signature's order for those given by position."""
        if len(args) > len(self.names):
            raise Unmergeable(f"{self.name} was given {len(args)} positional arguments")
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


@dataclass(eq=False, repr=False)
class Call:
    """One suspended call. `describe` sets the rest."""

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ambient: Ambient
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    layout: Layout = ()
    leaves: list[tuple[Any, ...]] = field(
        default_factory=list
    )  # tensors and numbers of the rows, in the layout's order
    kind: Hashable = None  # what a certificate is for
    key: Hashable = None  # what calls of one group have in common
    listed: bool = False  # the sample is a list with an entry for each row
    opaque: bool = False  # an argument is told from others by its identity only
    ragged: Hashable = None  # sizes in which calls of one group may differ, where a certificate allows it
    extents: list[tuple[int, int]] = field(default_factory=list)  # of those sizes: least and most of each argument
    owner: Any = None  # set by the loop, as is age: who waits for it
    age: float = 0.0  # when its job was accepted, in seconds of the monotonic clock
    cache_key: Hashable | None = None  # of its result, where results are remembered
    keep: bool = False  # run alone, the fiber leaves a copy of the result in `output`, and says how it went
    output: Any = None
    failed: bool = False
    wrote: bool = False  # to its own arguments

    def run(self) -> Any:
        """Exactly what the pipeline asked for."""
        return self.target.function(*self.args, **self.kwargs)


class Describer:
    """Works out a call's rows, layout, kind and key."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests

    def describe(self, call: Call) -> None:
        """Fill in what the loop and the merge need to know. A call that fits no rule gets a key of its own, and why is lost."""
        try:
            self._describe(call)
        except Exception as error:
            if not isinstance(error, Unmergeable):
                logger.exception("a call of %s cannot be described; it runs alone", call.target.name)
            call.kind = call.key = object()
            call.layout, call.leaves = (), []

    def _describe(self, call: Call) -> None:
        target = call.target
        call.arguments = target.bind(call.args, call.kwargs)
        if target.module.training or call.ambient.grad:
            raise Unmergeable("gradients, or layers that draw random numbers, may depend on the batch")
        sample = _sample(call.arguments)
        call.listed = isinstance(sample, list)
        call.rows = len(sample) if call.listed else sample.shape[0]
        walk = _Walk(call, sample, self._digests)
        masks = {mask: name for name, mask in target.masks.items() if walk.maskable(name, mask)}
        layouts = []
        for name, value in call.arguments.items():
            if name in masks.values():
                node = walk.padded(value)
            elif name in masks:
                node = walk.mask(value)
            elif isinstance(value, list) and len(value) == call.rows:
                node = walk.row_list(value)
            elif type(value) in (int, float) and name in ("timestep", "timesteps"):
                node = walk.number(value)
            else:
                node = walk.node(value)
            layouts.append((name, node))
        call.layout = tuple(layouts)
        call.leaves, call.extents, call.opaque = walk.leaves, walk.extents, walk.opaque
        call.kind = (target, call.layout, tuple(walk.sizes), call.ambient)
        call.key = (call.kind, tuple(walk.exact))
        call.ragged = tuple(walk.ragged)


class _Walk:
    """One pass over a call's arguments."""

    def __init__(self, call: Call, sample: Any, digests: Digests) -> None:
        self._call = call
        self._rows = call.rows
        self._sample = sample
        self._digests = digests
        self.leaves: list[tuple[Any, ...]] = []
        self.extents: list[tuple[int, int]] = []
        self.opaque = False
        self.sizes: list[Hashable] = []  # of the sample: part of the kind
        self.exact: list[Hashable] = []  # must be equal, yet a certificate covers every value of it
        self.ragged: list[Hashable] = []

    def maskable(self, name: str, mask: str) -> bool:
        value, given = self._call.arguments.get(name), self._call.arguments.get(mask)
        if not isinstance(value, torch.Tensor) or value.ndim < 3 or value.shape[0] != self._rows:
            return False
        return given is None or (isinstance(given, torch.Tensor) and given.shape == value.shape[:2])

    def padded(self, value: torch.Tensor) -> Layout:
        self.leaves.append((value,))
        self.ragged.append(value.shape[1])
        self.extents.append((value.shape[1], value.shape[1]))
        self.exact.append(value.shape[2:])
        return ("padded", value.ndim, value.dtype, value.device)

    def number(self, value: float) -> Layout:
        self.leaves.append((value,))
        return ("number", type(value) is float)

    def mask(self, value: torch.Tensor | None) -> Layout:
        if value is None:
            return ("mask",)
        self.leaves.append((value,))
        return ("mask", value.dtype)

    def row_list(self, values: list[Any]) -> Layout:
        """A list with as many entries as there are rows: most likely one for each row."""
        if all(isinstance(value, torch.Tensor) for value in values):
            return self._tensors(values)
        if all(isinstance(value, torch.Generator) for value in values):
            self.opaque = True
            return ("generator",)
        first = _frozen(values[0])
        if first is None and not isinstance(values[0], (list, tuple, dict)) and all(one is values[0] for one in values):
            self._identity(values[0])
            return ("repeated", type(values[0]))
        if first is not None and all(_frozen(value) == first for value in values):
            return ("repeated", first)
        return self.node(values)

    def _tensors(self, values: list[torch.Tensor]) -> Layout:
        batches = all(value.ndim and value.shape[0] == self._rows for value in values)
        if batches and not isinstance(self._sample, list):
            return self.node(values)
        self.leaves.append(tuple(values))
        shapes = tuple(value.shape for value in values)
        if values is self._sample:
            if len(set(shapes)) > 1:
                raise Unmergeable("samples of one call differ in size")
            self.sizes.append(shapes[0])
        else:
            self.ragged.append(shapes)
            counts = [value.numel() for value in values]
            self.extents.append((min(counts), max(counts)))
        return ("per row", values[0].ndim, values[0].dtype, values[0].device)

    def node(self, value: Any) -> Layout:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if type(value) is float or isinstance(value, np.generic):
            self.exact.append((type(value), value))
            return ("constant",)
        if isinstance(value, _CONSTANTS):
            return ("constant", type(value), value)
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, type(value), *(self.node(item) for item in value))
        if isinstance(value, dict):
            return ("dict", *((key, self.node(item)) for key, item in value.items()))
        if isinstance(value, torch.Generator):
            self.opaque = True
            return ("generator",)
        if isinstance(value, np.ndarray):
            self.exact.append((value.shape, value.dtype.str, value.tobytes()))
            return ("constant",)
        self._identity(value)
        return ("constant", type(value))

    def _identity(self, value: Any) -> None:
        self.opaque = True
        self.exact.append(id(value))  # the call keeps it alive while the key is in use

    def _tensor(self, value: torch.Tensor) -> Layout:
        if value.requires_grad:
            raise Unmergeable("gradients are wanted")
        if value.ndim == 0:
            self.leaves.append((value,))
            return ("scalar", value.dtype, value.device)
        if value.shape[0] in (1, self._rows):
            self.leaves.append((value,))
            (self.sizes if value is self._sample else self.exact).append(value.shape[1:])
            return ("rows", value.ndim, value.dtype, value.device)
        self.exact.append(self._digests.of(value))
        return ("shared", value.shape, value.dtype, value.device)


def _frozen(value: Any) -> Hashable | None:
    """A hashable twin of a value made of constants only, types told apart; None for any other."""
    if isinstance(value, (*_CONSTANTS, float, np.generic)):
        return (type(value), value)
    if isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        return None
    items = [_frozen(item) for item in value]
    return None if any(item is None for item in items) else (type(value), *items)


def _sample(arguments: dict[str, Any]) -> Any:
    """The first argument that has rows: a tensor, or a list of tensors, one for each row."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim:
            return value
        if isinstance(value, list) and value and all(isinstance(item, torch.Tensor) for item in value):
            return value
    raise Unmergeable("no argument has rows")
