"""Adapters of layers, such as LoRA, that each row of a call has for itself.

A layer's own weights stay as they are: a hook adds each adapter's part to the output, in the rows
that it is for. Which these are, is an argument of the call like any other, `ADAPTERS`, so calls of
different adapters share forwards, and are told apart wherever arguments are. While a layer runs, a
context variable holds it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import nn

from stepweave.errors import EngineMisuseError, LoraError, shown
from stepweave.parameters import MOST_LORAS

# The argument of a call: a tensor of shape (rows, MOST_LORAS, 2), of each row's adapters in
# their order: the number of one, 0 for none, and its scale.
ADAPTERS = "stepweave_adapters"

Scale = float | torch.Tensor


class AdapterLayer(Protocol):
    """What an adapter adds to one layer."""

    by_row: bool  # whether a scale may be a tensor that multiplies the layer's output

    def apply(self, x: torch.Tensor, result: torch.Tensor, scale: Scale) -> torch.Tensor:
        """The layer's `result` for an input, adapted."""


class Adapter(Protocol):
    """An adapter in memory."""

    @property
    def number(self) -> int:
        """That of its content: never another's."""

    @property
    def layers(self) -> Mapping[nn.Module, AdapterLayer]:
        """What it adds, by the layers that this is for."""

    @property
    def modules(self) -> Collection[nn.Module]:
        """The modules that have these layers."""


class Chosen:
    """The adapters of one job, with their scales, in the order in which they are applied."""

    def __init__(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        # one that is not proportional to its scale, such as DoRA, has an effect at 0, too
        self._adapters = [
            (adapter, scale)
            for adapter, scale in adapters
            if scale or not all(part.by_row for part in adapter.layers.values())
        ]
        self._arguments: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()

    def attach(self) -> None:
        """Have the layers know these adapters; between two forwards."""
        with _attaching:
            for adapter, _ in self._adapters:
                _known[adapter.number] = adapter
                for module in adapter.modules:
                    _adapted.add(module)
                for layer, part in adapter.layers.items():
                    _hook_of(layer).parts[adapter.number] = part

    def argument(self, module: nn.Module) -> torch.Tensor:
        """The value of ADAPTERS for a call of one row, of the adapters of this module alone."""
        argument = self._arguments.get(module)
        if argument is None:
            own = [
                (float(adapter.number), scale)
                for adapter, scale in self._adapters
                if module in adapter.modules
            ]
            own += [(0.0, 0.0)] * (MOST_LORAS - len(own))
            argument = self._arguments[module] = torch.tensor([own], dtype=torch.float64)
        return argument

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, all rows have these adapters, unless a call says otherwise."""
        if not self._adapters:
            yield
            return
        groups = [_Group(adapter.number, scale) for adapter, scale in self._adapters]
        with _running(_Rows(1, groups)):
            yield


NONE = Chosen([])


class AdapterSource(Protocol):
    """Where jobs' adapters come from, by name."""

    def choose_later(
        self, lora: Sequence[tuple[str, float]], given_up: Callable[[], bool]
    ) -> Future[Chosen]:
        """These adapters with their scales, once they are in memory, unless that is `given_up`.
        Raises at once what is known without reading them."""


def pairs_of(lora: Any) -> list[tuple[str, float]]:
    """Names and scales of adapters. Raises LoraError for anything else."""
    try:
        pairs = [(name, float(scale)) for name, scale in lora]
        right = isinstance(lora, Iterable) and all(isinstance(name, str) for name, _ in pairs)
    except (TypeError, ValueError):
        right = False
    if not right or isinstance(lora, (str, Mapping)):
        raise LoraError(
            f'lora is {shown(repr(lora))}; it must be a list such as [("rings", 0.8)].',
            code="invalid_value", param="lora",
        )  # fmt: skip
    return pairs


def choose_later(
    source: AdapterSource | None,
    lora: Sequence[tuple[str, float]],
    kwargs: Mapping[str, Any],
    given_up: Callable[[], bool],
) -> Future[Chosen] | None:
    """The adapters that a job names; None if it names none. As in diffusers, a `scale` among the
    pipeline's arguments for attention multiplies theirs. Raises EngineMisuseError if there is no
    source, and what the source does."""
    if not lora:
        return None
    if source is None:
        raise EngineMisuseError("The engine has no adapters: make it with loras=stepweave.Loras().")
    factor = 1.0
    for name in ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"):
        given = kwargs.get(name)
        scale = given.get("scale") if isinstance(given, Mapping) else None
        factor *= scale if isinstance(scale, (int, float)) else 1.0
    pairs = [(name, scale * factor) for name, scale in pairs_of(lora)]
    return source.choose_later(pairs, given_up)


def with_adapters(module: nn.Module, kwargs: dict[str, Any], owner: Any) -> dict[str, Any]:
    """The arguments of an owner's call with its adapters, if any have layers of this module."""
    if module not in _adapted:
        return kwargs
    chosen: Chosen = getattr(owner, "adapters", NONE)
    return {**kwargs, ADAPTERS: chosen.argument(module)}


def most_adapters(kwargs: Mapping[str, Any]) -> int:
    """The most adapters that a row of a call with these arguments has."""
    table = kwargs.get(ADAPTERS)
    return 0 if table is None else int((table[..., 0] != 0).sum(-1).max())


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A module's function that also takes ADAPTERS."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        table = kwargs.pop(ADAPTERS, None)
        if table is None:
            return function(*args, **kwargs)
        with _running(_rows_of(table, any(itertools.starmap(_uneven, kwargs.items())))):
            return function(*args, **kwargs)

    return call


def _uneven(name: str, value: Any) -> bool:
    """Whether an argument's rows may differ in size: a module may put their tokens in one line."""
    if isinstance(value, list):
        return len({getattr(row, "shape", None) for row in value}) > 1
    return "mask" in name and isinstance(value, torch.Tensor)


def detach(modules: Collection[nn.Module]) -> None:
    """Remove all hooks of adapters from modules."""
    for module in modules:
        _adapted.discard(module)
        for layer in module.modules():
            for key, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, LayerHook):
                    del layer._forward_hooks[key]


