"""One pipeline for many threads."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from transformers import PreTrainedTokenizerBase

from stepweave.scope.async_scheduler import BaseAsyncScheduler
from stepweave.scope.locks import LockedTokenizer
from stepweave.scope.proxy import Proxy
from stepweave.scope.view import DEFAULT_THRESHOLD, make_view

ENGINE_HOOK = "stepweave"  # under which a StepEngine hooks modules; it keeps no state in them


class LockedAutoencoder(Proxy):
    """A transparent proxy that lets one thread at a time encode or decode: autoencoders keep state
    between tiles and frames."""

    def __init__(self, autoencoder: torch.nn.Module, lock: Any) -> None:
        super().__init__(autoencoder)
        self._self_lock = lock

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        with self._self_lock:
            return self.__wrapped__.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        with self._self_lock:
            return self.__wrapped__.decode(*args, **kwargs)


class RequestScopedPipeline:
    """Runs one diffusers pipeline for many threads at once, each call on a view of its own.

    The pipeline given is never changed. Modules and weights are shared, so memory does not grow
    with the number of threads.

    Args:
        pipeline: any diffusers pipeline.
        mutable_attrs: names of attributes that each request gets copies of, beside schedulers,
            guiders and sub-pipelines.
        auto_detect_mutables: copy every attribute that a call could change: lists, dicts,
            generators, small tensors, plain objects. Off, only `mutable_attrs` are.
        tensor_numel_threshold: tensors with more elements are shared.
        tokenizer_lock: taken around every use of a tokenizer; one of its own if None. Share it
            between pipelines that share tokenizers.
        wrap_scheduler: give each view its scheduler in a `BaseAsyncScheduler`.

    Calls run at the same time, except where the modules hold the state of a call: with CPU or group
    offload, a feature cache (FirstBlockCache and its like), perturbed attention or a half-precision
    autoencoder that the call casts, they take turns.

    >>> pipeline = DiffusionPipeline.from_pretrained(
    ...     "models/shapes", text_encoder_3=None, tokenizer_3=None
    ... )
    >>> scoped = RequestScopedPipeline(pipeline)
    >>> with ThreadPoolExecutor(4) as pool:
    ...     generate = lambda prompt: scoped.generate(prompt, num_inference_steps=20).images[0]
    ...     images = list(pool.map(generate, prompts))
    """

    def __init__(
        self,
        pipeline: Any,
        mutable_attrs: Iterable[str] | None = None,
        auto_detect_mutables: bool = True,
        tensor_numel_threshold: int = DEFAULT_THRESHOLD,
        tokenizer_lock: Any = None,
        wrap_scheduler: bool = True,
    ) -> None:
        names = frozenset(mutable_attrs or ())
        missing = sorted(name for name in names if not hasattr(pipeline, name))
        if missing:
            raise AttributeError(f"{type(pipeline).__name__} has no attribute {missing[0]!r}")
        self.pipeline = pipeline
        self._only = None if auto_detect_mutables else names
        self._threshold = tensor_numel_threshold
        self._wrap_scheduler = wrap_scheduler
        self._tokenizer_lock = tokenizer_lock or threading.RLock()
        self._autoencoder_lock = threading.RLock()
        self._turn = threading.Lock()
        self._parts: dict[int, tuple[torch.nn.Module, list[torch.nn.Module]]] = {}

    def view(self, scheduler: Any = None) -> Any:
        """A view of the pipeline for one request, with a copy of `scheduler` if one is given."""
        view = make_view(
            self.pipeline,
            replace={} if scheduler is None else {"scheduler": scheduler},
            wrap=self._wrap,
            only=self._only,
            tensor_numel_threshold=self._threshold,
        )
        if self._wrap_scheduler and getattr(view, "scheduler", None) is not None:
            view.__dict__["scheduler"] = BaseAsyncScheduler(view.__dict__["scheduler"])
        return view

    def generate(
        self,
        *args: Any,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        scheduler: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call the pipeline on a view of this request's own and return what it returns. Safe from
        any thread.

        `args` and `kwargs` are the pipeline's own. `scheduler` is used in place of the pipeline's,
        as a copy. `device`, if given, must be the one the pipeline runs on (ValueError otherwise):
        views share its weights.
        """
        if device is not None:
            asked, own = torch.device(device), self.pipeline._execution_device
            if asked.type != own.type or asked.index not in (None, own.index):
                raise ValueError(f"device is {str(device)!r}, but the pipeline runs on {own}")
        if num_inference_steps is not None:
            kwargs["num_inference_steps"] = num_inference_steps
        with self.lease(scheduler) as view:
            return view(*args, **kwargs)

    @contextlib.contextmanager
    def lease(self, scheduler: Any = None) -> Iterator[Any]:
        """A view to call within the block; where calls must take turns, the block waits for its
        turn and holds it."""
        if not self.takes_turns():
            yield self.view(scheduler)
            return
        with self._turn, _left_as_found(self.pipeline):
            yield self.view(scheduler)

    def takes_turns(self) -> bool:
        """Whether calls must take turns, because the modules themselves keep a call's state.

        Asked at every call, since hooks come and go. The parts of a module are listed once.
        """
        # a call whose turn it is may hide that by what it changed
        if self._turn.locked() or self._swaps_state():
            return True
        for module in _modules(self.pipeline):
            found = self._parts.get(id(module))
            if found is None or found[0] is not module:
                found = self._parts[id(module)] = (module, list(module.modules()))
            if any(self._state_keeper(part) for part in found[1]):
                return True
        return False

    def _swaps_state(self) -> bool:
        return swaps_state(self.pipeline)

    def _is_harmless(self, hook: Any) -> bool:
        """Whether calls may overlap though accelerate has this hook on a module."""
        return False

    def _state_keeper(self, module: torch.nn.Module) -> str | None:
        """The hook of a module that keeps a call's state, by name: offload, feature caches."""
        attributes = module.__dict__
        if "_hf_hook" in attributes and not self._is_harmless(attributes["_hf_hook"]):
            return type(attributes["_hf_hook"]).__name__
        # diffusers leaves an empty registry on every model that it could have hooked
        registry = attributes.get("_diffusers_hook")
        return (
            None
            if registry is None
            else next((name for name in registry.hooks if name != ENGINE_HOOK), None)
        )

    def _wrap(self, component: Any) -> Any:
        if isinstance(component, PreTrainedTokenizerBase):
            return LockedTokenizer(component, self._tokenizer_lock)
        if is_autoencoder(component):
            return LockedAutoencoder(component, self._autoencoder_lock)
        return component

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":  # not set yet: unpickling
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return f"RequestScopedPipeline({type(self.pipeline).__name__})"


