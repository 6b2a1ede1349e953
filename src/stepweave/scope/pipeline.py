"""One pipeline for many threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
import wrapt
from transformers import PreTrainedTokenizerBase

from stepweave.scope.scheduler import BaseAsyncScheduler
from stepweave.scope.tokenizer import LockedTokenizer
from stepweave.scope.view import DEFAULT_THRESHOLD, make_view


class LockedAutoencoder(wrapt.ObjectProxy[Any]):
    """A transparent proxy that lets one thread at a time encode or decode: autoencoders keep state between tiles and frames."""

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

    The pipeline given is never changed. Modules and weights are shared, so memory does not grow with the number of threads.

    Args:
        pipeline: any diffusers pipeline.
        mutable_attrs: names of attributes that each request gets copies of, beside schedulers, guiders and sub-pipelines.
        auto_detect_mutables: copy every attribute that a call could change: lists, dicts, generators, small tensors, plain
            objects. Off, only `mutable_attrs` are.
        tensor_numel_threshold: tensors with more elements are shared.
        tokenizer_lock: taken around every use of a tokenizer; one of its own if None. Share it between pipelines that share
            tokenizers.
        wrap_scheduler: give each view its scheduler in a `BaseAsyncScheduler`.

    Calls run at the same time, except where the modules hold the state of a call: with CPU or group offload, a feature cache
    (FirstBlockCache and its like) or perturbed attention, they take turns.

    >>> pipeline = DiffusionPipeline.from_pretrained("models/shapes", text_encoder_3=None, tokenizer_3=None)
    >>> scoped = RequestScopedPipeline(pipeline)
    >>> with ThreadPoolExecutor(4) as pool:
    ...     images = list(pool.map(lambda prompt: scoped.generate(prompt, num_inference_steps=20).images[0], prompts))
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
        """Call the pipeline on a view of this request's own and return what it returns. Safe from any thread.

        `args` and `kwargs` are the pipeline's own. `scheduler` is used in place of the pipeline's, as a copy. `device`, if
        given, must be the one the pipeline runs on (ValueError otherwise): views share its weights.
        """
        if device is not None and torch.device(device).type != self.pipeline._execution_device.type:
            raise ValueError(f"device is {str(device)!r}, but the pipeline runs on {self.pipeline._execution_device}")
        if num_inference_steps is not None:
            kwargs["num_inference_steps"] = num_inference_steps
        with self._turn if _keeps_state_in_modules(self.pipeline) else contextlib.nullcontext():
            return self.view(scheduler)(*args, **kwargs)

    def _wrap(self, component: Any) -> Any:
        if isinstance(component, PreTrainedTokenizerBase):
            return LockedTokenizer(component, self._tokenizer_lock)
        if hasattr(component, "encode") and hasattr(component, "decode"):
            return LockedAutoencoder(component, self._autoencoder_lock)
        return component

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":  # not set yet: unpickling
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return f"RequestScopedPipeline({type(self.pipeline).__name__})"


def _keeps_state_in_modules(pipeline: Any) -> bool:
    """Whether a call leaves marks on the shared modules, so that calls must take turns."""
    if hasattr(pipeline, "_set_pag_attn_processor"):
        return True
    return any(
        hasattr(component, "_hf_hook")
        or hasattr(component, "_diffusers_hook")
        or getattr(component, "is_cache_enabled", False)
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
    )
