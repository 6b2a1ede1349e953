"""What modules keep between forwards beside their weights, read as a snapshot: to tell what
changed, and to put it back.

A snapshot covers attributes of every submodule and of its class, buffers, torch's hooks, and
whatever can be reached from these or from a patched `forward`: closures, default arguments,
attributes of functions, the globals that a function names, lists, dictionaries, plain objects.
Values are compared as values: a table that is made again with the same content has not changed.
State outside of Python objects (in an extension, on a disk) is not covered; only results can show
it.
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

Place = tuple[int, Any]  # the id of what holds a value, and the key

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOT_STATE = TORCH_OWN | {"_hf_hook", "_diffusers_hook", "config", "_compiled_call_impl"}


@dataclass(eq=False, slots=True)
class _Root:
    """A place in a module or its class that holds a value: a key of a dictionary, or an attribute
    of a class."""

    path: str
    holder: Any
    key: Any
    mark: Hashable  # equal for equal values
    value: Any
    # puts back what the value contains
    undo: list[Callable[[], None]] = field(default_factory=list)
    owner: int = 0  # the id of the attributes of the module, or of the class, that it is in
    # a sample of the numbers, and the address, of a weight that is not kept
    seen: tuple[Hashable, int] | None = None

    def is_lost(self, later: _Root | None) -> bool:
        """Whether it is a weight that has other numbers `later`, in the same memory."""
        if (
            later is None
            or later.value is not self.value
            or self.seen is None
            or later.seen is None
        ):
            return False
        (numbers, address), (new_numbers, new_address) = self.seen, later.seen
        return numbers != new_numbers and address == new_address

    def put_back(self) -> None:
        _assign(self.holder, self.key, self.value)
        for one in self.undo:
            one()

    def remove(self) -> None:
        if isinstance(self.holder, type):
            delattr(self.holder, self.key)
        elif not isinstance(self.holder, nn.Module):
            self.holder.pop(self.key, None)


class _Flat(NamedTuple):
    """Places of one dictionary whose values need no reading: numbers, strings, weights,
    submodules."""

    path: str
    holder: dict[str, Any]
    marks: dict[str, Any]
    values: dict[str, Any]
    owner: int

    def root(self, key: str) -> _Root:
        value = self.values[key]
        # a weight stands here only while it has no attributes of its own
        undo: list[Callable[[], None]] = []
        if isinstance(value, nn.Parameter):
            undo = [
                value.__dict__.clear,
                functools.partial(setattr, value, "requires_grad", self.marks[key][2]),
            ]
        return _Root(
            f"{self.path}.{key}", self.holder, key, self.marks[key], value, undo, self.owner
        )


class Change:
    """What differs between two snapshots of the same modules. `common`: the owners that both have
    read. From others, such as submodules that were replaced, nothing is taken away."""

    def __init__(self, before: list[_Root], after: list[_Root], common: Set[int]) -> None:
        self._before = before
        self._after = after
        self._common = common

    def __bool__(self) -> bool:
        return bool(self._before or self._after)

    @functools.cached_property
    def paths(self) -> list[str]:
        """What changed, each with the names of what it is in, as far as they are known."""
        later = {(id(one.holder), one.key): one for one in self._after}
        found = {one.path: "" for one in self._after}
        for one in self._before:
            other = later.get((id(one.holder), one.key))
            found[one.path] = "" if other is None else _where(one.mark, other.mark)
        return sorted(path + inside for path, inside in found.items())

    @functools.cached_property
    def lost(self) -> list[str]:
        """Weights that were written to in place and cannot be put back, since they were not
        copied."""
        later = {(id(one.holder), one.key): one for one in self._after}
        return [
            one.path for one in self._before if one.is_lost(later.get((id(one.holder), one.key)))
        ]

    @property
    def places(self) -> frozenset[Place]:
        return frozenset((id(one.holder), one.key) for one in (*self._before, *self._after))

    def undo(self) -> None:
        _exchange(self._after, self._before, self._common)

    def redo(self) -> None:
        _exchange(self._before, self._after, self._common)


class ModuleState:
    """A snapshot of what modules keep. With `keep` it can be put back: what may be written to in
    place is copied.

    With `weights` these are read, too; the larger ones are neither compared whole nor put back.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], *, keep: bool = False, weights: bool = False
    ) -> None:
        self._roots: dict[Place, _Root] = {}
        self._flat: dict[int, _Flat] = {}  # by the ids of their dictionaries
        self._owners = {0}  # ids of the attributes of modules, and 0 for what is in none
        self._owner = 0  # that is being read
        self._reader = Reader(keep)
        self.weights = weights
        classes: dict[type, None] = {}  # each once, however many modules are of it
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
        """What is not in `later` as it is here."""
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
                keys = [
                    key
                    for key in old_marks | new_marks
                    if old_marks.get(key, self) != new_marks.get(key, self)
                ]
                keys = [key for key in keys if not (flat and new and _made_again(flat, new, key))]
                before += [flat.root(key) for key in keys if flat and key in old_marks]
                after += [new.root(key) for key in keys if new and key in new_marks]
        return Change(before, after, self._owners & later._owners)

    def marks(self, places: Iterable[Place]) -> dict[Place, Hashable]:
        """Values of some places, to be compared."""
        found: dict[Place, Hashable] = {}
        for place in places:
            root, flat = self._roots.get(place), self._flat.get(place[0])
            if root is not None:
                found[place] = root.mark
            elif flat is not None and place[1] in flat.marks:
                found[place] = flat.marks[place[1]]
        return found

    def adopt(self, other: ModuleState, places: Iterable[Place]) -> None:
        """Be as another snapshot in some places."""
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
            function = attributes["forward"]  # what hooks have put there is told by its identity
            self._put(f"{name}.forward", attributes, "forward", ("forward", id(function)), function)
        self._put(f"{name}.__class__", part, "__class__", id(type(part)), type(part))
        self._read_weights(part, name)
        for key, value in part._buffers.items():
            self._add(f"{name}.{key}", part._buffers, key, value)
        if part._modules:
            children = dict(part._modules)
            self._flat[id(part._modules)] = _Flat(
                name, part._modules, children, children, self._owner
            )
        for hooks in _HOOKS:
            for key, value in attributes[hooks].items():
                self._add(f"{name}.{hooks}[{key}]", attributes[hooks], key, value)

    def _put(self, path: str, holder: Any, key: str, mark: Hashable, value: Any) -> None:
        self._roots[id(holder), key] = _Root(path, holder, key, mark, value, [], self._owner)

    def _read_weights(self, part: nn.Module, name: str) -> None:
        flat: dict[str, Any] = {}
        for key, value in part._parameters.items():
            if value is not None and (self.weights or value.__dict__):
                self._roots[id(part._parameters), key] = self._weight(
                    f"{name}.{key}", part._parameters, key, value
                )
            else:
                flat[key] = (
                    None if value is None else (id(value), version(value), value.requires_grad)
                )
        if flat:
            values = {key: part._parameters[key] for key in flat}
            self._flat[id(part._parameters)] = _Flat(
                name, part._parameters, flat, values, self._owner
            )

    def _weight(self, path: str, holder: Any, key: str, value: nn.Parameter) -> _Root:
        undo: list[Callable[[], None]] = [
            functools.partial(setattr, value, "requires_grad", value.requires_grad)
        ]
        numbers, small = content(value) if self.weights else None, value.numel() <= WHOLE
        mark: Hashable = (
            id(value),
            numbers if self.weights else version(value),
            value.requires_grad,
        )
        if self.weights and self._reader.keep:
            kept = value.detach().clone() if small else value.detach()
            undo.append(functools.partial(write if small else rebind, value, kept))
        if value.__dict__:
            mark = (mark, self._reader.mark(value.__dict__, undo))
        else:
            undo.append(value.__dict__.clear)
        seen = None if small or not self.weights else (_without_version(numbers), _address(value))
        return _Root(path, holder, key, mark, value, undo, self._owner, seen)

    def _read_class(self, cls: type) -> None:
        self._owner = id(cls)
        self._owners.add(self._owner)
        for key, value in vars(cls).items():
            if key.startswith("__"):
                continue
            function = (
                value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            )
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
        except Exception as error:  # an object that cannot be read is what it is
            logger.debug("%s cannot be read: %r", path, error)
            mark, saved = (type(value), id(value)), value
        self._roots[id(holder), key] = _Root(path, holder, key, mark, saved, undo, self._owner)


