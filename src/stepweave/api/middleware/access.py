"""Which clients are served."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from stepweave.api.auth import authorize
from stepweave.api.connections import refusal_of
from stepweave.api.middleware.probes import KEYLESS, KEYLESS_BELOW
from stepweave.serving.server import Server


def check_connection(scope: Scope, server: Server) -> None:
    """Raise UnavailableError for a request on a connection over the limit."""
    if (refusal := refusal_of(scope)) is not None:
        raise refusal


def authenticate(scope: Scope, server: Server) -> None:
    """Raise AuthenticationError for a request without a valid API key, if keys are set."""
    path = scope["path"]
    open_to_all = path in KEYLESS or path.startswith(KEYLESS_BELOW)
    if not open_to_all and not _is_preflight(scope):
        authorize(scope, server.keys)


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what it may send (Fetch, 4.8), which it does without keys."""
    return scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)
