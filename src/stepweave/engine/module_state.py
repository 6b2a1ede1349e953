"""What modules keep between forwards beside their weights, read as a snapshot: to tell what changed, and to put it back.

A snapshot covers attributes of every submodule and of its class, buffers, torch's hooks, and whatever can be reached from these
or from a patched `forward`: closures, default arguments, attributes of functions, the globals that a function names, lists,
dictionaries, plain objects. Values are compared as values: a table that is made again with the same content has not changed.
State outside of Python objects (in an extension, on a disk) is not covered; only results can show it.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import hashlib
import random
import types
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Thread, local
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEEPEST = 8  # objects within each other
WHOLE = 65_536  # elements of a tensor that is compared whole, and can be put back
SAMPLE = 256  # elements that are compared of a larger one
MOST = 4096  # entries of a list or a dictionary
OBJECTS = 20_000  # that are read of one attribute

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
_OPAQUE = (
    type, types.ModuleType, types.BuiltinFunctionType, PretrainedConfig, PreTrainedTokenizerBase, DiffusionPipeline, Thread,
)  # fmt: skip
# classes of these hold what goes on elsewhere: threads, files, engines; only what a thread has of its own is a module's
_ELSEWHERE = frozenset(
    ("stepweave", "threading", "_thread", "concurrent", "asyncio", "logging", "io", "_io", "socket", "queue", "_queue",
     "selectors", "subprocess", "multiprocessing")
)  # fmt: skip
_TORCH_OWN = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOT_STATE = _TORCH_OWN | {"_hf_hook", "_diffusers_hook", "_internal_dict", "config"}
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "stepweave")


@dataclass(eq=False)
class _Root:
    """A place in a module or its class that holds a value: a key of a dictionary, or an attribute of a class."""

    path: str
    holder: Any
    key: Any
    mark: Hashable  # equal for equal values
    value: Any
    undo: list[Callable[[], None]] = field(default_factory=list)  # puts back what the value contains

    def put_back(self) -> None:
        _assign(self.holder, self.key, self.value)
        for one in self.undo:
            one()

    def remove(self) -> None:
        if isinstance(self.holder, type):
            delattr(self.holder, self.key)
        else:
            self.holder.pop(self.key, None)


class Change:
    """What differs between two snapshots of the same modules."""

    def __init__(self, before: list[_Root], after: list[_Root]) -> None:
        self._before = before
        self._after = after

    def __bool__(self) -> bool:
        return bool(self._before or self._after)

    @property
    def paths(self) -> list[str]:
        """What changed, each with the names of what it is in, as far as they are known."""
        later = {(id(one.holder), one.key): one for one in self._after}
        found = {one.path: "" for one in self._after}
        for one in self._before:
            other = later.get((id(one.holder), one.key))
            found[one.path] = "" if other is None else _where(one.mark, other.mark)
        return sorted(path + inside for path, inside in found.items())

    @property
    def places(self) -> frozenset[Hashable]:
        return frozenset((id(one.holder), one.key) for one in (*self._before, *self._after))

    def undo(self) -> None:
        _exchange(self._after, self._before)

    def redo(self) -> None:
        _exchange(self._before, self._after)


class ModuleState:
    """A snapshot of what modules keep. With `keep` it can be put back: what may be written to in place is copied.

    With `weights` these are read, too; the larger ones are neither compared whole nor put back.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, keep: bool = False, weights: bool = False) -> None:
        self._roots: dict[Hashable, _Root] = {}
        self._reader = _Reader(keep)
        self._weights = weights
        classes: set[type] = set()
        for prefix, module in modules.items():
            parts = list(module.named_modules(memo=self._reader.modules, prefix=prefix))
            for name, part in parts:
                self._read(part, name)
                classes.add(type(part))
        for cls in classes:
            self._read_class(cls)

    def change(self, later: ModuleState, *, within: frozenset[Hashable] | None = None) -> Change:
        """What is not in `later` as it is here, of all places or of some."""
        before, after = [], []
        ours, theirs = self._roots, later._roots
        for key, root in ours.items():
            other = theirs.get(key)
            if (other is None or other.mark != root.mark) and (within is None or key in within):
                before.append(root)
                after += [] if other is None else [other]
        if len(theirs) > len(ours) or before:
            after += [root for key, root in theirs.items() if key not in ours and (within is None or key in within)]
        return Change(before, after)

    def marks(self, places: frozenset[Hashable]) -> dict[Hashable, Hashable]:
        """Values of some places, to be compared."""
        return {place: root.mark for place, root in self._roots.items() if place in places}

    def adopt(self, other: ModuleState, places: frozenset[Hashable]) -> None:
        """Be as another snapshot in some places."""
        for place in places:
            self._roots.pop(place, None)
            if place in other._roots:
                self._roots[place] = other._roots[place]

    def _read(self, part: nn.Module, name: str) -> None:
        attributes = part.__dict__
        for key, value in () if _compiled(part) else attributes.items():
            if key not in _NOT_STATE and key != "forward":
                self._add(f"{name}.{key}", attributes, key, value)
        for holder, key in _patched(part):
            self._add(f"{name}.forward", holder, key, holder[key])
        for key, value in part._parameters.items():
            self._roots[id(part._parameters), key] = self._weight(f"{name}.{key}", part._parameters, key, value)
        for key, value in part._buffers.items():
            self._add(f"{name}.{key}", part._buffers, key, value)
        for key, value in part._modules.items():
            place = (id(part._modules), key)
            self._roots[place] = _Root(f"{name}.{key}", part._modules, key, id(value), value)
        for hooks in _HOOKS:
            for key, value in attributes[hooks].items():
                self._add(f"{name}.{hooks}[{key}]", attributes[hooks], key, value)

    def _weight(self, path: str, holder: Any, key: str, value: nn.Parameter | None) -> _Root:
        undo: list[Callable[[], None]] = []
        mark: Hashable = None
        if value is not None:
            mark = (id(value), _version(value))
            if self._weights:
                mark = (id(value), _content(value))
                if self._reader.keep and value.numel() <= WHOLE:
                    undo.append(functools.partial(_write, value, value.detach().clone()))
            if value.__dict__:
                mark = (mark, self._reader.mark(value.__dict__, undo))
        return _Root(path, holder, key, mark, value, undo)

    def _read_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if base is nn.Module or base is object:
                break
            for key, value in vars(base).items():
                if key.startswith("__") or isinstance(value, (property, classmethod, staticmethod)):
                    continue
                if isinstance(value, types.FunctionType):
                    if _of_a_library(value):
                        continue
                elif type(value) not in _ATOMS and not isinstance(value, (list, dict, set, tuple, torch.Tensor)):
                    continue
                self._add(f"{base.__qualname__}.{key}", base, key, value)

    def _add(self, path: str, holder: Any, key: Any, value: Any) -> None:
        if type(value) in _ATOMS:
            root = _Root(path, holder, key, _atom(value), value)
        else:
            undo: list[Callable[[], None]] = []
            mark = self._reader.mark(value, undo)
            root = _Root(path, holder, key, mark, self._reader.saved(value), undo)
        self._roots[id(holder), key] = root


