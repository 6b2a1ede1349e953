"""Work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive
from uvicorn.protocols.http.flow_control import FlowControl

from stepweave.errors import Cancelled

STALLED_SECONDS = 60.0  # that a client may take for the next message of an answer, or of its body
STALLED_BYTES = 256 * 1024  # that a client reads meanwhile of what it was sent, if there is as much

T = TypeVar("T")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if the client leaves first, cancel it and raise Cancelled. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watcher.result()  # raises if what the client sends is wrong
            raise Cancelled("The client left.")
        return task.result()
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
                await asyncio.wait({pending})
            if not pending.cancelled():
                pending.exception()  # has been told of, or is of a client that has its answer


async def read_body(request: Request) -> bytes:
    """The request's body. Raises Cancelled if the client leaves meanwhile."""
    try:
        return await request.body()
    except ClientDisconnect:
        raise Cancelled("The client left while it sent the body.") from None


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
    return not asking.cancelled() and asking.exception() is None and asking.result()["type"] == "http.disconnect"


def abort_stalled_connections() -> None:
    """Have uvicorn abort the connection of a client that does not read what it is sent.

    An app cannot: uvicorn takes a whole picture at once, holds it for as long as the client likes, and does not even close the
    connection before it has been read.
    """
    for name in ("h11_impl", "httptools_impl"):
        with contextlib.suppress(ImportError):  # of httptools, which is optional
            vars(importlib.import_module(f"uvicorn.protocols.http.{name}"))["FlowControl"] = ImpatientFlowControl


class ImpatientFlowControl(FlowControl):
    """Aborts the connection once a full buffer has not been read for a while."""

    _timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:  # also when the connection is lost
        super().resume_writing()
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        left = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(STALLED_SECONDS, self._look, left)

    def _look(self, before: int) -> None:
        if before - self._transport.get_write_buffer_size() < STALLED_BYTES:
            self._transport.abort()
        else:
            self._watch()
