"""One pipeline in memory for many concurrent requests, without a server: wrap it in
`RequestScopedPipeline` and call `generate` from any thread."""

from stepweave.compat.async_scheduler import BaseAsyncScheduler, async_retrieve_timesteps
from stepweave.compat.isolation import IsolationError
from stepweave.compat.locks import LockedTokenizer
from stepweave.scope.pipeline import RequestScopedPipeline
from stepweave.scope.view import make_view

__all__ = [
    "BaseAsyncScheduler",
    "IsolationError",
    "LockedTokenizer",
    "RequestScopedPipeline",
    "async_retrieve_timesteps",
    "make_view",
]