def _without_version(numbers: Any) -> Hashable:
    """What `content` gives of a large tensor, but for how often that was written to."""
    return (*numbers[:2], numbers[-1])


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return 0


def _made_again(before: _Flat, after: _Flat, key: str) -> bool:
    """Whether a weight was replaced by another object for the same numbers: `self.mean =
    nn.Parameter(self.mean.to(device))`."""
    old, new = before.values.get(key), after.values.get(key)
    if old is new or not isinstance(old, nn.Parameter) or not isinstance(new, nn.Parameter):
        return False
    if (id(old), version(old), new.requires_grad) != before.marks[key] or (
        old.shape,
        old.dtype,
        old.device,
    ) != (
        new.shape,
        new.dtype,
        new.device,
    ):
        return False  # nothing can be told of what was written to since
    if _address(old) and _address(old) == _address(new) and old.stride() == new.stride():
        return version(new) == version(old)
    return old.numel() <= WHOLE and content(old) == content(new)


def _where(before: Hashable, after: Hashable) -> str:
    """The names on the way to where two marks first differ."""
    if isinstance(before, tuple) and isinstance(after, tuple):
        for one, other in zip(before, after, strict=False):
            if one != other:
                if (
                    isinstance(one, tuple)
                    and isinstance(other, tuple)
                    and len(one) == len(other) == 2
                ):
                    if isinstance(one[0], str) and one[0] == other[0]:
                        return f".{one[0]}{_where(one[1], other[1])}"
                return _where(one, other)
        longer = max(before, after, key=len)
        extra = longer[min(len(before), len(after)) :]
        if extra and isinstance(extra[0], tuple) and extra[0] and isinstance(extra[0][0], str):
            return f".{extra[0][0]}"
    return ""


