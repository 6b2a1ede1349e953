"""The answer of every request: its headers, and errors of others in the contract's shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from stepweave import __version__
from stepweave.api import disconnect
from stepweave.api.disconnect import has_left
from stepweave.api.open_inference.triton import unsupported
from stepweave.api.responses import ERROR_MARK, error_response
from stepweave.errors import (
    MethodNotAllowedError,
    NotFoundError,
    RequestCancelledError,
    RequestError,
    StepweaveError,
)
from stepweave.serving.drain import Drain

REDIRECTS = (301, 302, 303, 307, 308)


class ContractSend:
    """A `send` that adds the headers of every answer and gives errors the contract's shape.

    Raises RequestCancelledError if the client does not read.
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

    def body_read(self, receive: Receive) -> None:
        """The body has been read: what `receive` gives from now on tells that the client left."""
        self.receive = receive

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
            raise RequestCancelledError(
                f"The client read nothing for {disconnect.STALLED_SECONDS:g} s."
            ) from None
        except OSError:  # of the connection
            self.left.append(True)
            raise RequestCancelledError("The client left.") from None
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
            404: lambda: unsupported(path) or NotFoundError(f"There is no route {path[:200]!r}."),
            405: lambda: (
                unsupported(path)
                or MethodNotAllowedError(f"{method} is not allowed on {path[:200]}.")
            ),
        }
        if status in known:
            return known[status]()
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else f"Status {status}"
        if status < 500:
            error = RequestError(f"{phrase}.")
            error.code = phrase.lower().replace(" ", "_")
            return error
        return StepweaveError(f"{phrase}. Request id: {self.request_id}", code="internal_error")
