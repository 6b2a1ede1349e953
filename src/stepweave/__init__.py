"""Stepweave: a diffusion model server that batches denoising steps, not requests."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BaseAsyncScheduler",
    "IsolationError",
    "Job",
    "LockedTokenizer",
    "Loras",
    "RequestScopedPipeline",
    "StepEngine",
    "__version__",
    "async_retrieve_timesteps",
    "make_view",
]

if TYPE_CHECKING:
    from stepweave.adapters.loras import Loras
    from stepweave.engine import Job, StepEngine
    from stepweave.scope import (
        BaseAsyncScheduler,
        IsolationError,
        LockedTokenizer,
        RequestScopedPipeline,
        async_retrieve_timesteps,
        make_view,
    )

_PACKAGES = {
    "Job": "stepweave.engine",
    "Loras": "stepweave.adapters.loras",
    "StepEngine": "stepweave.engine",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and diffusers take seconds, during which probes must work."""
    if name in __all__:
        package = _PACKAGES.get(name, "stepweave.scope")
        return getattr(importlib.import_module(package), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
