"""Model CPU offload for concurrent jobs: which models are on the GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from diffusers import DiffusionPipeline
from torch import nn


def moves_only(hook: Any) -> bool:
    """Whether a hook of accelerate only moves a whole module to the GPU before its forward, without
    state of a call."""
    return type(hook) is CpuOffload


class Offloading:
    """Does for many calls what `enable_model_cpu_offload` does for one at a time.

    The hooks of diffusers move the text encoders off the GPU when the denoiser is needed, the
    denoiser when the autoencoder is needed, and all at the end of a call; but none when the next
    job's text encoder is needed. Here each model of that chain, when it is moved to the GPU, moves
    all others off. Models that are not in the chain, such as a ControlNet, stay beside the
    denoiser. So never more models are on the GPU than with one job.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._used: dict[int, UserCpuOffloadHook] = {}  # by `id` of the models on the GPU

    def around(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function of `module`, to move others off the GPU first if it is offloaded."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if moves_only(getattr(module, "_hf_hook", None)):
                self._make_room(module)
            return function(*args, **kwargs)

        return run

    def _make_room(self, module: nn.Module) -> None:
        if id(module) in self._used:
            return
        for pipeline in pipelines_in(self._pipeline):
            names = (pipeline.model_cpu_offload_seq or "").split("->")
            chain = [getattr(pipeline, name, None) for name in names]
            for hook in getattr(pipeline, "_all_hooks", ()):
                if hook.model is module:
                    if any(model is module for model in chain):
                        self.offload()
                    self._used[id(module)] = hook
                    return

    def offload(self) -> None:
        """Move all models off the GPU."""
        while self._used:
            _, hook = self._used.popitem()
            # otherwise offloading has been disabled
            if getattr(hook.model, "_hf_hook", None) is hook.hook:
                hook.offload()


def pipelines_in(pipeline: Any) -> Iterator[Any]:
    """A pipeline and its sub-pipelines."""
    yield pipeline
    for component in list(vars(pipeline).values()):
        if isinstance(component, DiffusionPipeline):
            yield from pipelines_in(component)


def offload_only(pipeline: Any) -> Callable[[], None]:
    """A view's replacement for `maybe_free_model_hooks`: offloads the models, keeps their hooks."""
    hooks = list(getattr(pipeline, "_all_hooks", ()))

    def maybe_free_model_hooks() -> None:
        for hook in hooks:
            hook.offload()

    return maybe_free_model_hooks
