"""The two forms of middleware."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.serving.server import Server

METHODS = ("GET", "POST", "DELETE")  # of routes; HEAD is answered as GET is
Factory: TypeAlias = Callable[[ASGIApp, Server], ASGIApp]


class Middleware:
    """Pure ASGI middleware for HTTP requests: one concern, around `app`."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app = app
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


def before(step: Callable[[Scope, Server], None]) -> Factory:
    """Middleware that does no more than `step`, before the app; an error refuses the request."""

    def middleware(app: ASGIApp, server: Server) -> ASGIApp:
        async def after(scope: Scope, receive: Receive, send: Send) -> None:
            step(scope, server)
            await app(scope, receive, send)

        return after

    return middleware
