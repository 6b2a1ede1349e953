"""Snapshots of the state in modules besides their weights, to find and undo changes.

A snapshot covers attributes of every submodule and of its class, buffers, torch's hooks, and
everything reachable from these or from a patched `forward`: closures, default arguments, attributes
of functions, globals that a function names, lists, dictionaries, plain objects. Values are compared
by content: a table that is computed again has not changed. State outside of Python objects (in an
extension, on a disk) is not covered; only results can show it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from stepweave.compat.row_adapters import LayerHook
from stepweave.compat.values import (
    ATOMS,
    LIBRARIES,
    OPAQUE,
    TORCH_OWN,
    WHOLE,
    Reader,
    content,
    of_a_library,
    rebind,
    version,
    write,
)

logger = logging.getLogger(__name__)

Place = tuple[int, Any]  # the id of a value's holder, and the key there

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOT_STATE = TORCH_OWN | {"_hf_hook", "_diffusers_hook", "config", "_compiled_call_impl"}


@dataclass(eq=False, slots=True)
class _Root:
    """A value in a module or its class: a key of a dictionary, or an attribute of a class."""

    path: str
    holder: Any
    key: Any
    mark: Hashable  # equal for equal values
    value: Any
    # restore the content of the value
    undo: list[Callable[[], None]] = field(default_factory=list)
    owner: int = 0  # the id of the module's attributes, or of the class, that it is in
    # for a weight that is not copied: a sample of its numbers, and its address
    sample: tuple[Hashable, int] | None = None

    @property
    def place(self) -> Place:
        return id(self.holder), self.key

    def is_lost(self, later: _Root | None) -> bool:
        """Whether it is a weight that has other numbers `later`, in the same memory."""
        if later is None or later.value is not self.value:
            return False
        if self.sample is None or later.sample is None:
            return False
        (numbers, address), (new_numbers, new_address) = self.sample, later.sample
        return numbers != new_numbers and address == new_address

    def put_back(self) -> None:
        _assign(self.holder, self.key, self.value)
        for function in self.undo:
            function()

    def remove(self) -> None:
        if isinstance(self.holder, type):
            delattr(self.holder, self.key)
        elif not isinstance(self.holder, nn.Module):
            self.holder.pop(self.key, None)


class _Flat(NamedTuple):
    """Values of one dictionary that need no reading: numbers, strings, weights, submodules."""

    path: str
    holder: dict[str, Any]
    marks: dict[str, Any]
    values: dict[str, Any]
    owner: int

    def root(self, key: str) -> _Root:
        value = self.values[key]
        mark = self.marks[key]
        undo: list[Callable[[], None]] = []
        if isinstance(value, nn.Parameter):  # it is here only if it has no attributes of its own
            requires_grad = functools.partial(setattr, value, "requires_grad", mark[2])
            undo = [value.__dict__.clear, requires_grad]
        return _Root(f"{self.path}.{key}", self.holder, key, mark, value, undo, self.owner)


class Change:
    """The differences between two snapshots of the same modules. `common`: the owners in both
    snapshots. From others, such as submodules that were replaced, nothing is removed."""

    def __init__(self, before: list[_Root], after: list[_Root], common: Set[int]) -> None:
        self._before = before
        self._after = after
        self._common = common

    def __bool__(self) -> bool:
        return bool(self._before or self._after)

    @functools.cached_property
    def paths(self) -> list[str]:
        """The paths of values that changed, as far inside them as is known."""
        later = {root.place: root for root in self._after}
        inside = {root.path: "" for root in self._after}
        for root in self._before:
            other = later.get(root.place)
            inside[root.path] = "" if other is None else _where(root.mark, other.mark)
        return sorted(path + rest for path, rest in inside.items())

    @functools.cached_property
    def lost(self) -> list[str]:
        """Weights that were overwritten and cannot be restored, since they were not copied."""
        later = {root.place: root for root in self._after}
        return [root.path for root in self._before if root.is_lost(later.get(root.place))]

    @property
    def places(self) -> frozenset[Place]:
        return frozenset(root.place for root in (*self._before, *self._after))

    def undo(self) -> None:
        _exchange(self._after, self._before, self._common)

    def redo(self) -> None:
        _exchange(self._before, self._after, self._common)


class ModuleState:
    """A snapshot of modules. With `keep` it can be restored: values that may be written to in place
    are copied. With `weights` these are read, too; those of more than WHOLE numbers are only
    sampled, and cannot be restored."""

    def __init__(
        self, modules: Mapping[str, nn.Module], *, keep: bool = False, weights: bool = False
    ) -> None:
        self._roots: dict[Place, _Root] = {}
        self._flat: dict[int, _Flat] = {}  # by `id` of their dictionaries
        self._owners = {0}  # ids of the attributes of modules, and 0 for global hooks
        self._owner = 0  # the current one
        self._reader = Reader(keep)
        self.weights = weights
        classes: dict[type, None] = {}  # each once
        for prefix, module in modules.items():
            parts = list(module.named_modules(memo=self._reader.modules, prefix=prefix))
            for name, part in parts:
                self._owner = id(part.__dict__)
                self._owners.add(self._owner)
                self._read(part, name)
                if type(part) not in classes:
                    classes |= dict.fromkeys(_classes(type(part)))
        self._owner = 0
        for cls in classes:
            self._read_class(cls)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
            hooks = getattr(torch_module, name, {})
            for key, value in hooks.items():
                self._add(f"torch.{name}[{key}]", hooks, key, value)

    def change(self, later: ModuleState) -> Change:
        """The differences between this snapshot and a `later` one."""
        before, after = [], []
        ours, theirs = self._roots, later._roots
        for place, root in ours.items():
            other = theirs.get(place)
            if other is None or other.mark != root.mark:
                before.append(root)
                after += [] if other is None else [other]
        after += [root for place, root in theirs.items() if place not in ours]
        for number in self._flat.keys() | later._flat.keys():
            flat, new = self._flat.get(number), later._flat.get(number)
            old_marks, new_marks = flat.marks if flat else {}, new.marks if new else {}
            if old_marks != new_marks:
                both = old_marks | new_marks
                keys = [key for key in both if old_marks.get(key, self) != new_marks.get(key, self)]
                keys = [key for key in keys if not (flat and new and _recreated(flat, new, key))]
                before += [flat.root(key) for key in keys if flat and key in old_marks]
                after += [new.root(key) for key in keys if new and key in new_marks]
        return Change(before, after, self._owners & later._owners)

    def marks(self, places: Iterable[Place]) -> dict[Place, Hashable]:
        """The marks of the values in some places, for comparison."""
        marks: dict[Place, Hashable] = {}
        for place in places:
            root, flat = self._roots.get(place), self._flat.get(place[0])
            if root is not None:
                marks[place] = root.mark
            elif flat is not None and place[1] in flat.marks:
                marks[place] = flat.marks[place[1]]
        return marks

    def adopt(self, other: ModuleState, places: Iterable[Place]) -> None:
        """Take the values of some places from another snapshot."""
        for place in places:
            number, key = place
            self._roots.pop(place, None)
            if place in other._roots:
                self._roots[place] = other._roots[place]
            ours, theirs = self._flat.get(number), other._flat.get(number)
            if ours is not None:
                ours.marks.pop(key, None)
                if ours.values is not ours.marks:
                    ours.values.pop(key, None)
                if theirs is not None and key in theirs.marks:
                    ours.marks[key], ours.values[key] = theirs.marks[key], theirs.values[key]

    def _read(self, part: nn.Module, name: str) -> None:
        attributes = part.__dict__
        plain: dict[str, Any] = {}
        for key, value in () if _compiled(part) else attributes.items():
            if key not in _NOT_STATE and key != "forward":
                if type(value) in ATOMS:
                    plain[key] = value
                else:
                    self._add(f"{name}.{key}", attributes, key, value)
        self._flat[id(attributes)] = _Flat(name, attributes, plain, plain, self._owner)
        patched = list(_patched(part))
        for holder, key in patched:
            self._add(f"{name}.forward", holder, key, holder[key])
        if "forward" in attributes and all(holder is not attributes for holder, _ in patched):
            function = attributes["forward"]  # set by hooks, so compared by identity
            self._put(f"{name}.forward", attributes, "forward", ("forward", id(function)), function)
        self._put(f"{name}.__class__", part, "__class__", id(type(part)), type(part))
        self._read_weights(part, name)
        for key, value in part._buffers.items():
            self._add(f"{name}.{key}", part._buffers, key, value)
        if part._modules:
            children = dict(part._modules)
            flat = _Flat(name, part._modules, children, children, self._owner)
            self._flat[id(part._modules)] = flat
        for hooks in _HOOKS:
            for key, value in attributes[hooks].items():
                if not isinstance(value, LayerHook):  # of adapters, which calls have as arguments
                    self._add(f"{name}.{hooks}[{key}]", attributes[hooks], key, value)

    def _put(self, path: str, holder: Any, key: str, mark: Hashable, value: Any) -> None:
        self._roots[id(holder), key] = _Root(path, holder, key, mark, value, [], self._owner)

    def _read_weights(self, part: nn.Module, name: str) -> None:
        marks: dict[str, Any] = {}
        weights = part._parameters
        for key, value in weights.items():
            if value is None:
                marks[key] = None
            elif self.weights or value.__dict__:
                root = self._weight(f"{name}.{key}", weights, key, value)
                self._roots[id(weights), key] = root
            else:
                marks[key] = (id(value), version(value), value.requires_grad)
        if marks:
            values = {key: weights[key] for key in marks}
            self._flat[id(weights)] = _Flat(name, weights, marks, values, self._owner)

    def _weight(self, path: str, holder: Any, key: str, value: nn.Parameter) -> _Root:
        undo: list[Callable[[], None]] = [
            functools.partial(setattr, value, "requires_grad", value.requires_grad)
        ]
        numbers: Any = content(value) if self.weights else None
        small = value.numel() <= WHOLE
        written = numbers if self.weights else version(value)
        mark: Hashable = (id(value), written, value.requires_grad)
        if self.weights and self._reader.keep:
            kept = value.detach().clone() if small else value.detach()
            undo.append(functools.partial(write if small else rebind, value, kept))
        if value.__dict__:
            mark = (mark, self._reader.mark(value.__dict__, undo))
        else:
            undo.append(value.__dict__.clear)
        sample = None
        if self.weights and not small:
            sample = ((*numbers[:2], numbers[-1]), _address(value))  # without the version
        return _Root(path, holder, key, mark, value, undo, self._owner, sample)

    def _read_class(self, cls: type) -> None:
        self._owner = id(cls)
        self._owners.add(self._owner)
        for key, value in list(vars(cls).items()):
            if key.startswith("__"):
                continue
            function = getattr(value, "__func__", value)
            function = value.fget if isinstance(value, property) else function
            if isinstance(function, types.FunctionType):
                if of_a_library(function):
                    continue
            elif not cls.__module__.startswith(LIBRARIES):
                if hasattr(value, "__get__") or isinstance(value, OPAQUE):
                    continue
            elif type(value) not in ATOMS and not isinstance(
                value, (list, dict, set, tuple, torch.Tensor)
            ):
                continue
            self._add(f"{cls.__qualname__}.{key}", cls, key, value)
        self._owner = 0

    def _add(self, path: str, holder: Any, key: Any, value: Any) -> None:
        undo: list[Callable[[], None]] = []
        try:
            mark = self._reader.mark(value, undo)
            saved = self._reader.saved(value)
        except Exception as error:  # an object that cannot be read is compared by identity
            logger.debug("%s cannot be read: %r", path, error)
            mark, saved = (type(value), id(value)), value
        self._roots[id(holder), key] = _Root(path, holder, key, mark, saved, undo, self._owner)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # it has no storage
        return 0


def _recreated(before: _Flat, after: _Flat, key: str) -> bool:
    """Whether a weight was replaced by another object with equal numbers, as in `self.mean =
    nn.Parameter(self.mean.to(device))`."""
    old, new = before.values.get(key), after.values.get(key)
    if old is new or not isinstance(old, nn.Parameter) or not isinstance(new, nn.Parameter):
        return False
    if (id(old), version(old), new.requires_grad) != before.marks[key]:
        return False  # the old one was written to since, so its numbers are unknown
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return False
    if _address(old) and _address(old) == _address(new) and old.stride() == new.stride():
        return version(new) == version(old)
    return old.numel() <= WHOLE and content(old) == content(new)


def _where(before: Hashable, after: Hashable) -> str:
    """The path to the first difference of two marks."""
    if isinstance(before, tuple) and isinstance(after, tuple):
        for old, new in zip(before, after, strict=False):
            if old != new:
                pairs = isinstance(old, tuple) and isinstance(new, tuple)
                if pairs and len(old) == len(new) == 2:
                    if isinstance(old[0], str) and old[0] == new[0]:
                        return f".{old[0]}{_where(old[1], new[1])}"
                return _where(old, new)
        longer = max(before, after, key=len)
        extra = longer[min(len(before), len(after)) :]
        if extra and isinstance(extra[0], tuple) and extra[0] and isinstance(extra[0][0], str):
            return f".{extra[0][0]}"
    return ""


def _exchange(old: list[_Root], new: list[_Root], common: Set[int]) -> None:
    """Replace the `old` values by the `new` ones."""
    wanted = {root.place for root in new}
    for root in old:
        if root.place not in wanted and root.owner in common:
            root.remove()
    for root in new:
        root.put_back()


def _assign(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, type):
        if vars(holder).get(key) is not value:
            setattr(holder, key, value)
    elif isinstance(holder, nn.Module):
        if type(holder) is not value:
            holder.__class__ = value
    elif holder.get(key, holder) is not value:
        holder[key] = value


def _classes(cls: type) -> Iterator[type]:
    """A module's class and its bases, up to torch's own."""
    return itertools.takewhile(lambda base: base not in (nn.Module, object), cls.__mro__)


def _patched(part: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """The holders and keys of functions that replace a patched module's `forward`, below hooks of
    diffusers."""
    attributes = part.__dict__
    registry = attributes.get("_diffusers_hook")
    if registry is not None:
        for reference in registry._fn_refs:
            original = getattr(reference, "original_forward", None)
            own = isinstance(getattr(original, "__self__", None), nn.Module)
            if original is not None and not own and not _compiled(original):
                yield vars(reference), "original_forward"
    elif "_hf_hook" not in attributes and "forward" in attributes:
        if not _compiled(attributes["forward"]):
            yield attributes, "forward"


def _compiled(function: Any) -> bool:
    """Whether torch.compile made a function or a module, which stores compiled code."""
    if type(function).__module__.startswith("torch._dynamo"):
        return True
    if isinstance(function, nn.Module):  # its `getattr` is slow for missing attributes
        return False
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("torch._dynamo")
