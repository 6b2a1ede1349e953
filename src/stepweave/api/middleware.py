"""What every request passes through: ids, the body limit, probes, and errors in the contract's one shape.

BentoML answers validation errors, unknown routes and its own failures in shapes of its own; here they all become the
contract's. Its native APIs get a body that has been read and validated before, so that their errors name value and limit.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepweave import __version__
from stepweave.api.responses import ERROR_MARK, REQUEST_ID, error_response
from stepweave.api.schemas import ImageRequest, parse, require_json
from stepweave.errors import BodyTooLarge, Cancelled, MethodNotAllowed, NotFound, RequestError, StepweaveError
from stepweave.server import Server, as_stepweave_error

PROBES = ("/livez", "/healthz", "/readyz")
_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_DISCARDED = 64 * 1024 * 1024  # bytes over the limit that are read and thrown away, so that the client reads our 413


class ContractMiddleware:
    """Wraps BentoML's app. `native` maps the paths of native APIs to the schema of their bodies."""

    def __init__(self, app: ASGIApp, server: Server, native: Mapping[str, type[ImageRequest]]) -> None:
        self.app = app
        self.server = server
        self.native = native

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope[REQUEST_ID] = request_id
        answer = _Answer(scope, send, request_id)
        try:
            if scope["path"] in PROBES:
                await self._probe(scope)(scope, receive, answer)
                return
            receive = _limited(receive, scope, self.server.settings.max_body_bytes)
            if scope["method"] == "POST" and scope["path"] in self.native:
                with self.server.metrics.counted(success=False):
                    receive = await self._validated(scope, receive)
            await self.app(scope, receive, answer)
        except Exception as error:
            answer_with = error_response(as_stepweave_error(error, request_id))
            if not answer.started:
                await answer_with(scope, receive, answer)

    def _probe(self, scope: Scope) -> JSONResponse:
        """Answered from memory alone, never waiting for the device."""
        path = scope["path"]
        if scope["method"] not in ("GET", "HEAD"):
            response = error_response(MethodNotAllowed(f"{scope['method']} is not allowed on {path}; use GET."))
            response.headers["Allow"] = "GET, HEAD"
            return response
        status = self.server.status
        state = {"stage": status.stage, "progress": status.progress, "message": status.message}
        # a server that cannot load its model never will: let the kubelet restart it, and show why
        if status.stage == "failed" or (path == "/readyz" and status.stage != "ready"):
            return error_response(self.server.unavailable(), **state)
        return JSONResponse(state)

    async def _validated(self, scope: Scope, receive: Receive) -> Receive:
        """Read and check the body of a native API, and return a `receive` that gives it once more."""
        require_json(Headers(scope=scope).get("content-type", ""))
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Cancelled("The client left while it sent the body.")
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        parse(body, self.native[scope["path"]])
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again


def _limited(receive: Receive, scope: Scope, limit: int) -> Receive:
    """A `receive` that raises BodyTooLarge once the body is over the limit."""
    declared = Headers(scope=scope).get("content-length", "0")
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit or (declared.isdecimal() and int(declared) > limit):
            while message["type"] == "http.request" and message.get("more_body", False) and seen < _DISCARDED:
                message = await receive()
                seen += len(message.get("body", b""))
            raise BodyTooLarge(limit)
        return message

    return limited


class _Answer:
    """A `send` that adds the headers of every answer and gives errors the contract's shape."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.scope = scope
        self.send = send
        self.request_id = request_id
        self.started = False
        self.replaced = False

    async def __call__(self, message: Message) -> None:
        if self.replaced:
            return
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            if message["status"] >= 400 and ERROR_MARK not in headers:
                await self._replace(message["status"], headers)
                return
            self._complete(headers)
        await self.send(message)

    def _complete(self, headers: MutableHeaders) -> None:
        headers["X-Request-ID"] = self.request_id
        headers["Server"] = f"stepweave/{__version__}"
        del headers[ERROR_MARK]

    async def _replace(self, status: int, headers: MutableHeaders) -> None:
        self.replaced = True
        response = error_response(self._error_for(status))
        response.status_code = status
        self._complete(response.headers)
        if "allow" in headers:
            response.headers["Allow"] = headers["allow"]
        await self.send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await self.send({"type": "http.response.body", "body": bytes(response.body)})

    def _error_for(self, status: int) -> StepweaveError:
        method, path = self.scope["method"], self.scope["path"]
        known: dict[int, Callable[[], StepweaveError]] = {
            404: lambda: NotFound(f"There is no route {path[:200]!r}."),
            405: lambda: MethodNotAllowed(f"{method} is not allowed on {path[:200]}."),
        }
        if status in known:
            return known[status]()
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else f"Status {status}"
        if status < 500:
            return RequestError(f"{phrase}.", code=phrase.lower().replace(" ", "_"))
        return StepweaveError(f"{phrase}. Request id: {self.request_id}", code="internal_error")
