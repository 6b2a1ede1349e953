"""BentoML's native APIs: answers that its clients read as images and as streams."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from bentoml._internal.server.http import traffic
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.api.answers import image_answer
from stepweave.api.bodies import whole_body
from stepweave.api.disconnect import until_disconnect
from stepweave.api.events import EventStream, events
from stepweave.api.forms import Form, edit_of, read_form, reserve
from stepweave.api.idempotency import key_of, submission_of
from stepweave.api.responses import handle_error
from stepweave.api.schemas import (
    BentoMLEditRequest,
    StreamRequest,
    parse_form,
    parse_off_loop,
    require_form,
    require_json,
)
from stepweave.parameters import ImageRequest
from stepweave.serving.server import Server

READ = "stepweave.read"  # key in the ASGI scope: the body of any other
EDIT = "stepweave.edit"  # key in the ASGI scope: an Edit
SCHEMAS: dict[str, type[ImageRequest]] = {
    "/generate": ImageRequest,
    "/generate_stream": StreamRequest,
}
PATHS = (*SCHEMAS, "/edit")


class Edit(NamedTuple):
    """What has been read of a request."""

    body: BentoMLEditRequest
    form: Form
    options: dict[str, Any]  # of its submission
    exits: contextlib.ExitStack  # of the form, and of the place that it holds


def drop_timeout_middleware() -> None:
    """Keep BentoML's TimeoutMiddleware out of the app that it is about to build.

    It cannot be configured away, and its `loop.call_later` is never cancelled: each request, probes
    included, keeps a timer and its context (5 KB) until the timeout. Nor does it stop the work that
    it answers 504 for.
    """
    traffic.TimeoutMiddleware = _PassThrough  # type: ignore[misc,assignment]


class _PassThrough:
    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def answered(request: Request, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
    """What the work answers, or its error in the contract's shape: BentoML's has another, and its
    log lacks the request's id."""
    try:
        return await work()
    except Exception as error:
        return handle_error(request, error)


async def generate(request: Request, server: Server, body: ImageRequest) -> Response:
    """One image's file."""
    submission = submission_of(request, body)
    return image_answer(await until_disconnect(request, server.generate(submission)))


async def generate_stream(request: Request, server: Server, body: StreamRequest) -> Response:
    """Server-sent events."""
    assert server.jobs is not None
    job = await server.submit(submission_of(request, body, previews=body.partial_images))
    told = events(job, request, server.jobs.files, verbose=body.events == "all")
    return EventStream(request, job, told, {"X-Stepweave-Job": job.id})


async def edit(request: Request, server: Server) -> Response:
    """One image's file, by what the middleware has read."""
    edit: Edit = request.scope[EDIT]
    submission = submission_of(
        request, edit.body, **edit.options, warnings=tuple(edit.form.warnings)
    )
    return image_answer(await until_disconnect(request, server.generate(submission)))


async def check(request: Request, server: Server) -> None:
    """Read and check the body of a native API before BentoML does, which tells no value and no
    limit, and fetches URLs.

    What was read stays in the scope, an edit with its place: `let_go` gives that back if BentoML
    does not come to the edit.
    """
    content_type = request.headers.get("content-type", "")
    if request.url.path != "/edit":
        require_json(content_type)
        async with whole_body(request) as content:
            body = await parse_off_loop(content, SCHEMAS[request.url.path])
        request.scope[READ] = body
        server.ready()
        key_of(request)  # raises if it is none
        return
    require_form(content_type)
    with contextlib.ExitStack() as exits:
        place = exits.enter_context(await reserve(request, server))
        form = exits.enter_context(await read_form(request))
        place.settle()
        fields = {name: text for name, given in form.texts.items() if (text := _text(given))}
        edit = parse_form(fields, BentoMLEditRequest)
        options = await edit_of(form, server, edit, place)
        request.scope[EDIT] = Edit(edit, form, options, exits.pop_all())


def let_go(scope: Scope) -> None:
    """Give back the place of an edit that `check` has read, if it was not used, and its files."""
    if EDIT in scope:
        scope[EDIT].exits.close()


def _text(given: str) -> str | None:
    """A field as BentoML's clients send it, in JSON; others send it as it is."""
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return value if value is None or isinstance(value, str) else given
