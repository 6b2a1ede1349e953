"""How long a body may be, and how slowly it may come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from stepweave.api import disconnect
from stepweave.config import Settings
from stepweave.errors import BodyTooLargeError, RequestCancelledError

UPLOADS = ("/v1/images/edits", "/v1/images/variations", "/edit")
# bytes over the limit that are read and thrown away, so that the client reads our 413
_DISCARDED = 64 * 1024 * 1024


def limit_of(path: str, settings: Settings) -> int:
    """Bytes that a body sent to a path may have."""
    return settings.max_upload_bytes if path in UPLOADS else settings.max_body_bytes


def limited_body(
    receive: Receive, scope: Scope, limit: int, on_whole: Callable[[Receive], None]
) -> Receive:
    """A `receive` that raises BodyTooLargeError once the body is over the limit, and
    RequestCancelledError if the client stops sending it, or sends it drop by drop. `on_whole` is
    called with the `receive` beneath once the body has been read.
    """
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
                f"least {disconnect.LEAST_BYTES} bytes a second must come, and some within "
                f"{stalled:g} s."
            ) from None
        complete = not message.get("more_body", False)
        seen += len(message.get("body", b""))
        if complete:
            on_whole(receive)
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
