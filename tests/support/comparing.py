"""Compares objects by all that they hold, and by what they write to disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
)


def state_of(value: Any) -> Any:
    """A comparable copy of an object: tensors by content, modules by weights, hooks and dtype."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, torch.nn.Module):
        weights = {
            name: (state_of(tensor), str(tensor.dtype))
            for name, tensor in value.state_dict().items()
        }
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), hasattr(m, "_hf_hook"))
            for m in value.modules()
        ]
        return weights, hooks, value.training
    if isinstance(value, DiffusionPipeline):
        return {name: state_of(attribute) for name, attribute in vars(value).items()}
    if isinstance(value, (list, tuple)):
        return [state_of(item) for item in value]
    if isinstance(value, dict):
        return {name: state_of(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, torch.Generator):
        return state_of(value.get_state())
    if hasattr(value, "__dict__") and not callable(value):
        return type(value), {name: state_of(attribute) for name, attribute in vars(value).items()}
    return repr(value)


def saved(pipeline: Any, folder: Path) -> dict[str, str]:
    pipeline.save_pretrained(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
