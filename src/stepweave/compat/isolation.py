"""How a value is copied for one request: by its type, each object once."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import threading
import types
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import wrapt
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec
from transformers import PreTrainedTokenizerBase

from stepweave.errors import StepweaveError

THRESHOLD = 1_000_000  # elements; larger tensors are assumed to be weights, and shared

Replacement = Callable[[Any], Any]

WRAPPABLE = (torch.nn.Module, PreTrainedTokenizerBase)

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, range, enum.Enum, PurePath)
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_OF_TORCH = (torch.nn.Module, torch.nn.Parameter, torch.device, torch.dtype, torch.Size)
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Condition)
_DECLARED = (ComponentSpec, ConfigSpec)  # of modular pipelines, whose calls only read them
_OTHERS = (*_DECLARED, FrozenDict, np.generic, np.dtype, logging.Logger, PreTrainedTokenizerBase)
_SHARED = (*_CONSTANTS, *_CODE, *_OF_TORCH, *_LOCKS, *_OTHERS)


class IsolationError(StepweaveError):
    """An attribute, named by the message, that can be neither copied nor shared."""


class Isolation:
    """Copies a pipeline's values for one request; each object once, so that references to the same
    object stay equal.

    `wrap` is called with every shared component and returns it or a replacement. Tensors and arrays
    of more than `threshold` elements are shared.
    """

    def __init__(self, wrap: Replacement | None = None, threshold: int = THRESHOLD) -> None:
        self._wrap = wrap
        self._threshold = threshold
        self.copies: dict[int, Any] = {}  # by `id` of the original

    def pipeline(self, pipeline: Any, path: str) -> Any:
        """Make a view of a sub-pipeline. Subclasses must implement it to support these."""
        raise IsolationError(f"{path} is a pipeline within a value.", code="isolation")

    def value(self, value: Any, path: str) -> Any:
        """A copy of a value, or the value itself if it is shared. `path` is for errors."""
        copied = self.copies.get(id(value))
        if copied is None:
            copied = self.copies[id(value)] = self._copy(value, path)
        return copied

    def _copy(self, value: Any, path: str) -> Any:
        cls = type(value)  # not `__class__`, which a proxy takes from its object
        if issubclass(cls, _SHARED):
            wraps = self._wrap is not None and isinstance(value, WRAPPABLE)
            return self._wrap(value) if wraps else value  # type: ignore[misc]
        if issubclass(cls, wrapt.ObjectProxy):
            # a proxy of a scheduler is copied, a tokenizer's is shared like its lock
            scheduler = isinstance(value, SchedulerMixin)
            return cls(self.value(value.__wrapped__, path)) if scheduler else value
        if issubclass(cls, torch.Tensor):
            return value if value.numel() > self._threshold else value.detach().clone()
        if issubclass(cls, np.ndarray):
            return value if value.size > self._threshold else value.copy()
        if issubclass(cls, torch.Generator):
            return value.clone_state()
        if issubclass(cls, DiffusionPipeline):
            return self.pipeline(value, path)
        if cls in (list, set, tuple, frozenset):
            return cls(self.value(item, f"{path}[{i}]") for i, item in enumerate(value))
        if cls is dict:
            return {key: self.value(item, f"{path}[{key!r}]") for key, item in value.items()}
        if issubclass(cls, types.MethodType):
            # a method of a copied object must act on the copy
            owner = self.copies.get(id(value.__self__), value.__self__)
            return types.MethodType(value.__func__, owner)
        if is_plain(cls):  # type: ignore[arg-type]
            return self._object(value, path)
        try:
            # references to modules, tokenizers and objects copied before must be kept
            return copy.deepcopy(value, dict(self.copies))
        except Exception as error:
            raise IsolationError(
                f"{path} ({cls.__name__}) cannot be isolated: {error}", code="isolation"
            ) from error

    def _object(self, value: Any, path: str) -> Any:
        """Copy a plain object and its attributes."""
        cls = type(value)
        twin = object.__new__(cls)
        self.copies[id(value)] = twin
        for name, attribute in list(vars(value).items()):
            twin.__dict__[name] = self.value(attribute, f"{path}.{name}")
        return twin


@functools.lru_cache(1024)
def is_plain(cls: type) -> bool:
    """Whether objects of a class consist of their `__dict__` only, so copying it is enough."""
    custom = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__copy__", "__deepcopy__")
    overridden = any(getattr(cls, name, None) is not getattr(object, name, None) for name in custom)
    return (
        not overridden
        and cls.__dictoffset__ != 0
        and not any(vars(base).get("__slots__") for base in cls.__mro__)
    )
