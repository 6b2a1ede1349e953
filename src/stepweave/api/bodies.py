"""Bodies of requests: they are decoded and spooled to disk as they arrive, and few of the long ones
are in memory at a time."""

from __future__ import annotations

import codecs
import contextlib
import zlib
from collections.abc import AsyncIterator
from tempfile import SpooledTemporaryFile

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from stepweave.api.context import context_of
from stepweave.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    RequestCancelledError,
    UnsupportedEncodingError,
)
from stepweave.threads import on_thread

# bytes of a body beyond which it goes to disk; about what a connection's own buffer takes
SPOOLED = 64 * 1024
TURNS = 8  # long bodies in memory
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


@contextlib.asynccontextmanager
async def whole_body(request: Request, *, text: bool = True) -> AsyncIterator[bytes]:
    """The request's body, for as long as it is needed to be parsed; of a text, without UTF-8's byte
    order mark.

    Raises RequestCancelledError if the client leaves meanwhile.
    """
    with SpooledTemporaryFile(SPOOLED) as file:
        size = 0
        async for chunk in _chunks(request):
            size += len(chunk)
            if size > SPOOLED:
                await on_thread(None, file.write, chunk)
            else:
                file.write(chunk)
        file.seek(0)
        mark = codecs.BOM_UTF8 if text else b""
        if file.read(len(mark)) != mark:
            file.seek(0)
        if size <= SPOOLED:
            yield file.read()
            return
        async with context_of(request.scope).body_turns:
            yield await on_thread(None, file.read)


async def pass_over_body(request: Request) -> None:
    """Read and discard the body. Raises RequestCancelledError if the client leaves meanwhile."""
    async for _ in _chunks(request):
        pass


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise RequestCancelledError("The client left while it sent the body.") from None


def decoded(receive: Receive, scope: Scope, limit: int) -> Receive:
    """A `receive` that gives the body without its Content-Encoding, which is taken off the scope's
    headers.

    It raises BodyTooLargeError as soon as more than `limit` bytes are decoded, and
    InvalidRequestError for what is not encoded as the header says. Raises UnsupportedEncodingError
    for an encoding that is not supported, or for several.
    """
    headers = MutableHeaders(raw=list(scope["headers"]))
    given = ", ".join(headers.getlist("content-encoding"))
    encodings = [
        name for part in given.split(",") if (name := part.strip().lower()) not in ("", "identity")
    ]
    if not encodings:
        return receive
    if len(encodings) > 1 or encodings[0] not in _WINDOWS:
        raise UnsupportedEncodingError(given)
    del headers["content-encoding"]
    scope["headers"] = headers.raw
    return _Decoded(receive, encodings[0], limit)


class _Decoded:
    """A `receive` of what a compressed body holds, in pieces of at most SPOOLED bytes: however well
    it is compressed, no more of it is in memory."""

    def __init__(self, receive: Receive, encoding: str, limit: int) -> None:
        self._receive = receive
        self._encoding = encoding
        self._limit = limit
        self._reader = zlib.decompressobj(_WINDOWS[encoding])
        self._taken = b""  # of the body, not decoded yet
        self._more = False  # whether more comes out without another message
        self._last = False  # whether this was the last message
        self._size = 0  # bytes decoded
        self._begun = False
        self._ended = False

    async def __call__(self) -> Message:
        while not self._ended:
            if not self._more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._taken = message.get("body", b"")
                self._last = not message.get("more_body", False)
            piece = await on_thread(None, self._next_piece)
            self._ended = self._last and not self._more
            if self._ended and not self._reader.eof:
                raise self._wrong("is cut short")
            if piece or self._ended:
                return {"type": "http.request", "body": piece, "more_body": not self._ended}
        return await self._receive()

    def _next_piece(self) -> bytes:
        if self._reader.eof and self._taken:
            if self._encoding == "deflate":
                raise self._wrong("goes on after its end")
            # gzip's may have several members (RFC 1952, 2.2)
            self._reader = zlib.decompressobj(_WINDOWS[self._encoding])
        elif (
            not self._begun
            and self._taken
            and self._encoding == "deflate"
            and not _has_zlib_header(self._taken)
        ):
            self._reader = zlib.decompressobj(-zlib.MAX_WBITS)
        self._begun = self._begun or bool(self._taken)
        try:
            piece = self._reader.decompress(self._taken, SPOOLED)
        except zlib.error:
            message = f"The body is not {self._encoding}, as its content encoding says."
            raise InvalidRequestError(message, code="invalid_encoding") from None
        self._taken = self._reader.unused_data if self._reader.eof else self._reader.unconsumed_tail
        self._more = bool(self._taken) or len(piece) == SPOOLED  # zlib itself may hold back some
        self._size += len(piece)
        if self._size > self._limit:
            raise BodyTooLargeError(self._limit, encoding=self._encoding)
        return piece

    def _wrong(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"The {self._encoding} data of the body {what}.", code="invalid_encoding"
        )


def _has_zlib_header(data: bytes) -> bool:
    """Whether deflated data begins as RFC 1950 has it; some clients send it without (RFC 9110,
    8.4.1.2)."""
    return data[0] & 0x0F == 8 and (len(data) < 2 or int.from_bytes(data[:2]) % 31 == 0)
