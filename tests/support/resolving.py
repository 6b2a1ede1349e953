"""Requests, resolved by a model."""

from __future__ import annotations

from typing import Any

from stepweave.parameters import ImageRequest, Parameters, Sources
from stepweave.serving.model import ServedModel


def resolve(
    model: ServedModel,
    *,
    n: int = 1,
    strength: float | None = None,
    sources: Sources | None = None,
    rehearse: bool = True,
    **asked: Any,
) -> Parameters:
    """Resolve a request with the fields `asked`."""
    request = ImageRequest(**asked)
    return model.resolve(request, n=n, strength=strength, sources=sources, rehearse=rehearse)
