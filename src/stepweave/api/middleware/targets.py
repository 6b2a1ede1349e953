"""The path, host and client of a request, whichever form its target has (RFC 9112, 3.2), and
whatever proxies add."""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepweave.api.middleware.base import METHODS, Middleware
from stepweave.api.urls import configured_prefix
from stepweave.config import Settings
from stepweave.errors import InvalidRequestError, NotFoundError, shown

_ABSOLUTE = re.compile(r"https?://(?P<host>[^/?#@]+)(?P<path>/[^?#]*)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Targets(Middleware):
    """Has the scope name the path of a route, its host and its client, and answers `OPTIONS *`,
    which asks about the server as a whole."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) == ("OPTIONS", "*"):
            allowed = Response(headers={"Allow": ", ".join((*METHODS, "HEAD", "OPTIONS"))})
            await allowed(scope, receive, send)
            return
        to_origin_form(scope)
        normalize_path(scope, self.server.settings)
        if self.server.settings.trust_forwarded:
            take_forwarded_client(scope)
        await self.app(scope, receive, send)


def to_origin_form(scope: Scope) -> None:
    """Have the scope's path begin with a slash, and its Host be that of the target.

    Raises InvalidRequestError for a target that names no path, and NotFoundError for a path with
    control characters.
    """
    if _CONTROL.search(scope["path"]):  # patterns of routes take a line end for the end of a path
        raise NotFoundError(f"There is no route {shown(scope['path'])}.")
    if scope["path"].startswith("/"):
        return
    target = scope.get("raw_path", b"").decode("latin-1")
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise InvalidRequestError(
            f"The request's target is {shown(target)}; send a path.", code="invalid_target"
        )
    _set_path(scope, absolute["path"] or "/")
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["Host"] = absolute["host"]
    scope["headers"] = headers.raw


def normalize_path(scope: Scope, settings: Settings) -> None:
    """Take the path of STEPWEAVE_BASE_URL off the request's, which some proxies leave on, and a
    slash off its end.

    For the latter Starlette would redirect to whatever host the request names.
    """
    prefix = configured_prefix(settings)
    raw = scope.get("raw_path", b"").decode("latin-1") or scope["path"]
    path = raw.removeprefix(prefix) if raw == prefix or raw.startswith(f"{prefix}/") else raw
    path = path.rstrip("/") or "/"
    if path != raw:
        _set_path(scope, path)


def take_forwarded_client(scope: Scope) -> None:
    """Have the scope's client be the last of X-Forwarded-For: each proxy appends the address that
    it sees."""
    given = ",".join(Headers(scope=scope).getlist("x-forwarded-for")).rpartition(",")[2].strip()
    if given:
        scope["client"] = (given, 0)


def _set_path(scope: Scope, path: str) -> None:
    scope["raw_path"] = path.encode("latin-1")
    scope["path"] = unquote(path)
