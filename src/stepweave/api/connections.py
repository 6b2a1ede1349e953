"""The connections of uvicorn: limits of their number, of how long they may send nothing, and of
what they may leave unread.

An app cannot do that: uvicorn keeps a connection that sends no request for ever, buffers a whole
image at once for as long as the client does not read it, and does not even close the connection
before. Its own limits count all connections, those of probes too, and its refusals have another
shape.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import h11
import wrapt
from starlette.types import Scope
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepweave.api import disconnect
from stepweave.errors import InvalidRequestError, StepweaveError, UnavailableError
from stepweave.serving.resources import Error

logger = logging.getLogger(__name__)

# for a request's head, from when the client connects, or begins the next one
HEAD_SECONDS = 20.0
# how long a connection is kept between two requests: longer than by proxies, so that they close
# first
KEPT_SECONDS = 75.0
# how long a client may go on sending a body once it has its answer, before the connection is closed
LINGER_SECONDS = 10.0
IDLE_SECONDS = 1.0  # after which a connection without a request counts as idle
LOOK_SECONDS = 0.25  # between two looks for idle connections, while the server leaves
# connections over the limit that are read, so that probes are answered and others refused in the
# contract's shape
RESERVE = 64
CROWD_SECONDS = 1.0  # for a client on a connection beyond these to read the refusal
UNREAD_BYTES = 512 * 1024 * 1024  # of answers that clients have not read, over all connections
FILES = 256  # that a process opens besides connections
# key in the ASGI scope: the request's body was not HTTP, and is answered with 400
MALFORMED = "stepweave.malformed"
FULL = "stepweave.full"  # key in the ASGI scope's state: the connection is over the limit
# of uvicorn: addresses whose X-Forwarded-* headers it trusts
FORWARDED_ALLOW_IPS = "FORWARDED_ALLOW_IPS"


class Connections:
    """The open connections of one process, at most `limit`.

    Beyond the limit, a new one replaces the one that has waited longest for a whole request; if
    none has waited for a second, all but probes are answered with 503 on it. Unread answers are
    limited in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = _limit(limit)
        self._open: set[Connection] = set()
        self._evicted: set[Connection] = set()  # which end once the client has read what was sent
        self._closing: asyncio.TimerHandle | None = None

    def install(self) -> None:
        """Have uvicorn serve each connection by `Connection`, and leave `X-Forwarded-*` headers to
        the server's own setting."""
        auto.AutoHTTPProtocol = functools.partial(Connection, self)  # type: ignore[assignment]
        os.environ[FORWARDED_ALLOW_IPS] = ""

    def close_idle(self, wanted: bool) -> None:
        """From now on close each connection that is or becomes idle; or no longer do so."""
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if wanted:
            self._close_idle()

    def _close_idle(self) -> None:
        for connection in list(self._open):
            if connection.idle_seconds >= IDLE_SECONDS:
                connection.shutdown()
        self._closing = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._close_idle)

    def enter(self, connection: Connection) -> StepweaveError | None:
        """Take a connection; the reason if it is over the limit."""
        error = None
        if len(self._open) >= self.limit:
            longest = max(self._open, key=lambda connection: connection.waiting_seconds)
            if longest.waiting_seconds >= IDLE_SECONDS:
                self._open.discard(longest)
                self._evicted.add(longest)
                longest.shutdown()
            else:
                message = f"{len(self._open)} connections are open; the limit is {self.limit}."
                error = UnavailableError(message, code="too_many_connections", retry_after=1)
        self._open.add(connection)
        return error

    def bound_unread(self) -> None:
        """Abort the connections that have not read their answers for longest, until all unread
        answers are within the limit."""
        stalled = sorted(
            (connection for connection in self._all if connection.flow.write_paused),
            key=lambda connection: connection.flow.paused_at,
        )
        left = self.unread
        for connection in stalled:
            if left <= UNREAD_BYTES:
                break
            left -= connection.transport.get_write_buffer_size()
            connection.transport.abort()

    @property
    def unread(self) -> int:
        """Bytes of answers that clients have not read, and the kernel has not taken."""
        return sum(connection.transport.get_write_buffer_size() for connection in self._all)

    def leave(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._evicted.discard(connection)

    @property
    def _all(self) -> set[Connection]:
        return self._open | self._evicted

    @property
    def crowded(self) -> bool:
        """Whether there are too many even to be refused one by one."""
        return len(self._open) + len(self._evicted) > self.limit + RESERVE

    @property
    def overrun(self) -> bool:
        """Whether there are too many to be refused at all."""
        return len(self._open) + len(self._evicted) > self.limit + 4 * RESERVE


def refusal_of(scope: Scope) -> StepweaveError | None:
    """Why a request is refused, if its connection is over the limit."""
    refusal: StepweaveError | None = scope.get("state", {}).get(FULL)
    return refusal


class Connection(H11Protocol):
    """One of them."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connections = connections
        self._waiting_since = time.monotonic()  # for a request
        self._head_timer: asyncio.TimerHandle | None = None
        self.lingers = False
        self.timeout_keep_alive = int(KEPT_SECONDS)
        self.ws_protocol_class = None  # no route uses WebSockets

    @property
    def waiting_seconds(self) -> float:
        """For how long it has waited for the whole head of a request; 0 while the client has yet to
        read an answer."""
        if not self._waits or self.lingers or self.transport.get_write_buffer_size():
            return 0.0
        return time.monotonic() - self._waiting_since

    @property
    def idle_seconds(self) -> float:
        """The same, but 0 once a part of the head has arrived."""
        return 0.0 if self._head_begun else self.waiting_seconds

    @property
    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _head_begun(self) -> bool:
        return bool(self.conn.trailing_data[0])

    @property
    def _kept(self) -> bool:
        """Whether it waits for a further request, of which nothing has come."""
        between = self.cycle is not None and self.conn.their_state is h11.IDLE
        return between and self._waits and not self._head_begun and not self.lingers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = _Transport(transport, self)  # type: ignore[assignment]  # it has all of one
        fills = self._connections.bound_unread
        self.flow: ImpatientFlowControl = ImpatientFlowControl(transport, fills)
        error = self._connections.enter(self)
        if error is not None:
            self.app_state = {**self.app_state, FULL: error}
        if self._connections.overrun:
            self.transport.abort()
        elif error is not None and self._connections.crowded:
            self._answer(error)
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.leave(self)
        self.lingers = True  # there is nothing to close any more
        self._stop_expecting()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.lingers:
            return
        if self._waits:
            self._expect_head()
        super().data_received(data)
        self._look()
        if self._kept:  # what came was the rest of a body that was answered already
            self._stop_expecting()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        self._waiting_since = time.monotonic()
        super().on_response_complete()  # which begins with the next request, if it is there
        self._look()
        if self._waits and self._head_begun:
            self._expect_head()

    def ends_early(self) -> bool:
        """Whether the client still sends the body of a request that has been answered."""
        return (
            self.conn.their_state is h11.SEND_BODY
            and not self.lingers
            and self.transport.can_write_eof()
        )

    def linger(self, seconds: float | None = None) -> None:
        """Send no more, but read on: if it were closed at once, the connection would be reset, and
        the client would not see its answer."""
        self.lingers = True
        self._stop_expecting()
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS if seconds is None else seconds, self.transport.abort)

    def _look(self) -> None:
        if not self._waits:
            self._stop_expecting()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_expecting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """To what is not HTTP, also in the middle of a body."""
        if self.cycle is not None and not self._waits:
            self.cycle.scope[MALFORMED] = True  # type: ignore[literal-required]
        self._answer(
            InvalidRequestError("What was sent is not an HTTP request.", code="invalid_http")
        )

    def _answer(self, error: StepweaveError) -> None:
        """Answer and close, without a request that has been read."""
        self._stop_expecting()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else another answer is under way
            body = Error.of(error).to_json()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            if error.retry_after is not None:
                headers.append(("Retry-After", str(error.retry_after)))
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof() and not self.lingers:
            self.linger(CROWD_SECONDS)
        else:
            self.transport.close()


class _Transport(wrapt.ObjectProxy[asyncio.Transport]):
    """A connection's transport, which lingers where closing would be too early."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__(transport)
        self._self_connection = connection

    def close(self) -> None:
        if self._self_connection.ends_early():
            self._self_connection.linger()
        else:
            self.__wrapped__.close()

    def is_closing(self) -> bool:
        return self._self_connection.lingers or bool(self.__wrapped__.is_closing())


class ImpatientFlowControl(FlowControl):
    """Aborts the connection once a full buffer has not been read for a while. `fills` is called
    when one is full."""

    _timer: asyncio.TimerHandle | None = None

    def __init__(self, transport: asyncio.Transport, fills: Callable[[], None]) -> None:
        super().__init__(transport)
        self.paused_at = 0.0  # in seconds of the monotonic clock
        self._fills = fills

    def pause_writing(self) -> None:
        super().pause_writing()
        self.paused_at = time.monotonic()
        self._watch()
        self._fills()

    def resume_writing(self) -> None:  # also when the connection is lost
        super().resume_writing()
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        left, loop = self._transport.get_write_buffer_size(), asyncio.get_running_loop()
        self._timer = loop.call_later(disconnect.STALLED_SECONDS, self._look, left)

    def _look(self, before: int) -> None:
        if before - self._transport.get_write_buffer_size() < disconnect.STALLED_BYTES:
            self._transport.abort()
        else:
            self._watch()


def _limit(wanted: int) -> int:
    """The number of connections that this process may have, after raising its own limit of open
    files as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVE + FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            logger.warning(
                "STEPWEAVE_MAX_CONNECTIONS=%d: this process may only open %d files", wanted, soft
            )
            return max(1, soft - RESERVE - FILES)
    return wanted
