"""What every request passes through: ids, the body limit, probes, and errors in the contract's one shape.

BentoML answers validation errors, unknown routes and its own failures in shapes of its own; here they all become the
contract's. Its native APIs get a body that has been read and validated before, so that their errors name value and limit.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepweave import __version__
from stepweave.api import disconnect
from stepweave.api.auth import authorize
from stepweave.api.cross_site import check_site
from stepweave.api.native import EDIT, PATHS, check
from stepweave.api.responses import ERROR_MARK, LEFT, REQUEST_ID, as_stepweave_error, error_response
from stepweave.api.stand_in import stand_in
from stepweave.errors import BodyTooLarge, Cancelled, MethodNotAllowed, NotFound, RequestError, StepweaveError
from stepweave.server import Server

logger = logging.getLogger("stepweave.access")

PROBES = ("/livez", "/healthz", "/readyz")
DRAIN = "/drain"
UNLOGGED = (*PROBES, "/metrics")  # asked for every few seconds
LOGGED_PATH = 200  # characters
KEYLESS = ("/v2/health/live", "/v2/health/ready")  # beside the probes and the drain
UPLOADS = ("/v1/images/edits", "/edit")
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")  # less what proxies beside a server call from, as 127.0.0.6
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via", "origin")
METHODS = ("GET", "POST", "DELETE")
_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_DISCARDED = 64 * 1024 * 1024  # bytes over the limit that are read and thrown away, so that the client reads our 413


class ContractMiddleware:
    """Wraps BentoML's app."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.server = server
        self.app = self._shared(app)

    def _shared(self, app: ASGIApp) -> ASGIApp:
        """The app, for pages of the origins that are allowed too."""
        origins = self.server.settings.cors_origins
        if not origins:
            return app
        return CORSMiddleware(app, origins, allow_methods=METHODS, allow_headers=["*"], expose_headers=["*"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope[REQUEST_ID] = request_id
        left: list[bool] = []
        scope[LEFT] = left
        answer = _Answer(scope, send, request_id)
        began = time.monotonic()
        try:
            check_site(scope, self.server.settings)
            if scope["path"] in PROBES:
                await self._probe(scope)(scope, receive, answer)
                return
            if scope["path"] == DRAIN:
                await self._drain(scope)(scope, receive, answer)
                return
            if scope["path"] not in KEYLESS and not _is_preflight(scope):
                authorize(scope, self.server.settings.api_keys)
            receive = _limited(receive, scope, self._limit(scope["path"]))
            if scope["method"] == "POST" and scope["path"] in PATHS:
                with self.server.metrics.counted():
                    receive = await self._checked(scope, receive)
            await self.app(scope, receive, answer)
        except Exception as error:
            answer_with = self._shared(error_response(as_stepweave_error(error, request_id)))
            if not answer.started:
                await answer_with(scope, receive, answer)
        finally:
            if scope["path"] not in UNLOGGED:
                status = 499 if left else answer.status
                milliseconds = 1000 * (time.monotonic() - began)
                path = quote(scope["path"])[:LOGGED_PATH]  # which may hold line ends
                logger.info("%s %s %d %.0f ms, request %s", scope["method"], path, status, milliseconds, request_id)

    def _limit(self, path: str) -> int:
        settings = self.server.settings
        return settings.max_upload_bytes if path in UPLOADS else settings.max_body_bytes

    def _probe(self, scope: Scope) -> JSONResponse:
        """Answered from memory alone, never waiting for the device."""
        path = scope["path"]
        if scope["method"] not in ("GET", "HEAD"):
            return _not_allowed(scope, "GET", "GET, HEAD")
        status = self.server.health()
        jobs = self.server.jobs
        state = {
            "stage": status.stage,
            "progress": status.progress,
            "message": status.message,
            "store": None if jobs is None else jobs.problem,
        }
        # a server that cannot load its model never will, nor does a stuck engine move again: let the kubelet restart it
        if status.stage in ("failed", "stuck") or (path == "/readyz" and status.stage != "ready"):
            return error_response(self.server.unavailable(), **state)
        return JSONResponse(state)

    def _drain(self, scope: Scope) -> JSONResponse:
        """Only for who is on this machine, as a pod's preStop hook is, and is no proxy. Others find no such route."""
        headers = Headers(scope=scope)
        client = (scope.get("client") or ("", 0))[0]
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
        except ValueError:
            host = None
        # nor for a page in a browser here, which may post anywhere
        forwarded = any(name in FORWARDED or name.startswith(("x-envoy-", "sec-fetch-")) for name in headers)
        if client not in LOOPBACK or host not in (*LOOPBACK, "localhost") or forwarded:
            raise NotFound(f"There is no route {DRAIN!r}.")
        if scope["method"] != "POST":
            return _not_allowed(scope, "POST", "POST")
        self.server.drain()
        status = self.server.health()
        return JSONResponse({"stage": status.stage, "in_flight": len(self.server.tickets)})

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Have the body of a native API read and checked, and return a `receive` that gives it once more."""
        messages: list[Message] = []

        async def kept() -> Message:
            message = await receive()
            messages.append(message)
            return message

        await check(Request(scope, kept), self.server)
        if EDIT in scope:
            return stand_in(scope, receive)

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        return again


def _not_allowed(scope: Scope, use: str, allow: str) -> JSONResponse:
    response = error_response(MethodNotAllowed(f"{scope['method']} is not allowed on {scope['path']}; use {use}."))
    response.headers["Allow"] = allow
    return response


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what it may send (Fetch, 4.8), which it does without keys."""
    return scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def _limited(receive: Receive, scope: Scope, limit: int) -> Receive:
    """A `receive` that raises BodyTooLarge once the body is over the limit, and Cancelled if the client stops sending it."""
    declared = Headers(scope=scope).get("content-length", "0")
    seen = 0
    complete = False

    async def following() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout(disconnect.STALLED_SECONDS):
                message = await receive()
        except TimeoutError:
            raise Cancelled(f"Nothing more of the body came for {disconnect.STALLED_SECONDS:g} s.") from None
        complete = not message.get("more_body", False)
        return message

    async def limited() -> Message:
        nonlocal seen
        message = await following()
        seen += len(message.get("body", b""))
        if seen > limit or (declared.isdecimal() and int(declared) > limit):
            while message["type"] == "http.request" and message.get("more_body", False) and seen < _DISCARDED:
                message = await following()
                seen += len(message.get("body", b""))
            raise BodyTooLarge(limit, int(declared) if declared.isdecimal() and int(declared) > limit else None)
        return message

    return limited


class _Answer:
    """A `send` that adds the headers of every answer and gives errors the contract's shape.

    Raises Cancelled if the client does not read.
    """

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.scope = scope
        self.send = send
        self.request_id = request_id
        self.started = False
        self.replaced = False
        self.status = 0  # of the answer, once it has begun

    async def __call__(self, message: Message) -> None:
        if self.replaced:
            return
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            if message["status"] >= 400 and ERROR_MARK not in headers:
                await self._replace(message["status"], headers)
                return
            self._complete(headers)
        try:
            async with asyncio.timeout(disconnect.STALLED_SECONDS):
                await self.send(message)
        except TimeoutError:
            raise Cancelled(f"The client read nothing for {disconnect.STALLED_SECONDS:g} s.") from None

    def _complete(self, headers: MutableHeaders) -> None:
        headers["X-Request-ID"] = self.request_id
        headers["Server"] = f"stepweave/{__version__}"
        del headers[ERROR_MARK]

    async def _replace(self, status: int, headers: MutableHeaders) -> None:
        self.replaced = True
        response = error_response(self._error_for(status))
        response.status_code = status
        self._complete(response.headers)
        for name, value in headers.items():
            if name in ("allow", "vary") or name.startswith("access-control-"):
                response.headers[name] = value
        await self.send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await self.send({"type": "http.response.body", "body": bytes(response.body)})

    def _error_for(self, status: int) -> StepweaveError:
        method, path = self.scope["method"], self.scope["path"]
        known: dict[int, Callable[[], StepweaveError]] = {
            404: lambda: NotFound(f"There is no route {path[:200]!r}."),
            405: lambda: MethodNotAllowed(f"{method} is not allowed on {path[:200]}."),
        }
        if status in known:
            return known[status]()
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else f"Status {status}"
        if status < 500:
            return RequestError(f"{phrase}.", code=phrase.lower().replace(" ", "_"))
        return StepweaveError(f"{phrase}. Request id: {self.request_id}", code="internal_error")