class _Reader:
    """Reads values, those that contain others by what they contain."""

    def __init__(self, keep: bool) -> None:
        self.modules: set[nn.Module] = set()  # that are read as such
        self.keep = keep
        self._undo: list[Callable[[], None]] = []
        self._left = OBJECTS
        self._path: dict[int, int] = {}  # objects that are being read, by their depth

    def mark(self, value: Any, undo: list[Callable[[], None]]) -> Hashable:
        """What is equal for equal values; `undo` is given what puts back what they contain."""
        self._undo = undo
        self._path.clear()
        self._left = OBJECTS
        return self._mark(value, 0)

    def saved(self, value: Any) -> Any:
        """What to put back in a value's place: an iterator that has gone on cannot be reset, but its copy has not."""
        if self.keep and type(value).__module__ == "itertools":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return copy.copy(value)
        return value

    def _mark(self, value: Any, depth: int) -> Hashable:
        kind = type(value)
        if kind in _ATOMS:
            return _atom(value)
        if id(value) in self._path:
            return ("above", depth - self._path[id(value)])
        self._left -= 1
        if depth > DEEPEST or self._left < 0:
            return (kind,)
        self._path[id(value)] = depth
        try:
            return self._container(value, kind, depth + 1)
        finally:
            del self._path[id(value)]

    def _container(self, value: Any, kind: type, depth: int) -> Hashable:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, (list, deque, tuple, set, frozenset)):
            if self.keep and not isinstance(value, (tuple, frozenset)):
                self._restore(_refill, value, list(value))
            if len(value) > MOST:
                return (kind, len(value))
            return (kind, *(self._mark(item, depth) for item in value))
        if isinstance(value, dict):
            if self.keep:
                self._restore(_refill, value, dict(value))
            if len(value) > MOST:
                return (kind, len(value))
            return (kind, *((_key(key), self._mark(item, depth)) for key, item in value.items()))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return (kind, self._mark(value.__func__, depth), self._mark(value.__self__, depth))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return (kind, *(self._mark(part, depth) for part in parts))
        if isinstance(value, nn.Module) and value in self.modules:
            return id(value)
        if isinstance(value, _OPAQUE) or (kind.__module__.partition(".")[0] in _ELSEWHERE and kind is not local):
            return id(value)
        return self._object(value, kind, depth)

    def _tensor(self, value: torch.Tensor) -> Hashable:
        if isinstance(value, nn.Parameter):
            return (id(value), _version(value))
        if self.keep and value.numel() <= WHOLE and value.device.type != "meta":
            clone = value.detach().clone()
            self._restore(_write, value, clone)
        inside = value.__dict__
        return (_content(value), self._mark(dict(inside), DEEPEST - 1)) if inside else _content(value)

    def _function(self, value: types.FunctionType, depth: int) -> Hashable:
        library = _of_a_library(value)
        cells = []
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                content = None
            if self.keep:
                self._restore(setattr, cell, "cell_contents", self.saved(content))
            cells.append((name, self._mark(content, depth)))
        names = []
        for name in () if library else _names(value.__code__):
            if name in value.__globals__:
                content = value.__globals__[name]
                if isinstance(content, types.FunctionType) and _of_a_library(content):
                    continue
                if self.keep and not isinstance(content, (types.FunctionType, *_OPAQUE)):
                    self._restore(value.__globals__.__setitem__, name, self.saved(content))
                names.append((name, self._mark(content, depth)))
        inside = (value.__defaults__, value.__kwdefaults__, value.__dict__)
        if self.keep:
            self._restore(setattr, value, "__defaults__", value.__defaults__)
            self._restore(_refill, value.__dict__, dict(value.__dict__))
        return (id(value.__code__), *cells, *names, *(self._mark(one, depth) for one in inside if one))

    def _object(self, value: Any, kind: type, depth: int) -> Hashable:
        if isinstance(value, np.ndarray):
            if value.size > WHOLE or value.dtype.hasobject:
                return (kind, value.shape, value.dtype.str)
            if self.keep:
                self._restore(np.copyto, value, value.copy())
            return (kind, value.shape, value.dtype.str, value.tobytes())
        if isinstance(value, torch.Generator):
            if self.keep:
                self._restore(value.set_state, value.get_state())
            return (kind, value.get_state().numpy().tobytes())
        if isinstance(value, random.Random):
            if self.keep:
                self._restore(value.setstate, value.getstate())
            return (kind, value.getstate())
        if isinstance(value, contextvars.ContextVar):
            return (kind, self._mark(value.get(None), depth))
        if isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            return (kind, None if frame is None else (frame.f_lasti, self._mark(dict(frame.f_locals), depth)))
        if kind.__module__ == "itertools":
            return (kind, repr(value))
        attributes = dict(_attributes(value, kind))
        if self.keep and hasattr(value, "__dict__"):
            self._restore(_refill, value.__dict__, dict(value.__dict__))
        if isinstance(value, nn.Module):  # that is no part of the others
            attributes = {key: item for key, item in attributes.items() if key not in _TORCH_OWN}
            attributes |= {f"_buffers.{key}": item for key, item in value._buffers.items()}
            attributes |= {f"_modules.{key}": item for key, item in value._modules.items()}
        return (kind, *((key, self._mark(item, depth)) for key, item in attributes.items()))

    def _restore(self, function: Callable[..., Any], *args: Any) -> None:
        self._undo.append(functools.partial(function, *args))


