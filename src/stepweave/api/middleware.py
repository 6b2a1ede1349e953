"""What every request passes through: ids, the body limit, probes, and errors in the contract's one
shape.

BentoML answers validation errors, unknown routes and its own failures in shapes of its own; here
they all become the contract's. Its native APIs get a body that has been read and validated before,
so that their errors name value and limit.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepweave import __version__
from stepweave.api import disconnect
from stepweave.api.auth import authorize, client_of
from stepweave.api.bentoml_form import stand_in, stand_in_form
from stepweave.api.bodies import WAITING, body_turns, decoded
from stepweave.api.connections import FULL, MALFORMED
from stepweave.api.counting import COUNT, Count
from stepweave.api.csrf import check_site
from stepweave.api.disconnect import has_left
from stepweave.api.native import EDIT, PATHS, READ, check, let_go
from stepweave.api.responses import ERROR_MARK, LEFT, REQUEST_ID, as_stepweave_error, error_response
from stepweave.api.targets import (
    has_two_lengths,
    is_of_the_server,
    normalize_path,
    take_forwarded_client,
    to_origin_form,
)
from stepweave.api.triton import unsupported
from stepweave.errors import (
    BodyTooLarge,
    Cancelled,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
    StepweaveError,
)
from stepweave.serving.drain import Drain
from stepweave.serving.server import Server

logger = logging.getLogger("stepweave.access")

PROBES = ("/livez", "/healthz", "/readyz")
DRAIN = "/drain"
UNLOGGED = (*PROBES, "/metrics")  # asked for every few seconds
LOGGED_PATH = 200  # characters
KEYLESS = ("/v2/health/live", "/v2/health/ready")  # beside the probes and the drain
UPLOADS = ("/v1/images/edits", "/v1/images/variations", "/edit")
REDIRECTS = (301, 302, 303, 307, 308)
METHODS = ("GET", "POST", "DELETE")
_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# bytes over the limit that are read and thrown away, so that the client reads our 413
_DISCARDED = 64 * 1024 * 1024


class ContractMiddleware:
    """Wraps BentoML's app."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.server = server
        self.app = self._shared(app)
        self.body_turns = body_turns()

    def _shared(self, app: ASGIApp) -> ASGIApp:
        """The app, for pages of the origins that are allowed too."""
        origins = self.server.settings.cors_origins
        if not origins:
            return app
        return CORSMiddleware(
            app, origins, allow_methods=METHODS, allow_headers=["*"], expose_headers=["*"]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope[REQUEST_ID] = request_id
        left: list[bool] = []
        scope[LEFT] = left
        scope[WAITING] = self.body_turns
        count: Count | None = None
        answer = _Answer(scope, send, request_id, left, self.server.leaving)
        full, ambiguous = scope.get("state", {}).get(FULL), has_two_lengths(scope)
        # nobody knows where a body of two lengths ends
        answer.closes = full is not None or ambiguous
        began = time.monotonic()
        try:
            if is_of_the_server(scope):
                await Response(headers={"Allow": ", ".join((*METHODS, "HEAD", "OPTIONS"))})(
                    scope, receive, answer
                )
                return
            to_origin_form(scope)
            normalize_path(scope, self.server.settings)
            count = scope[COUNT] = Count(scope, self.server.metrics)
            if self.server.settings.trust_forwarded:
                take_forwarded_client(scope)
            if ambiguous:
                raise InvalidRequest(
                    "The request has both Content-Length and Transfer-Encoding; send one of them.",
                    code="ambiguous_length",
                )
            check_site(scope, self.server.settings)
            if scope["path"] in PROBES:
                await self._probe(scope)(scope, receive, answer)
                return
            if scope["path"] == DRAIN:
                await self._drain(scope)(scope, receive, answer)
                return
            if full is not None:
                raise full
            if scope["path"] not in KEYLESS and not _is_preflight(scope):
                authorize(scope, self.server.keys)
            limit = self._limit(scope["path"])
            receive = _limited(receive, scope, limit, answer)
            if scope["method"] == "POST":
                receive = decoded(receive, scope, limit)
            if scope["method"] == "POST" and scope["path"] in PATHS:
                receive = await self._checked(scope, receive)
            await self.app(scope, receive, answer)
        except Exception as error:
            answer_with = self._shared(
                error_response(as_stepweave_error(error, request_id), scope["path"])
            )
            if not answer.started:
                await answer_with(scope, receive, answer)
        finally:
            let_go(scope)
            status = 499 if left else answer.status if answer.whole else 500
            if MALFORMED in scope:
                status = InvalidRequest.status
            if count is not None:
                count.close(status, client_of(scope))
            if scope["path"] not in UNLOGGED:
                milliseconds = 1000 * (time.monotonic() - began)
                path = quote(scope["path"])[:LOGGED_PATH]  # which may hold line ends
                logger.info(
                    "%s %s %d %.0f ms, request %s",
                    scope["method"],
                    path,
                    status,
                    milliseconds,
                    request_id,
                )

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
        if not self.server.alive() or (path == "/readyz" and status.stage != "ready"):
            return error_response(self.server.unavailable(), path, **state)
        return JSONResponse(state)

    def _drain(self, scope: Scope) -> JSONResponse:
        """Only for who bears the token of the state directory, as a pod's preStop hook does. Others
        find no such route.

        From where a request comes proves nothing: a proxy, or a tunnel, beside the server calls
        from its machine, too.
        """
        token = self.server.drain_token
        if token is None or not token.matches(Headers(scope=scope).get("authorization", "")):
            raise NotFound(f"There is no route {DRAIN!r}.")
        if scope["method"] == "POST":
            self.server.drain()
        elif scope["method"] == "DELETE":
            self.server.take_back_drain()
        else:
            return _not_allowed(scope, "POST or DELETE", "POST, DELETE")
        status = self.server.health()
        return JSONResponse({"stage": status.stage, "in_flight": len(self.server.tickets)})

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Have the body of a native API read and checked, and return a `receive` that gives BentoML
        a short one instead."""
        await check(Request(scope, receive), self.server)
        if EDIT in scope:
            return stand_in_form(scope, receive)
        return stand_in(
            scope,
            receive,
            "application/json",
            scope[READ].model_dump_json(exclude_unset=True).encode(),
        )


def _not_allowed(scope: Scope, use: str, allow: str) -> JSONResponse:
    response = error_response(
        MethodNotAllowed(f"{scope['method']} is not allowed on {scope['path']}; use {use}.")
    )
    response.headers["Allow"] = allow
    return response


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what it may send (Fetch, 4.8), which it does without keys."""
    return scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def _limited(receive: Receive, scope: Scope, limit: int, answer: _Answer) -> Receive:
    """A `receive` that raises BodyTooLarge once the body is over the limit, and Cancelled if the
    client stops sending it, or sends it drop by drop. The answer is told once the body has been
    read."""
    declared = Headers(scope=scope).get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:  # before a place is taken for it
        raise BodyTooLarge(limit, int(declared))
    seen = 0
    complete = False
    began: float | None = None

    async def following() -> Message:
        nonlocal complete, seen, began
        if complete:
            return await receive()
        began = began or time.monotonic()
        stalled = disconnect.STALLED_SECONDS
        left = began + stalled + seen / disconnect.LEAST_BYTES - time.monotonic()
        try:
            async with asyncio.timeout(min(stalled, left)):
                message = await receive()
        except TimeoutError:
            raise Cancelled(
                f"The body came too slowly: {seen} bytes in {time.monotonic() - began:.0f} s. At "
                f"least "
                f"{disconnect.LEAST_BYTES} bytes a second must come, and some within {stalled:g} s."
            ) from None
        complete = not message.get("more_body", False)
        seen += len(message.get("body", b""))
        if complete:
            answer.receive = receive
        return message

    async def limited() -> Message:
        message = await following()
        if seen > limit:
            while (
                message["type"] == "http.request"
                and message.get("more_body", False)
                and seen < _DISCARDED
            ):
                message = await following()
            raise BodyTooLarge(limit)
        return message

    return limited


class _Answer:
    """A `send` that adds the headers of every answer and gives errors the contract's shape.

    Raises Cancelled if the client does not read.
    """

    def __init__(
        self, scope: Scope, send: Send, request_id: str, left: list[bool], leaving: Drain
    ) -> None:
        self.scope = scope
        self.leaving = leaving
        self.send = send
        self.request_id = request_id
        self.left = left  # to which it is added that the client left before the answer's end
        self.receive: Receive | None = None  # once the body has been read
        self.started = False
        self.replaced = False
        self.closes = False  # the connection
        self.status = 0  # of the answer, once it has begun
        self.whole = False  # once it has been sent to its end

    async def __call__(self, message: Message) -> None:
        if self.replaced:
            return
        if message["type"] == "http.response.start":
            self.started, status = True, message["status"]
            # no route of ours redirects: it would lead to whatever host the request names
            self.status = status = 404 if status in REDIRECTS else status
            if self.receive is not None and await has_left(self.receive):
                self.left.append(True)
            headers = MutableHeaders(scope=message)
            if status >= 400 and ERROR_MARK not in headers:
                await self._replace(status, headers)
                return
            self._complete(headers)
        try:
            async with asyncio.timeout(disconnect.STALLED_SECONDS):
                await self.send(message)
        except TimeoutError:
            self.left.append(True)
            raise Cancelled(
                f"The client read nothing for {disconnect.STALLED_SECONDS:g} s."
            ) from None
        except OSError:  # of the connection
            self.left.append(True)
            raise Cancelled("The client left.") from None
        self.whole = message["type"] == "http.response.body" and not message.get("more_body", False)

    def _complete(self, headers: MutableHeaders) -> None:
        headers["X-Request-ID"] = self.request_id
        headers["Server"] = f"stepweave/{__version__}"
        del headers[ERROR_MARK]
        if self.closes or self.leaving.announced:  # then clients are to connect to another server
            headers["Connection"] = "close"

    async def _replace(self, status: int, headers: MutableHeaders) -> None:
        self.replaced = True
        response = error_response(self._error_for(status), self.scope["path"])
        response.status_code = status
        self._complete(response.headers)
        for name, value in headers.items():
            if name in ("allow", "vary") or name.startswith("access-control-"):
                response.headers[name] = value
        await self.send(
            {"type": "http.response.start", "status": status, "headers": response.raw_headers}
        )
        await self.send({"type": "http.response.body", "body": bytes(response.body)})
        self.whole = True

    def _error_for(self, status: int) -> StepweaveError:
        method, path = self.scope["method"], self.scope["path"]
        known: dict[int, Callable[[], StepweaveError]] = {
            404: lambda: unsupported(path) or NotFound(f"There is no route {path[:200]!r}."),
            405: lambda: (
                unsupported(path) or MethodNotAllowed(f"{method} is not allowed on {path[:200]}.")
            ),
        }
        if status in known:
            return known[status]()
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else f"Status {status}"
        if status < 500:
            return RequestError(f"{phrase}.", code=phrase.lower().replace(" ", "_"))
        return StepweaveError(f"{phrase}. Request id: {self.request_id}", code="internal_error")