class LayerHook:
    """Adds adapters' parts to the output of one layer. They are held by their adapters alone."""

    def __init__(self) -> None:
        self.parts: WeakValueDictionary[int, AdapterLayer] = WeakValueDictionary()

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows = _rows.get()
        if rows is None:
            return None
        adapted = output
        for group in rows.groups:
            part = self.parts.get(group.number)
            if part is not None:
                adapted = group.apply(part, args[0], adapted, rows)
        return adapted if adapted is output else adapted.to(output.dtype)


def _hook_of(layer: nn.Module) -> LayerHook:
    """The layer's hook; a new one if it has none."""
    for hook in layer._forward_hooks.values():
        if isinstance(hook, LayerHook):
            return hook
    new = LayerHook()
    layer.register_forward_hook(new)
    return new


class _Group:
    """An adapter, the rows of a forward that it is for (all if None), and the scale of each."""

    def __init__(
        self, number: int, scale: float | list[float], rows: list[int] | None = None
    ) -> None:
        self.number = number
        self._scale = scale
        self._rows = rows

    def apply(
        self, part: AdapterLayer, x: torch.Tensor, result: torch.Tensor, rows: _Rows
    ) -> torch.Tensor:
        """The result with the adapter's part in its rows. Raises ValueError if the layer's input
        has not as many entries for each row."""
        if self._rows is None:
            return part.apply(x, result, self._scale)  # type: ignore[arg-type]
        count = rows.total
        in_one_line = x.ndim == 2 and len(x) != count
        if len(result) != len(x) or len(x) % count or (rows.uneven and in_one_line):
            raise ValueError(
                f"adapters cannot be told by rows: a layer gets {len(x)} entries, its call has "
                f"{count} rows"
            )
        for span in self._all_rows if part.by_row else self._rows_by_scale:
            index = span.index(len(x) // count, x.device)
            scale = span.factor(len(x) // count, x)
            result[index] = part.apply(x[index], result[index], scale).to(result.dtype)
        return result

    @functools.cached_property
    def _all_rows(self) -> list[_Span]:
        return [_Span(self._rows or [], self._scale)]

    @functools.cached_property
    def _rows_by_scale(self) -> list[_Span]:
        if not isinstance(self._scale, list):
            return self._all_rows
        found: dict[float, list[int]] = {}
        for row, scale in zip(self._rows or [], self._scale, strict=True):
            found.setdefault(scale, []).append(row)
        return [_Span(rows, scale) for scale, rows in found.items()]


class _Span:
    """Rows that are adapted at once. What layers' inputs of one shape take is made once."""

    def __init__(self, rows: list[int], scale: float | list[float]) -> None:
        self._rows = rows
        self._scale = scale
        self._indices: dict[Any, Any] = {}
        self._factors: dict[Any, torch.Tensor] = {}

    def index(self, each: int, device: torch.device) -> Any:
        """Where the rows' entries are, `each` so many."""
        first, past = self._rows[0], self._rows[-1] + 1
        if past - first == len(self._rows):
            return slice(first * each, past * each)
        key = (each, device)
        if key not in self._indices:
            entries = [row * each + i for row in self._rows for i in range(each)]
            self._indices[key] = torch.tensor(entries, device=device)
        return self._indices[key]

    def factor(self, each: int, x: torch.Tensor) -> Scale:
        """The rows' scales, for entries like those of `x`."""
        if not isinstance(self._scale, list):
            return self._scale
        key = (each, x.device, x.dtype, x.ndim)
        if key not in self._factors:
            values = torch.tensor(self._scale, dtype=x.dtype).repeat_interleave(each)
            self._factors[key] = values.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        return self._factors[key]


class _Rows(NamedTuple):
    """What the rows of a forward are adapted by, in order. `uneven`: they may differ in size."""

    total: int
    groups: list[_Group]
    uneven: bool = False


def _rows_of(table: torch.Tensor, uneven: bool) -> _Rows:
    """The value of ADAPTERS, read. Raises ValueError for one that none of the engine's calls has,
    as a proof may try."""
    count = len(table)
    groups: list[_Group] = []
    for column in table.transpose(0, 1).tolist():
        found: dict[float, tuple[list[int], list[float]]] = {}
        for row, (number, scale) in enumerate(column):
            if number or scale:
                rows, scales = found.setdefault(number, ([], []))
                rows.append(row)
                scales.append(scale)
        for number, (rows, scales) in found.items():
            if number not in _known:
                raise ValueError(f"no adapter has the number {number}")
            one = len(set(scales)) == 1
            everywhere = one and len(rows) == count
            groups.append(
                _Group(int(number), scales[0] if one else scales, None if everywhere else rows)
            )
    return _Rows(count, groups, uneven)


@contextlib.contextmanager
def _running(rows: _Rows) -> Iterator[None]:
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


_rows: ContextVar[_Rows | None] = ContextVar("stepweave_adapters", default=None)
_known: WeakValueDictionary[float, Adapter] = WeakValueDictionary()
_adapted: WeakSet[nn.Module] = WeakSet()  # modules of which layers have hooks
_attaching = threading.Lock()
