"""What every request passes through, in order."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.api.bodies import TURNS
from stepweave.api.context import CONTEXT, RequestContext
from stepweave.api.middleware.access import authenticate, check_connection
from stepweave.api.middleware.access_log import AccessLog, count, identify
from stepweave.api.middleware.answer import AnswerHeaders, Delivery, Errors, cross_origin
from stepweave.api.middleware.base import Factory, before
from stepweave.api.middleware.body_limit import BodyLimit, check_length
from stepweave.api.middleware.csrf import check_site
from stepweave.api.middleware.native_bodies import NativeBodies
from stepweave.api.middleware.probes import Probes
from stepweave.api.middleware.targets import Targets
from stepweave.serving.server import Server

# from the connection inwards: each is around those that follow
MIDDLEWARE: tuple[Factory, ...] = (
    before(identify),  # first, since the log, the headers and errors have the id
    AccessLog,  # around all that answer: refusals are logged and counted, too
    Delivery,  # notes what is really sent, so it is around all that change answers
    AnswerHeaders,  # around Errors, since errors have these headers, too
    Errors,  # around all that raise
    Targets,  # before whatever looks at the path
    before(count),  # before whatever refuses requests, since these are counted
    before(check_length),  # a proxy may have read another request: nothing in it is believed
    before(check_site),  # before any route that changes something, the drain included
    Probes,  # before the limits: orchestrators have no key, and ask when the server is full, too
    before(check_connection),
    before(authenticate),  # before the body is read
    BodyLimit,
    NativeBodies,  # reads the body, so it is within the limit
    cross_origin,  # for routes; Errors adds it to refusals
)


class ContractMiddleware:
    """All of them, around an app."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.body_turns = asyncio.Semaphore(TURNS)
        self._app = self._http = app
        for middleware in reversed(MIDDLEWARE):
            self._http = middleware(self._http, server)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[CONTEXT] = RequestContext(self.body_turns)
        try:
            await self._http(scope, receive, send)
        finally:  # the context's `rest` holds the scope: a cycle would keep the job's images
            del scope[CONTEXT]
