"""Spares jobs a search of all modules for hooks whenever their pipeline asks for its device.

`_execution_device` looks for hooks that offload models on every module of every model, which takes
milliseconds of a job's start. Without such hooks it is the pipeline's `device`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from stepweave.compat.subclasses import like

_PLAIN = (DiffusionPipeline._execution_device, ModularPipeline._execution_device)


def without_hooks(pipeline: Any) -> None:
    """Tell a view that no module has a hook that offloads models, so that it need not look."""
    kind = type(pipeline)
    if getattr(kind, "_execution_device", None) in _PLAIN:
        pipeline.__class__ = _unhooked(kind)  # type: ignore[arg-type]


@functools.cache
def _unhooked(kind: type) -> type:
    def _execution_device(self: Any) -> torch.device:
        return self.device  # type: ignore[no-any-return]

    return like(kind, _execution_device=property(_execution_device, doc=_PLAIN[0].__doc__))
