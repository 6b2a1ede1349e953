"""Views: a pipeline object for one request, around the weights that all requests share.

A view is an object of the pipeline's class. What a call changes is copied: the scheduler, guiders,
sub-pipelines with their schedulers, image processors, lists, dicts, small tensors, generators. What
is large or immutable is shared: modules, weights, large tensors, the config. The original pipeline
is only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from transformers import PreTrainedTokenizerBase

from stepweave.compat.cpu_offload import offload_only
from stepweave.compat.isolation import THRESHOLD, WRAPPABLE, Isolation, Replacement


def make_view(
    pipeline: Any,
    *,
    replace: Mapping[str, Any] | None = None,
    wrap: Replacement | None = None,
    only: frozenset[str] | None = None,
    tensor_numel_threshold: int = THRESHOLD,
) -> Any:
    """Make a view of `pipeline` for one request.

    `replace` maps names of attributes to values that replace them in the view, such as another
    scheduler; AttributeError if the pipeline lacks one. `wrap` is called with every shared
    component and returns it or a replacement, such as a lock around it. With `only`, just these
    attributes are copied, besides schedulers, guiders and sub-pipelines, which always are. Raises
    IsolationError, naming the attribute, if a value can be neither copied nor shared.
    """
    views = _Views(wrap, tensor_numel_threshold)
    return views.view(pipeline, type(pipeline).__name__, replace or {}, only)


class _Views(Isolation):
    """Makes views of one pipeline and of its sub-pipelines."""

    def pipeline(self, pipeline: Any, path: str) -> Any:
        return self.view(pipeline, path, {}, None)

    def view(
        self, pipeline: Any, path: str, replace: Mapping[str, Any], only: frozenset[str] | None
    ) -> Any:
        view = object.__new__(type(pipeline))
        self.copies[id(pipeline)] = view
        replaced = {}
        for name, value in replace.items():
            if name not in vars(pipeline):
                raise AttributeError(f"{path} has no attribute {name!r}")
            replaced[name] = self.value(value, f"{path}.{name}")
            if vars(pipeline)[name] is not None:
                # replace it in sub-pipelines too, which may hold the same scheduler
                self.copies[id(vars(pipeline)[name])] = replaced[name]
        for value in vars(pipeline).values():
            if isinstance(value, (*WRAPPABLE, SchedulerMixin)):
                self.value(value, path)
        # not by __setattr__, which would also write every component to the config
        state = view.__dict__
        for name, value in list(vars(pipeline).items()):
            if name in replaced:
                state[name] = replaced[name]
            elif only is None or name in only or _is_component(value):
                state[name] = self.value(value, f"{path}.{name}")
            else:
                state[name] = value
        # diffusers' method replaces hooks of the shared models, and resets caches in use by others
        state["maybe_free_model_hooks"] = offload_only(pipeline)
        return view


def _is_component(value: Any) -> bool:
    """Whether an attribute is copied even if `only` does not name it."""
    return isinstance(
        value,
        (SchedulerMixin, ConfigMixin, DiffusionPipeline, PreTrainedTokenizerBase, torch.nn.Module),
    )
