"""Model CPU offload in company: which models are on the GPU while jobs in all phases take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from diffusers import DiffusionPipeline
from torch import nn


def moves_only(hook: Any) -> bool:
    """Whether a hook of accelerate just brings a whole module to the GPU before its forward, and
    keeps nothing of a call."""
    return type(hook) is CpuOffload


class Offloading:
    """What `enable_model_cpu_offload` does for one call at a time, for many.

    Its hooks take the text encoders off the GPU when the denoiser comes, and that when the
    autoencoder comes; when the next job's text encoder comes, they take nothing off, and at the end
    of a call all is. Here a model of that chain takes off all that was used before it whenever it
    comes anew; what is not in the chain, like a ControlNet, stays with the denoiser it alternates
    with. So no more is on the GPU at a time than with one job.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._used: dict[int, UserCpuOffloadHook] = {}  # by their models, which are on the GPU

    def around(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of `module`, with room made for the module first where it is offloaded."""

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
            chain = [
                getattr(pipeline, name, None)
                for name in (pipeline.model_cpu_offload_seq or "").split("->")
            ]
            for hook in getattr(pipeline, "_all_hooks", ()):
                if hook.model is module:
                    if any(one is module for one in chain):
                        self.offload()
                    self._used[id(module)] = hook
                    return

    def offload(self) -> None:
        """Take off the GPU what is there."""
        while self._used:
            _, hook = self._used.popitem()
            # else somebody put an end to offloading
            if getattr(hook.model, "_hf_hook", None) is hook.hook:
                hook.offload()


def pipelines_in(pipeline: Any) -> Iterator[Any]:
    """A pipeline, and those that it is combined of."""
    yield pipeline
    for component in list(vars(pipeline).values()):
        if isinstance(component, DiffusionPipeline):
            yield from pipelines_in(component)


def offload_only(pipeline: Any) -> Callable[[], None]:
    """What a view does at the end of its call where CPU offload is on: move the models back, leave
    their hooks alone."""
    hooks = list(getattr(pipeline, "_all_hooks", ()))

    def maybe_free_model_hooks() -> None:
        for hook in hooks:
            hook.offload()

    return maybe_free_model_hooks
