"""Bearer keys (RFC 6750): who may ask, and whose a job is."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from stepweave.errors import Unauthorized

OWNER = "stepweave.owner"  # key in the ASGI scope


def authorize(scope: Scope, keys: Sequence[str]) -> None:
    """Note whose request it is. Raises Unauthorized if keys are set and it bears none of them."""
    if not keys:
        return
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    if not given:
        raise Unauthorized("The request bears no API key; send it as `Authorization: Bearer KEY`.")
    key = given.strip().encode("latin-1")  # the bytes that were sent
    known = [hmac.compare_digest(key, one.encode()) for one in keys]  # all, whichever it is
    if scheme.lower() != "bearer" or not any(known):
        raise Unauthorized("The API key is not one of this server's.")
    scope[OWNER] = hashlib.sha256(key).hexdigest()[:32]


def client_of(request: Request) -> tuple[str, str]:
    """Who asks, as far as the server can tell: the owner of the request's key, without keys its address."""
    owner = owner_of(request)
    if owner is not None:
        return "key", owner
    return "address", request.client.host if request.client is not None else ""


def owner_of(request: Request) -> str | None:
    """A digest of the request's key; None without keys."""
    owner: str | None = request.scope.get(OWNER)
    return owner
