"""Views: a pipeline of one request's own, around the weights that all requests share.

A view is an object of the pipeline's own class. Whatever a call changes is a copy: the scheduler,
guiders, sub-pipelines with their schedulers, image processors, lists, dicts, small tensors,
generators. Whatever is heavy or immutable is shared: modules, weights, large tensors, the config.
The caller's pipeline is only read.
"""

from __future__ import annotations

import copy
import enum
import functools
import logging
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import wrapt
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from transformers import PreTrainedTokenizerBase

from stepweave.errors import StepweaveError

DEFAULT_THRESHOLD = 1_000_000  # elements; a larger tensor is taken for weights and shared

Replacement = Callable[[Any], Any]

_SHARED = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    enum.Enum,
    PurePath,
    FrozenDict,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    torch.nn.Module,
    torch.nn.Parameter,
    torch.device,
    torch.dtype,
    torch.Size,
    np.generic,
    np.dtype,
    logging.Logger,
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Event,
    threading.Condition,
    PreTrainedTokenizerBase,
)


class IsolationError(StepweaveError):
    """Something that a request would change can be neither copied nor shared; the message names
    it."""


def make_view(
    pipeline: Any,
    *,
    replace: Mapping[str, Any] | None = None,
    wrap: Replacement | None = None,
    only: frozenset[str] | None = None,
    tensor_numel_threshold: int = DEFAULT_THRESHOLD,
) -> Any:
    """A view of `pipeline` for one request.

    `replace` gives attributes that the view shall have instead (a scheduler of the request's
    choice). `wrap` is asked for every shared component and may return something to stand in its
    place (a lock around it). With `only`, just these attributes are copied, beside schedulers,
    guiders and sub-pipelines, which always are. Raises IsolationError, naming the attribute, for
    what can be neither copied nor shared.
    """
    isolation = _Isolation(wrap, tensor_numel_threshold)
    return isolation.view(pipeline, type(pipeline).__name__, replace or {}, only)


class _Isolation:
    """One walk through a pipeline. An object met twice is copied once, so what was one stays
    one."""

    def __init__(self, wrap: Replacement | None, threshold: int) -> None:
        self._wrap = wrap
        self._threshold = threshold
        self._copies: dict[int, Any] = {}

    def view(
        self, pipeline: Any, path: str, replace: Mapping[str, Any], only: frozenset[str] | None
    ) -> Any:
        view = object.__new__(type(pipeline))
        self._copies[id(pipeline)] = view
        replaced = {}
        for name, value in replace.items():
            if name not in vars(pipeline):
                raise AttributeError(f"{path} has no attribute {name!r}")
            replaced[name] = self.value(value, f"{path}.{name}")
            if vars(pipeline)[name] is not None:
                # in the original's place wherever it stands: sub-pipelines hold the same scheduler
                self._copies[id(vars(pipeline)[name])] = replaced[name]
        for value in vars(pipeline).values():
            if isinstance(value, (*_WRAPPABLE, SchedulerMixin)):
                self.value(value, path)
        # past __setattr__, which would write every component into the config anew
        state = view.__dict__
        for name, value in list(vars(pipeline).items()):
            if name in replaced:
                state[name] = replaced[name]
            elif only is None or name in only or _is_component(value):
                state[name] = self.value(value, f"{path}.{name}")
            else:
                state[name] = value
        # diffusers' own removes and adds hooks of the shared models, and resets caches that others
        # may be using
        state["maybe_free_model_hooks"] = _offload_only(pipeline)
        return view

    def value(self, value: Any, path: str) -> Any:
        known = self._copies.get(id(value))
        if known is not None:
            return known
        copied = self._copy(value, path)
        self._copies[id(value)] = copied
        return copied

    def _copy(self, value: Any, path: str) -> Any:
        # by type, not by __class__: a proxy is copied as what it is
        cls = type(value)
        if issubclass(cls, _SHARED):
            return (
                self._wrap(value)
                if self._wrap is not None and isinstance(value, _WRAPPABLE)
                else value
            )
        if issubclass(cls, wrapt.ObjectProxy):
            # a proxy of ours: around a scheduler it is made anew, around a tokenizer it is shared
            # like the lock in it
            return (
                cls(self.value(value.__wrapped__, path))
                if isinstance(value, SchedulerMixin)
                else value
            )
        if issubclass(cls, torch.Tensor):
            return value if value.numel() > self._threshold else value.detach().clone()
        if issubclass(cls, np.ndarray):
            return value if value.size > self._threshold else value.copy()
        if issubclass(cls, torch.Generator):
            return value.clone_state()
        if issubclass(cls, DiffusionPipeline):
            return self.view(value, path, {}, None)
        if cls in (list, set, tuple, frozenset):
            return cls(self.value(item, f"{path}[{i}]") for i, item in enumerate(value))
        if cls is dict:
            return {key: self.value(item, f"{path}[{key!r}]") for key, item in value.items()}
        if issubclass(cls, types.MethodType):
            # a method of something that was copied must act on the copy
            return types.MethodType(
                value.__func__, self._copies.get(id(value.__self__), value.__self__)
            )
        if is_plain(cls):  # type: ignore[arg-type]
            return self._object(value, path)
        try:
            # what holds modules, tokenizers or copies of ours must go on holding those
            return copy.deepcopy(value, dict(self._copies))
        except Exception as error:
            raise IsolationError(
                f"{path} ({cls.__name__}) cannot be isolated: {error}", code="isolation"
            ) from error

    def _object(self, value: Any, path: str) -> Any:
        """A plain object: of the same class, its attributes copied by the same rules."""
        cls = type(value)
        twin = object.__new__(cls)
        self._copies[id(value)] = twin
        for name, attribute in list(vars(value).items()):
            twin.__dict__[name] = self.value(attribute, f"{path}.{name}")
        return twin


_WRAPPABLE = (torch.nn.Module, PreTrainedTokenizerBase)


def _is_component(value: Any) -> bool:
    """Whether an attribute is copied even when only some are asked for."""
    return isinstance(
        value,
        (SchedulerMixin, ConfigMixin, DiffusionPipeline, PreTrainedTokenizerBase, torch.nn.Module),
    )


@functools.lru_cache(1024)
def is_plain(cls: type) -> bool:
    """Whether objects of a class are their `__dict__` and nothing else, so that copying it copies
    them."""
    custom = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__copy__", "__deepcopy__")
    overridden = any(getattr(cls, name, None) is not getattr(object, name, None) for name in custom)
    return (
        not overridden
        and cls.__dictoffset__ != 0
        and not any(vars(base).get("__slots__") for base in cls.__mro__)
    )


def _offload_only(pipeline: Any) -> Callable[[], None]:
    """What a view does at the end of its call where CPU offload is on: move the models back, leave
    their hooks alone."""
    hooks = list(getattr(pipeline, "_all_hooks", ()))

    def maybe_free_model_hooks() -> None:
        for hook in hooks:
            hook.offload()

    return maybe_free_model_hooks
