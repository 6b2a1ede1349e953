"""Detects pipelines whose calls change shared modules, so that calls must take turns."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance

from stepweave.compat.attention_processors import set_processor
from stepweave.compat.modular import call_class, functions_of

ENGINE_HOOK = "stepweave"  # name of a StepEngine's hook, which keeps no state
_SWAPS = r"set_attn_processor\(|\.processor = "
_CASTS = r"if (?:self|components)\.vae\.config\.force_upcast"
_HALVES = (torch.float16, torch.bfloat16)
_HOLDERS = re.compile(r"Multi(ControlNet(Union)?Model|Adapter)$")
_SWITCHES = r"enable_fuser\(|register_forward_hook\("


def modules_in(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules of a pipeline and of its sub-pipelines, with their attributes' names; of those
    that only hold others, such as several ControlNets, the others."""
    # not by `components`, which omits some with default values
    for name, component in vars(pipeline).items():
        if isinstance(component, torch.nn.Module):
            yield from _held(name, component)
        elif isinstance(component, DiffusionPipeline):
            yield from modules_in(component)


def _held(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """A module, or what it holds: diffusers' classes for several ControlNets or T2I-Adapters have a
    list of them, and nothing else."""
    if _HOLDERS.search(type(module).__name__) is None:
        yield name, module
        return
    for models in module.children():
        for index, model in enumerate(models.children()):
            yield f"{name}.{index}", model


class TurnTaking:
    """Decides whether calls of a pipeline must take turns, because its modules keep a call's state.

    Args:
        pipeline: the pipeline.
        harmless: whether calls may overlap with this hook of accelerate's on a module.
        processors_apart: whether the caller keeps swapped attention processors separate.
        casts_apart: the same for autoencoders that a call casts.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        harmless: Callable[[Any], bool] = lambda hook: False,
        processors_apart: bool = False,
        casts_apart: bool = False,
    ) -> None:
        self._pipeline = pipeline
        self._harmless = harmless
        self._processors_apart = processors_apart
        self._casts_apart = casts_apart
        self._parts: dict[int, tuple[torch.nn.Module, list[torch.nn.Module]]] = {}

    def of(self, pipeline: Any) -> TurnTaking:
        """The same for another pipeline."""
        other = copy.copy(self)
        other._pipeline = pipeline
        return other

    def needed(self) -> bool:
        """Whether calls must take turns now; hooks may change between calls."""
        return self.swaps_state() or next(self.keepers(), None) is not None

    def swaps_state(self) -> bool:
        """`swaps_state` of the pipeline."""
        casts = not self._casts_apart
        return swaps_state(self._pipeline, apart=self._processors_apart, casts=casts)

    def keepers(self) -> Iterator[tuple[str, str]]:
        """The classes of modules with a hook that keeps a call's state, and of the hooks."""
        for part in self._all_parts():
            hook = self._keeper(part)
            if hook is not None:
                yield type(part).__name__, hook

    def offloads(self) -> bool:
        """Whether a module has a hook that may move it between devices."""
        return any("_hf_hook" in part.__dict__ or _hooks(part) for part in self._all_parts())

    def _all_parts(self) -> Iterator[torch.nn.Module]:
        for _, module in modules_in(self._pipeline):
            parts = self._parts.get(id(module))
            if parts is None or parts[0] is not module:
                parts = self._parts[id(module)] = (module, list(module.modules()))
            yield from parts[1]

    def _keeper(self, module: torch.nn.Module) -> str | None:
        attributes = module.__dict__
        if "_hf_hook" in attributes and not self._harmless(attributes["_hf_hook"]):
            return type(attributes["_hf_hook"]).__name__
        return next(iter(_hooks(module)), None)


def _hooks(module: torch.nn.Module) -> Sequence[str]:
    """The names of diffusers' hooks on a module, without an engine's."""
    # diffusers puts an empty registry on every model that may be hooked
    registry = module.__dict__.get("_diffusers_hook")
    return () if registry is None else [name for name in registry.hooks if name != ENGINE_HOOK]


@functools.cache
def code_matches(kind: type, pattern: str) -> bool:
    """Whether the source code of a pipeline's class, or of a modular one's blocks, matches a
    pattern.

    In diffusers 0.42, `_SWAPS` and `_SWITCHES` match PAG, SAG, Attend-and-Excite, GLIGEN and
    Text-to-Video-Zero.
    """
    # by function: inspect parses a whole class, which is not thread-safe in Python 3.11 (gh-106905)
    for function in functions_of(kind):
        with contextlib.suppress(OSError, TypeError):  # there is no source file
            if re.search(pattern, inspect.getsource(function)):
                return True
    return False


def swaps_processors(pipeline: Any) -> bool:
    """Whether a call swaps attention processors and changes nothing else in modules: PAG."""
    return hasattr(pipeline, "_set_pag_attn_processor")


def swaps_state(pipeline: Any, *, apart: bool = False, casts: bool = True) -> bool:
    """Whether a call changes shared modules: it swaps attention processors (not counted with
    `apart`), casts an autoencoder and casts it back (counted with `casts`), or hooks modules."""
    pattern = _SWITCHES if apart else f"{_SWAPS}|{_SWITCHES}"
    if not apart and swaps_processors(pipeline) or code_matches(call_class(pipeline), pattern):
        return True
    for component in pipeline.components.values():
        prepare = getattr(type(component), "prepare_models", None)
        if isinstance(component, BaseGuidance) and prepare is not BaseGuidance.prepare_models:
            return True
    return casts and any(
        upcasts(module)
        and (module.dtype == torch.float16 or code_matches(call_class(pipeline), _CASTS))
        for _, module in modules_in(pipeline)
    )


def upcasts(module: torch.nn.Module) -> bool:
    """Whether a pipeline may cast an autoencoder to single precision temporarily: to decode in
    float16, or to encode in any half precision."""
    upcast = getattr(getattr(module, "config", None), "force_upcast", False)
    return bool(upcast) and module.dtype in _HALVES


@contextlib.contextmanager
def left_as_found(pipeline: Any) -> Iterator[None]:
    """Undo a call's changes to the shared modules, even if it fails."""
    modules: list[Any] = [module for _, module in modules_in(pipeline)]
    parts = [part for module in modules for part in module.modules()]
    processors = [(part, part.processor) for part in parts if hasattr(part, "processor")]
    dtypes = [(module, module.dtype) for module in modules if hasattr(module, "dtype")]
    try:
        yield
    finally:
        for part, processor in processors:
            set_processor(part, processor)
        for module, dtype in dtypes:
            if module.dtype != dtype:
                module.to(dtype)
            if getattr(module, "is_cache_enabled", False):
                module._reset_stateful_cache()
