"""Bodies of requests: on their way they spool to disk, and few of the long ones are in memory at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from tempfile import SpooledTemporaryFile

from starlette.requests import ClientDisconnect, Request

from stepweave.errors import Cancelled
from stepweave.threads import on_thread

SPOOLED = 64 * 1024  # bytes of a body beyond which it goes to disk; about what a connection's own buffer takes
TURNS = 8  # long bodies in memory
WAITING = "stepweave.bodies"  # key in the ASGI scope: the semaphore of long bodies


def body_turns() -> asyncio.Semaphore:
    """What the long bodies of one server take turns by."""
    return asyncio.Semaphore(TURNS)


@contextlib.asynccontextmanager
async def whole_body(request: Request) -> AsyncIterator[bytes]:
    """The request's body, for as long as it is needed to be parsed. Raises Cancelled if the client leaves meanwhile."""
    with SpooledTemporaryFile(SPOOLED) as file:
        size = 0
        async for chunk in _chunks(request):
            size += len(chunk)
            if size > SPOOLED:
                await on_thread(None, file.write, chunk)
            else:
                file.write(chunk)
        file.seek(0)
        if size <= SPOOLED:
            yield file.read()
            return
        async with request.scope[WAITING]:
            yield await on_thread(None, file.read)


async def pass_over_body(request: Request) -> None:
    """Read the body and forget it. Raises Cancelled if the client leaves meanwhile."""
    async for _ in _chunks(request):
        pass


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise Cancelled("The client left while it sent the body.") from None