def _where(before: Hashable, after: Hashable) -> str:
    """The names on the way to where two marks first differ."""
    if isinstance(before, tuple) and isinstance(after, tuple):
        for one, other in zip(before, after, strict=False):
            if one != other:
                if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 2:
                    if isinstance(one[0], str) and one[0] == other[0]:
                        return f".{one[0]}{_where(one[1], other[1])}"
                return _where(one, other)
        longer = max(before, after, key=len)
        extra = longer[min(len(before), len(after)) :]
        if extra and isinstance(extra[0], tuple) and extra[0] and isinstance(extra[0][0], str):
            return f".{extra[0][0]}"
    return ""


def _exchange(here: list[_Root], there: list[_Root]) -> None:
    """Put the values `there` in the place of those `here`."""
    wanted = {(id(one.holder), one.key) for one in there}
    for one in here:
        if (id(one.holder), one.key) not in wanted:
            one.remove()
    for one in there:
        one.put_back()


def _assign(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, type):
        if vars(holder).get(key) is not value:
            setattr(holder, key, value)
    elif holder.get(key, holder) is not value:
        holder[key] = value


def _patched(part: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the functions stand that a patched module runs in place of its class's: below the hooks of diffusers."""
    registry = getattr(part, "_diffusers_hook", None)
    if registry is not None:
        for reference in registry._fn_refs:
            original = getattr(reference, "original_forward", None)
            own = isinstance(getattr(original, "__self__", None), nn.Module)
            if original is not None and not own and not _compiled(original):
                yield vars(reference), "original_forward"
    elif "_hf_hook" not in part.__dict__ and "forward" in part.__dict__ and not _compiled(part.__dict__["forward"]):
        yield part.__dict__, "forward"


def _compiled(function: Any) -> bool:
    """Whether a function is what torch.compile made, which keeps what it has compiled."""
    names = (str(getattr(function, "__globals__", {}).get("__name__")), type(function).__module__)
    return any(name.startswith("torch._dynamo") for name in names)


def _attributes(value: Any, kind: type) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _of_a_library(function: types.FunctionType) -> bool:
    """Whether a function comes with torch or a package of its kind: what it keeps is not read, nor the names that it knows."""
    name = function.__globals__.get("__name__") or ""
    return name.partition(".")[0] in _LIBRARIES


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function and the functions in it may look up among the globals."""
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _atom(value: Any) -> Hashable:
    return (type(value), value if value == value else repr(value))  # NaN is equal to itself here


def _key(key: Any) -> Hashable:
    return key if isinstance(key, (str, int)) else repr(key)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _content(tensor: torch.Tensor) -> Hashable:
    """A tensor's type, shape and numbers, of a large one a sample of these and how often it was written to."""
    form: tuple[Hashable, ...] = (tensor.dtype, tuple(tensor.shape))
    try:
        numbers = tensor.detach()
        if numbers.numel() > WHOLE:
            numbers = numbers.reshape(-1)[:: numbers.numel() // SAMPLE]
            form = (*form, _version(tensor))
        data = numbers.cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError):  # on no device, sparse, quantised
        return (*form, id(tensor), _version(tensor))
    return (*form, hashlib.blake2b(data.data, digest_size=16).digest())


def _refill(container: Any, items: Any) -> None:
    container.clear()
    container.extend(items) if isinstance(container, (list, deque)) else container.update(items)


def _write(tensor: torch.Tensor, numbers: torch.Tensor) -> None:
    with torch.no_grad():
        if tensor.shape == numbers.shape and not torch.equal(tensor, numbers):
            tensor.data.copy_(numbers)