def _exchange(here: list[_Root], there: list[_Root], common: Set[int]) -> None:
    """Put the values `there` in the place of those `here`."""
    wanted = {(id(one.holder), one.key) for one in there}
    for one in here:
        if (id(one.holder), one.key) not in wanted and one.owner in common:
            one.remove()
    for one in there:
        one.put_back()


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
    return itertools.takewhile(
        lambda base: base is not nn.Module and base is not object, cls.__mro__
    )


def _patched(part: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the functions stand that a patched module runs in place of its class's: below the hooks
    of diffusers."""
    registry = part.__dict__.get("_diffusers_hook")
    if registry is not None:
        for reference in registry._fn_refs:
            original = getattr(reference, "original_forward", None)
            own = isinstance(getattr(original, "__self__", None), nn.Module)
            if original is not None and not own and not _compiled(original):
                yield vars(reference), "original_forward"
    elif (
        "_hf_hook" not in part.__dict__
        and "forward" in part.__dict__
        and not _compiled(part.__dict__["forward"])
    ):
        yield part.__dict__, "forward"


def _compiled(function: Any) -> bool:
    """Whether a function or a module is what torch.compile made, which keeps what it has
    compiled."""
    if type(function).__module__.startswith("torch._dynamo"):
        return True
    if isinstance(function, nn.Module):  # which takes long to say what it does not have
        return False
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("torch._dynamo")
