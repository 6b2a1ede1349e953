"""Marks of values, equal for equal values with all their contents; restores contents."""

from __future__ import annotations

import contextvars
import copy
import functools
import hashlib
import operator
import random
import sys
import types
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from threading import Thread, local
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEEPEST = 8  # levels of nested objects
WHOLE = 65_536  # elements of a tensor that is compared as a whole, and can be restored
SAMPLE = 256  # elements of a larger one that are compared
MOST = 4096  # entries of a list or a dictionary
LONGEST = 4096  # characters of the `repr` of an object that is compared by it
OBJECTS = 20_000  # objects in one attribute that are read

ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
)
_OF_PIPELINES = (PretrainedConfig, PreTrainedTokenizerBase, DiffusionPipeline)
OPAQUE = (types.ModuleType, types.BuiltinFunctionType, Thread, *_OF_PIPELINES)
# modules of Python whose objects (threads, files, engines) are not read, except `threading.local`
_THREADS = ("threading", "_thread", "concurrent", "asyncio", "queue", "_queue", "multiprocessing")
_FILES = ("logging", "io", "_io", "socket", "selectors", "subprocess")
_ELSEWHERE = frozenset(("stepweave", *_THREADS, *_FILES))
TORCH_OWN = frozenset(vars(nn.Module())) - {"training"}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "stepweave")


class Reader:
    """Makes marks of values and of all that they contain."""

    def __init__(self, keep: bool) -> None:
        self.modules: set[nn.Module] = set()  # those that are read separately
        self.keep = keep
        self._undo: list[Callable[[], None]] = []
        self._left = OBJECTS
        self._path: dict[int, int] = {}  # depths of the objects that are being read
        self._classes: dict[type, Hashable] = {}  # marks within one attribute

    def mark(self, value: Any, undo: list[Callable[[], None]]) -> Hashable:
        """A key that is equal for equal values. Functions that restore a value's contents are
        appended to `undo`."""
        if type(value) is tuple and len(value) <= MOST and ATOMS.issuperset(map(type, value)):
            return (tuple, *map(atom, value))  # the same as below, but fast: most values are such
        self._undo = undo
        self._path.clear()
        self._classes.clear()
        self._left = OBJECTS
        return self._mark(value, 0)

    def saved(self, value: Any) -> Any:
        """The value to restore: a copy, if the value cannot be reset, such as an iterator."""
        mutable = type(value).__module__ == "itertools" or isinstance(value, (bytearray, array))
        if self.keep and mutable:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return copy.copy(value)
        return value

    def _mark(self, value: Any, depth: int) -> Hashable:
        kind = type(value)
        if kind in ATOMS:
            return atom(value)
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
            marks = [self._mark(item, depth) for item in value]
            unordered = isinstance(value, (set, frozenset))
            return (kind, frozenset(marks)) if unordered else (kind, *marks)
        if isinstance(value, dict):
            if self.keep:
                self._restore(_refill, value, dict(value))
            if len(value) > MOST:
                return (kind, len(value))
            return (kind, *((_key(key), self._mark(item, depth)) for key, item in value.items()))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, (property, classmethod, staticmethod)):
            function = value.fget if isinstance(value, property) else value.__func__
            return (kind, self._mark(function, depth))
        if isinstance(value, type):
            return self._class(value, depth)
        if isinstance(value, types.MethodType):
            return (kind, self._mark(value.__func__, depth), self._mark(value.__self__, depth))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return (kind, *(self._mark(part, depth) for part in parts))
        if isinstance(value, nn.Module) and value in self.modules:
            return id(value)
        if kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
            return id(value)
        elsewhere = kind.__module__.partition(".")[0] in _ELSEWHERE and kind is not local
        if isinstance(value, OPAQUE) or elsewhere:
            return id(value)
        return self._object(value, kind, depth)

    def _tensor(self, value: torch.Tensor) -> Hashable:
        if isinstance(value, nn.Parameter):
            return (id(value), version(value))
        if self.keep and value.numel() <= WHOLE and value.device.type != "meta":
            self._restore(write, value, value.detach().clone())
        inside = value.__dict__
        return (content(value), self._mark(dict(inside), DEEPEST - 1)) if inside else content(value)

    def _function(self, value: types.FunctionType, depth: int) -> Hashable:
        library = of_a_library(value)
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
                if isinstance(content, types.FunctionType) and of_a_library(content):
                    continue
                if self.keep and not isinstance(content, (types.FunctionType, *OPAQUE)):
                    self._restore(value.__globals__.__setitem__, name, self.saved(content))
                names.append((name, self._mark(content, depth)))
        inside = (value.__defaults__, value.__kwdefaults__, value.__dict__)
        if self.keep:
            self._restore(setattr, value, "__defaults__", value.__defaults__)
            self._restore(_refill, value.__dict__, dict(value.__dict__))
        marks = [self._mark(item, depth) for item in inside if item]
        return (id(value.__code__), *cells, *names, *marks)

    def _object(self, value: Any, kind: type, depth: int) -> Hashable:
        if isinstance(value, np.ndarray):
            if value.size > WHOLE or value.dtype.hasobject:
                return (kind, value.shape, value.dtype.str)
            if self.keep:
                self._restore(_copy, value, value.copy())
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
            if (frame := value.gi_frame) is None:
                return (kind, None)
            return (kind, (frame.f_lasti, self._mark(dict(frame.f_locals), depth)))
        if isinstance(value, np.generic):
            return (kind, value.tobytes())
        attributes = dict(_attributes(value, kind))
        has_repr = kind.__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
        if not attributes and kind.__module__ in sys.stdlib_module_names and has_repr:
            return (kind, repr(value)[:LONGEST])  # counters of itertools, bytearrays, decimals
        if self.keep:
            held = getattr(value, "__dict__", None)
            if held is not None:
                self._restore(_refill, held, dict(held))
            for name in attributes.keys() - (held or {}).keys():  # of slots
                self._restore(_set_slot, value, name, self.saved(attributes[name]))
        if isinstance(value, nn.Module):  # not one of `modules`
            attributes = {key: item for key, item in attributes.items() if key not in TORCH_OWN}
            attributes |= {f"_buffers.{key}": item for key, item in value._buffers.items()}
            attributes |= {f"_modules.{key}": item for key, item in value._modules.items()}
        own_class = self._class(kind, depth)
        return (own_class, *((key, self._mark(item, depth)) for key, item in attributes.items()))

    def _class(self, cls: type, depth: int) -> Hashable:
        """The mark of a class: the attributes of it and its bases, except those of libraries."""
        if cls in self._classes:
            return self._classes[cls]
        self._classes[cls] = id(cls)  # for a class that refers to itself
        marks: list[Hashable] = []
        for base in cls.__mro__:
            if comes_with_a_library(base):
                continue
            for key, value in list(vars(base).items()):
                if key.startswith("__") or hasattr(value, "__get__") or isinstance(value, OPAQUE):
                    continue
                if self.keep:
                    self._restore(_set_attribute, base, key, self.saved(value))
                marks.append((key, self._mark(value, depth)))
        self._classes[cls] = (id(cls), *marks)
        return self._classes[cls]

    def _restore(self, function: Callable[..., Any], *args: Any) -> None:
        self._undo.append(functools.partial(function, *args))


