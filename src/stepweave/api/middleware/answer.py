"""Every answer: whether the client gets it, its headers, and errors in the contract's shape."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepweave import __version__
from stepweave.api import disconnect
from stepweave.api.connections import refusal_of
from stepweave.api.context import context_of
from stepweave.api.disconnect import has_left
from stepweave.api.middleware.base import METHODS, Middleware
from stepweave.api.middleware.body_limit import has_two_lengths
from stepweave.api.open_inference.triton import unsupported
from stepweave.api.responses import ERROR_MARK, as_stepweave_error, error_response
from stepweave.errors import (
    MethodNotAllowedError,
    NotFoundError,
    RequestCancelledError,
    RequestError,
    StepweaveError,
)
from stepweave.serving.server import Server

REDIRECTS = (301, 302, 303, 307, 308)


class Delivery(Middleware):
    """Notes the answer's status and end, and whether the client left before.

    The app's `send` raises RequestCancelledError once the client has left, or reads nothing.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)

        async def deliver(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                if context.rest is not None and await has_left(context.rest):
                    context.client_left = True
            try:
                async with asyncio.timeout(disconnect.STALLED_SECONDS):
                    await send(message)
            except TimeoutError:
                context.client_left = True
                raise RequestCancelledError(
                    f"The client read nothing for {disconnect.STALLED_SECONDS:g} s."
                ) from None
            except OSError:  # of the connection
                context.client_left = True
                raise RequestCancelledError("The client left.") from None
            context.complete = message["type"] == "http.response.body" and not message.get(
                "more_body", False
            )

        await self.app(scope, receive, deliver)


class AnswerHeaders(Middleware):
    """Adds the request's id and the server's name, and closes connections that must not go on."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # with two lengths, nobody knows where the body ends and the next request begins
        closes = refusal_of(scope) is not None or has_two_lengths(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = context_of(scope).id
                headers["Server"] = f"stepweave/{__version__}"
                if closes or self.server.leaving.announced:  # clients shall go to another server
                    headers["Connection"] = "close"
            await send(message)

        await self.app(scope, receive, with_headers)


class Errors(Middleware):
    """Answers what the app raises, and replaces errors that BentoML and Starlette answer in shapes
    of their own: validation errors, unknown routes, their own failures."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        replaced = False

        async def in_shape(message: Message) -> None:
            nonlocal replaced
            if replaced:
                return  # the body of the error that was replaced
            if message["type"] == "http.response.start":
                # no route of ours redirects: it would lead to whatever host the request names
                status = 404 if message["status"] in REDIRECTS else message["status"]
                headers = MutableHeaders(scope=message)
                if status >= 400 and ERROR_MARK not in headers:
                    replaced = True
                    await _replace(status, headers, scope, receive, send)
                    return
                del headers[ERROR_MARK]
            await send(message)

        try:
            await self.app(scope, receive, in_shape)
        except Exception as error:
            started = bool(context.status)
            if started and isinstance(error.__cause__, StepweaveError):
                error = error.__cause__  # Starlette has wrapped it; it is only logged
            answer = error_response(as_stepweave_error(error, context.id), scope["path"])
            if not started:
                await cross_origin(answer, self.server)(scope, receive, in_shape)


async def _replace(
    status: int, headers: Headers, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer an error of this status, with those headers of the one before that clients need."""
    response = error_response(_error_for(status, scope), scope["path"])
    response.status_code = status
    del response.headers[ERROR_MARK]
    for name, value in headers.items():
        if name in ("allow", "vary") or name.startswith("access-control-"):
            response.headers[name] = value
    await response(scope, receive, send)


def _error_for(status: int, scope: Scope) -> StepweaveError:
    method, path = scope["method"], scope["path"]
    if status in (404, 405) and (reason := unsupported(path)) is not None:
        return reason
    if status == 404:
        return NotFoundError(f"There is no route {path[:200]!r}.")
    if status == 405:
        return MethodNotAllowedError(f"{method} is not allowed on {path[:200]}.")
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else f"Status {status}"
    if status < 500:
        error = RequestError(f"{phrase}.")
        error.code = phrase.lower().replace(" ", "_")
        return error
    return StepweaveError(f"{phrase}. Request id: {context_of(scope).id}", code="internal_error")


def cross_origin(app: ASGIApp, server: Server) -> ASGIApp:
    """The app, with the headers of CORS for the origins of STEPWEAVE_CORS_ORIGINS."""
    origins = server.settings.cors_origins
    if not origins:
        return app
    return CORSMiddleware(
        app, origins, allow_methods=METHODS, allow_headers=["*"], expose_headers=["*"]
    )