def is_autoencoder(component: Any) -> bool:
    """Whether a component is a model that encodes and decodes; tokenizers do, too."""
    methods = (getattr(component, name, None) for name in ("encode", "decode"))
    return isinstance(component, torch.nn.Module) and all(map(callable, methods))


def _modules(pipeline: Any) -> list[torch.nn.Module]:
    # not by `components`, which leaves out those with a default that diffusers does not know of
    return [value for value in vars(pipeline).values() if isinstance(value, torch.nn.Module)]


_SWAPS = r"set_attn_processor\(|\.processor = "
_CASTS = r"if self\.vae\.config\.force_upcast"
_HALVES = (torch.float16, torch.bfloat16)
_SWITCHES = r"enable_fuser\(|register_forward_hook\("


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
        for module in _modules(pipeline)
    )


def upcasts(module: torch.nn.Module) -> bool:
    """Whether a pipeline may cast an autoencoder to single precision for a while: to decode in
    float16, and, in pipelines that begin with an image, to encode in any half precision."""
    return (
        bool(getattr(getattr(module, "config", None), "force_upcast", False))
        and module.dtype in _HALVES
    )


def set_processor(attention: torch.nn.Module, processor: Any) -> None:
    """Put an attention's processor in place, be it a module or not; torch takes nothing else in a
    module's place."""
    if attention.processor is not processor:
        if isinstance(attention.processor, torch.nn.Module):
            del attention.processor
        attention.processor = processor


@contextlib.contextmanager
def _left_as_found(pipeline: Any) -> Iterator[None]:
    """Undo what a call does to the shared modules, also when it fails half way."""
    parts = [part for module in _modules(pipeline) for part in module.modules()]
    processors = [(part, part.processor) for part in parts if hasattr(part, "processor")]
    dtypes: list[tuple[Any, torch.dtype]] = [
        (one, one.dtype)  # type: ignore[misc]
        for one in _modules(pipeline)
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