def _attributes(value: Any, kind: type) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"  # as Python does within the class
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def comes_with_a_library(cls: type) -> bool:
    """Whether a class belongs to Python or LIBRARIES, so that its attributes are not read."""
    name = cls.__module__.partition(".")[0]
    return name in LIBRARIES or name in sys.stdlib_module_names


def _set_slot(value: Any, name: str, item: Any) -> None:
    if getattr(value, name, None) is not item:
        object.__setattr__(value, name, item)


def _set_attribute(cls: type, name: str, value: Any) -> None:
    if vars(cls).get(name) is not value:
        setattr(cls, name, value)


def of_a_library(function: types.FunctionType) -> bool:
    """Whether a function belongs to LIBRARIES, so that its attributes and globals are not read."""
    name = function.__globals__.get("__name__") or ""
    return name.partition(".")[0] in LIBRARIES


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals that a function and its inner functions may read."""
    inner = [item for item in code.co_consts if isinstance(item, types.CodeType)]
    names = [name for item in inner for name in _names(item)]
    return tuple(dict.fromkeys([*code.co_names, *names]))


def atom(value: Any) -> Hashable:
    return (type(value), value if value == value else repr(value))  # NaN must equal itself


def _key(key: Any) -> Hashable:
    return key if isinstance(key, (str, int)) else repr(key)


def version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def content(tensor: torch.Tensor) -> Hashable:
    """A tensor's type, shape and a hash of its numbers; of a large one, its version and a hash of a
    sample."""
    form: tuple[Hashable, ...] = (tensor.dtype, tuple(tensor.shape))
    try:
        numbers = tensor.detach()
        if numbers.numel() > WHOLE:
            numbers = numbers.reshape(-1)[:: numbers.numel() // SAMPLE]
            form = (*form, version(tensor))
        numbers = numbers.cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        data = numbers.view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError):  # meta, sparse or quantised tensors
        return (*form, id(tensor), version(tensor))
    return (*form, hashlib.blake2b(data.data, digest_size=16).digest())


def _refill(container: Any, items: Any) -> None:
    """Restore items in place, step by step: other threads may be reading the container."""
    if isinstance(container, dict):
        for key, value in items.items():
            if container.get(key, items) is not value:
                container[key] = value
        for key in [key for key in container if key not in items]:
            del container[key]
    elif isinstance(container, list):
        container[:] = items
    elif len(container) != len(items) or any(map(operator.is_not, container, items)):
        container.clear()
        container.extend(items) if isinstance(container, deque) else container.update(items)


def _copy(array: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> None:
    writeable = array.flags.writeable and array.shape == numbers.shape
    if writeable and not np.array_equal(array, numbers):
        np.copyto(array, numbers)


def write(tensor: torch.Tensor, numbers: torch.Tensor) -> None:
    with torch.no_grad():
        if tensor.dtype is not numbers.dtype:
            tensor.data = numbers.to(tensor.device, copy=True)
        elif tensor.shape == numbers.shape and not torch.equal(tensor.cpu(), numbers.cpu()):
            tensor.data.copy_(numbers)


def rebind(tensor: torch.Tensor, numbers: torch.Tensor) -> None:
    """Restore a tensor's memory, if it was cast or got other memory on the same device."""
    moved = tensor.device == numbers.device and tensor.data_ptr() != numbers.data_ptr()
    if tensor.dtype is not numbers.dtype or moved:
        tensor.data = numbers
