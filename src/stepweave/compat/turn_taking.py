"""Pipelines whose calls change the shared modules, so that they cannot run at the same time."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance

from stepweave.compat.attention_processors import set_processor

ENGINE_HOOK = "stepweave"  # under which a StepEngine hooks modules; it keeps no state in them
_SWAPS = r"set_attn_processor\(|\.processor = "
_CASTS = r"if self\.vae\.config\.force_upcast"
_HALVES = (torch.float16, torch.bfloat16)
_SWITCHES = r"enable_fuser\(|register_forward_hook\("


def modules_in(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules of a pipeline and of the pipelines in it, by the names of their attributes."""
    # not by `components`, which leaves out those with a default that diffusers does not know of
    for name, component in vars(pipeline).items():
        if isinstance(component, torch.nn.Module):
            yield name, component
        elif isinstance(component, DiffusionPipeline):
            yield from modules_in(component)


class TurnTaking:
    """Whether calls of one pipeline must take turns, because its modules keep a call's state.

    Args:
        pipeline: whose modules they are.
        harmless: whether calls may overlap though accelerate has this hook on a module.
        processors_apart: attention processors that a call swaps are kept apart by the caller.
        casts_apart: so are autoencoders that a call casts.
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
        """The same of another pipeline."""
        other = copy.copy(self)
        other._pipeline = pipeline
        return other

    def needed(self) -> bool:
        """Asked at every call, since hooks come and go. The parts of a module are listed once."""
        return self.swaps_state() or next(self.keepers(), None) is not None

    def swaps_state(self) -> bool:
        """Whether a call changes shared modules: attention processors that it swaps, an
        autoencoder that it casts and casts back."""
        return swaps_state(
            self._pipeline, apart=self._processors_apart, casts=not self._casts_apart
        )

    def keepers(self) -> Iterator[tuple[str, str]]:
        """The modules that keep a call's state in a hook: a module's class, and its hook's."""
        for _, module in modules_in(self._pipeline):
            parts = self._parts.get(id(module))
            if parts is None or parts[0] is not module:
                parts = self._parts[id(module)] = (module, list(module.modules()))
            for part in parts[1]:
                hook = self._keeper(part)
                if hook is not None:
                    yield type(part).__name__, hook

    def _keeper(self, module: torch.nn.Module) -> str | None:
        attributes = module.__dict__
        if "_hf_hook" in attributes and not self._harmless(attributes["_hf_hook"]):
            return type(attributes["_hf_hook"]).__name__
        # diffusers leaves an empty registry on every model that it could have hooked
        registry = attributes.get("_diffusers_hook")
        hooks = () if registry is None else registry.hooks
        return next((name for name in hooks if name != ENGINE_HOOK), None)


@functools.cache
def _writes_to_modules(kind: type, pattern: str) -> bool:
    """Whether a pipeline's code swaps attention processors, or switches layers or hooks modules,
    during a call.

    So do PAG, SAG, Attend-and-Excite, GLIGEN and Text-to-Video-Zero; no other pipeline of diffusers
    0.42 has such code.
    """
    for cls in kind.__mro__:
        if issubclass(cls, DiffusionPipeline) and cls is not DiffusionPipeline:
            # function by function: for a class, inspect parses, which Python 3.11 cannot do on two
            # threads at once (gh-106905)
            for function in filter(inspect.isfunction, vars(cls).values()):
                with contextlib.suppress(OSError, TypeError):  # no source: typed in, or compiled
                    if re.search(pattern, inspect.getsource(function)):
                        return True
    return False


def swaps_processors(pipeline: Any) -> bool:
    """Whether a call puts attention processors of its own in place, and does no more to the
    modules: PAG."""
    return hasattr(pipeline, "_set_pag_attn_processor")


def swaps_state(pipeline: Any, *, apart: bool = False, casts: bool = True) -> bool:
    """Whether a call changes shared modules: attention processors that it swaps, an autoencoder
    that it casts and casts back.

    With `apart` such processors are kept apart; without `casts` autoencoders are.
    """
    pattern = _SWITCHES if apart else f"{_SWAPS}|{_SWITCHES}"
    if not apart and swaps_processors(pipeline) or _writes_to_modules(type(pipeline), pattern):  # type: ignore[arg-type]
        return True
    for component in pipeline.components.values():
        if (
            isinstance(component, BaseGuidance)
            and type(component).prepare_models is not BaseGuidance.prepare_models
        ):
            return True
    return casts and any(
        upcasts(module)
        and (module.dtype == torch.float16 or _writes_to_modules(type(pipeline), _CASTS))  # type: ignore[arg-type]
        for _, module in modules_in(pipeline)
    )


def upcasts(module: torch.nn.Module) -> bool:
    """Whether a pipeline may cast an autoencoder to single precision for a while: to decode in
    float16, and, in pipelines that begin with an image, to encode in any half precision."""
    return (
        bool(getattr(getattr(module, "config", None), "force_upcast", False))
        and module.dtype in _HALVES
    )


@contextlib.contextmanager
def left_as_found(pipeline: Any) -> Iterator[None]:
    """Undo what a call does to the shared modules, also when it fails half way."""
    parts = [part for _, module in modules_in(pipeline) for part in module.modules()]
    processors = [(part, part.processor) for part in parts if hasattr(part, "processor")]
    dtypes: list[tuple[Any, torch.dtype]] = [
        (one, one.dtype)  # type: ignore[misc]
        for _, one in modules_in(pipeline)
        if hasattr(one, "dtype")
    ]
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
