"""API keys (RFC 6750): which client sends a request, and whose its jobs are."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from stepweave.api.context import context_of
from stepweave.errors import AuthenticationError
from stepweave.serving.keys import ApiKeys


def authorize(scope: Scope, keys: ApiKeys) -> None:
    """Set the client of the request's context. Raises AuthenticationError if keys are required and
    the request has none of them."""
    if not keys.required:
        return
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    if not given:
        raise AuthenticationError("Missing API key; send it as `Authorization: Bearer KEY`.")
    client = keys.find(given.strip(" \t").encode("latin-1"))  # the bytes that were sent
    if scheme.lower() != "bearer" or client is None:
        raise AuthenticationError("The API key is not one of this server's.")
    context_of(scope).client = client


def asker_of(request: Request) -> tuple[str, str]:
    """Who sends the request: the owner of its key, without keys its address."""
    owner = owner_of(request)
    if owner is not None:
        return "key", owner
    return "address", request.client.host if request.client is not None else ""


def owner_of(request: Request) -> str | None:
    """What the client's jobs are stored under; None without keys."""
    client = context_of(request.scope).client
    return None if client is None else client.owner
