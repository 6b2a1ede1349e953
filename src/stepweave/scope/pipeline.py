"""`RequestScopedPipeline`: one pipeline for many threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stepweave.compat.async_scheduler import BaseAsyncScheduler
from stepweave.compat.isolation import THRESHOLD
from stepweave.compat.locks import LockedAutoencoder, LockedTokenizer, is_autoencoder
from stepweave.compat.turn_taking import TurnTaking, left_as_found
from stepweave.scope.view import make_view


class RequestScopedPipeline:
    """Runs one diffusers pipeline for many threads at once, each call on a view of its own.

    The original pipeline is never changed. Modules and weights are shared, so memory does not grow
    with the number of threads.

    Args:
        pipeline: any diffusers pipeline.
        mutable_attrs: names of attributes to copy for each request, besides schedulers, guiders
            and sub-pipelines.
        auto_detect_mutables: copy every attribute that a call could change: lists, dicts,
            generators, small tensors, plain objects. If False, only `mutable_attrs` are copied.
        tensor_numel_threshold: tensors with more elements than this are shared, not copied.
        tokenizer_lock: held during every use of a tokenizer. Default: a new lock. Pipelines that
            share tokenizers must share it.
        wrap_scheduler: wrap each view's scheduler in a `BaseAsyncScheduler`.

    Raises AttributeError if the pipeline lacks one of `mutable_attrs`.

    Calls run concurrently, unless modules keep the state of a call; then they take turns. That is
    so with CPU or group offload, a feature cache (such as FirstBlockCache), perturbed attention, or
    a half-precision autoencoder that the call casts.

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
        tensor_numel_threshold: int = THRESHOLD,
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
        self.tokenizer_lock = tokenizer_lock or threading.RLock()
        self._autoencoder_lock = threading.RLock()
        self.turn_lock = threading.Lock()
        self.turns = TurnTaking(pipeline)

    def view(self, scheduler: Any = None) -> Any:
        """Make a view of the pipeline for one request, with a copy of `scheduler` if given."""
        view = make_view(
            self.pipeline,
            replace={} if scheduler is None else {"scheduler": scheduler},
            wrap=self.stand_in,
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
        """Call the pipeline on a view of its own, from any thread, and return the result.

        `args` and `kwargs` are those of the pipeline's call. A copy of `scheduler`, if given,
        replaces the pipeline's. Raises ValueError if `device` is not the pipeline's: views share
        its weights.
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
        """Provide a view within the block, which waits for its turn if calls must take turns."""
        if not self.takes_turns():
            yield self.view(scheduler)
            return
        with self.turn_lock, left_as_found(self.pipeline):
            yield self.view(scheduler)

    def takes_turns(self) -> bool:
        """Whether calls must take turns, because modules keep the state of a call."""
        # the call whose turn it is may have changed the modules so that they hide it
        return self.turn_lock.locked() or self.turns.needed()

    def stand_in(self, component: Any) -> Any:
        """The replacement for a shared component in a view: the component, or a lock around it."""
        if isinstance(component, PreTrainedTokenizerBase):
            return LockedTokenizer(component, self.tokenizer_lock)
        if is_autoencoder(component):
            return LockedAutoencoder(component, self._autoencoder_lock)
        return component

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":  # not set yet: unpickling
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return f"RequestScopedPipeline({type(self.pipeline).__name__})"
