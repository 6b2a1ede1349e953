"""Work that ends when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Message, Receive

from stepweave.errors import RequestCancelledError

STALLED_SECONDS = 60.0  # at most, for the next message of an answer, or of a body
LEAST_BYTES = 32 * 1024  # of a body, in each second on average
# of an answer that a client must read in that time, if there are as many
STALLED_BYTES = 256 * 1024

T = TypeVar("T")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if the client leaves first, cancel it and raise RequestCancelledError. The
    request's body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watcher.result()  # raises if what the client sends is wrong
            raise RequestCancelledError("The client left.")
        return task.result()
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
                await asyncio.wait({pending})
            if not pending.cancelled():
                pending.exception()  # else asyncio logs that nobody has asked for it


async def disconnected(request: Request) -> None:
    """Return once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def has_left(receive: Receive) -> bool:
    """Whether the client has left already. The request's body must have been read."""
    asking: asyncio.Future[Message] = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({asking}, timeout=0)
    finally:
        if not asking.done():
            asking.cancel()
            await asyncio.wait({asking})
    return (
        not asking.cancelled()
        and asking.exception() is None
        and asking.result()["type"] == "http.disconnect"
    )
