"""How long a body may be, and how slowly it may arrive."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from stepweave.api import disconnect
from stepweave.api.bodies import decoded
from stepweave.api.context import context_of
from stepweave.api.middleware.base import Middleware
from stepweave.errors import BodyTooLargeError, InvalidRequestError, RequestCancelledError
from stepweave.serving.server import Server

UPLOADS = ("/v1/images/edits", "/v1/images/variations", "/edit")
# bytes over the limit that are read and thrown away, so that the client reads our 413
_DISCARDED = 64 * 1024 * 1024


class BodyLimit(Middleware):
    """Bounds the body's length and the time that it takes, and decodes that of a POST, within the
    same limit."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self.server.settings
        uploads = scope["path"] in UPLOADS
        limit = settings.max_upload_bytes if uploads else settings.max_body_bytes
        receive = limited_body(receive, scope, limit)
        if scope["method"] == "POST":
            receive = decoded(receive, scope, limit)
        await self.app(scope, receive, send)


def check_length(scope: Scope, server: Server) -> None:
    """Raise InvalidRequestError (code `ambiguous_length`) for a body that has two."""
    if has_two_lengths(scope):
        raise InvalidRequestError(
            "The request has both Content-Length and Transfer-Encoding; send one of them.",
            code="ambiguous_length",
        )


def has_two_lengths(scope: Scope) -> bool:
    """Whether the body's length is given in two ways, of which a proxy may have used the other (RFC
    9112, 6.1)."""
    headers = Headers(scope=scope)
    return "content-length" in headers and "transfer-encoding" in headers


def limited_body(receive: Receive, scope: Scope, limit: int) -> Receive:
    """A `receive` that raises BodyTooLargeError once the body is over the limit, and
    RequestCancelledError if the client stops sending it, or sends it too slowly."""
    declared = Headers(scope=scope).get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:  # before a place is taken for it
        raise BodyTooLargeError(limit, int(declared))
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
            raise RequestCancelledError(
                f"The body came too slowly: {seen} bytes in {time.monotonic() - began:.0f} s. At "
                f"least {disconnect.LEAST_BYTES} bytes a second must arrive, and some within "
                f"{stalled:g} s."
            ) from None
        complete = not message.get("more_body", False)
        seen += len(message.get("body", b""))
        if complete:
            context_of(scope).rest = receive
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
            raise BodyTooLargeError(limit)
        return message

    return limited
