"""Refuses, by its class and before weights are read, a pipeline that cannot be served."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from stepweave.calls import Kind, described
from stepweave.errors import LoadError

_SAID: dict[Kind, str] = {
    "video": "makes videos, not images",
    "audio": "makes sound, not images",
    "text": "writes text, and makes no images",
    "3d": "makes three-dimensional shapes, not images",
    "other": "makes no images",
}


def check_served(pipeline: Any, given: Collection[str] = ()) -> None:
    """Raise LoadError, naming the class and why, for a pipeline, or a class, that makes no images,
    or that needs what requests cannot send, such as functions. `given` are arguments that a preset
    gives to every call."""
    call = described(pipeline)
    if call.kind != "image":
        raise LoadError(
            f"{call.pipeline} {_SAID[call.kind]} ({call.why}); this server serves pipelines that "
            "make images"
        )
    unknown = [name for name in call.unknown_needs if name not in given]
    if unknown:
        raise LoadError(
            f"{call.pipeline} needs {', '.join(unknown)}, which requests cannot send: they send "
            "images, texts, numbers, flags and tensors of prompts and images"
        )
