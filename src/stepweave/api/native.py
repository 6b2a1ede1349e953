"""BentoML's native APIs: answers that its clients read as pictures and as streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from bentoml._internal.server.http import traffic
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.api.answers import picture_answer
from stepweave.api.disconnect import read_body, until_disconnect
from stepweave.api.events import EventStream, events
from stepweave.api.forms import check_place, read_form, read_pictures
from stepweave.api.idempotency import claim_of
from stepweave.api.idempotency import generate as made_once
from stepweave.api.responses import handle_error
from stepweave.api.schemas import (
    ImageRequest,
    NativeEditRequest,
    StreamRequest,
    parse_form,
    parse_off_loop,
    require_form,
    require_json,
)
from stepweave.server import Server
from stepweave.ticket import Ticket

EDIT = "stepweave.edit"  # key in the ASGI scope: the edit's fields and pictures, and a digest of their files
SCHEMAS: dict[str, type[ImageRequest]] = {"/generate": ImageRequest, "/generate_stream": StreamRequest}
PATHS = (*SCHEMAS, "/edit")


def drop_timeout_middleware() -> None:
    """Keep BentoML's TimeoutMiddleware out of the app that it is about to build.

    It cannot be configured away, and its `loop.call_later` is never cancelled: each request, probes included, keeps a timer and
    its context (5 KB) until the timeout. Nor does it stop the work that it answers 504 for.
    """
    traffic.TimeoutMiddleware = _PassThrough  # type: ignore[misc,assignment]


class _PassThrough:
    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def answered(request: Request, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
    """What the work answers, or its error in the contract's shape: BentoML's has another, and its log lacks the request's id."""
    try:
        return await work()
    except Exception as error:
        return handle_error(request, error)


async def generate(request: Request, server: Server, body: ImageRequest) -> Response:
    """One picture's file."""
    claim = claim_of(request, body.model_dump_json())
    return picture_answer(await until_disconnect(request, made_once(server, claim, lambda: server.accept(body))))


async def generate_stream(request: Request, server: Server, body: StreamRequest) -> Response:
    """Server-sent events."""
    assert server.jobs is not None
    claim = claim_of(request, body.model_dump_json())
    job = await server.jobs.start(claim, lambda: server.accept(body, previews=body.partial_images))
    told = events(job, request, server.jobs.files, verbose=body.events == "all")
    return EventStream(request, job, told, {"X-Stepweave-Job": job.id})


async def edit(request: Request, server: Server) -> Response:
    """One picture's file, by what the middleware has read."""
    body, sources, digest = request.scope[EDIT]
    claim = claim_of(request, body.model_dump_json(), digest)

    async def accept() -> Ticket:
        return await server.accept(body, sources=sources, strength=body.strength)

    return picture_answer(await until_disconnect(request, made_once(server, claim, accept)))


async def check(request: Request, server: Server) -> None:
    """Read and check the body of a native API before BentoML does, which tells no value and no limit, and fetches URLs.

    An edit's stays in the scope.
    """
    content_type = request.headers.get("content-type", "")
    if request.url.path != "/edit":
        require_json(content_type)
        await parse_off_loop(await read_body(request), SCHEMAS[request.url.path])
        server.ready()
        claim_of(request, "")  # raises if its key is none
        return
    require_form(content_type)
    joining = await check_place(request, server)
    texts, files = await read_form(request)
    body = parse_form(
        {name: text for name, given in texts.items() if (text := _text(given)) is not None}, NativeEditRequest
    )
    request.scope[EDIT] = body, *await read_pictures(files, server, joining=joining)


def _text(given: str) -> str | None:
    """A field as BentoML's clients send it, in JSON; others send it as it is."""
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return value if value is None or isinstance(value, str) else given
