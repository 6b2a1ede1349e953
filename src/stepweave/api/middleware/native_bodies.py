"""Bodies of BentoML's native APIs, which are read and checked before BentoML does that.

Its errors name neither value nor limit, and it fetches URLs. It decodes an edit's images by the
types that the client declares, and answers 500 for `image/jpg`, which does not exist, or a PNG that
is called WebP. So it gets a short body instead.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json

from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from stepweave.api.context import context_of
from stepweave.api.forms import (
    edit_of,
    place_for,
    read_form,
    read_json,
    reserve,
)
from stepweave.api.idempotency import submission_of
from stepweave.api.middleware.base import Middleware
from stepweave.api.model_fields import with_fields
from stepweave.api.routes.bentoml import PATHS, SCHEMAS
from stepweave.api.schemas import (
    BentoMLEditBody,
    BentoMLEditRequest,
    StreamRequest,
    is_json,
    parse_form_off_loop,
    require_form,
    require_json,
)
from stepweave.serving.server import Server

BOUNDARY = "short-form"
SHORT = b'{"prompt": "-"}'


class NativeBodies(Middleware):
    """Reads the body of a native API, and gives BentoML a short one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # of an edit: its files and its place, whether BentoML comes to it or not
        with contextlib.ExitStack() as exits:
            if scope["method"] == "POST" and scope["path"] in PATHS:
                request = Request(scope, receive)
                if scope["path"] in SCHEMAS:
                    await _read(request, self.server, exits)
                    content_type, body = "application/json", SHORT
                else:
                    await _read_edit(request, self.server, exits)
                    content_type, body = f"multipart/form-data; boundary={BOUNDARY}", _form()
                receive = _short_body(scope, receive, content_type, body)
            await self.app(scope, receive, send)


async def _read(request: Request, server: Server, exits: contextlib.ExitStack) -> None:
    """Leave the submission of a request in JSON in the request's context."""
    require_json(request.headers.get("content-type", ""))
    body, form = await read_json(request, server, SCHEMAS[request.scope["path"]])
    exits.enter_context(form)
    place = exits.enter_context(await place_for(request, server, form))
    options = await edit_of(form, server, body, place) if form.files else {}
    if isinstance(body, StreamRequest):
        options["previews"] = body.partial_images
    context_of(request.scope).submission = submission_of(request, body, **options)


async def _read_edit(request: Request, server: Server, exits: contextlib.ExitStack) -> None:
    """Leave an edit's submission in the request's context."""
    content_type = request.headers.get("content-type", "")
    if not is_json(content_type):
        require_form(content_type)
    body: BentoMLEditRequest
    place = exits.enter_context(await reserve(request, server))
    fields = server.fields
    if is_json(content_type):
        body, form = await read_json(request, server, BentoMLEditBody, place)
        exits.enter_context(form)
        place.settle()
    else:
        form = exits.enter_context(await read_form(request, fields))
        place.settle()
        texts = {name: text for name, given in form.texts.items() if (text := _text(given))}
        schema = with_fields(BentoMLEditRequest, fields, files=False)
        body = await parse_form_off_loop(texts, schema)
    options = await edit_of(form, server, body, place)
    context_of(request.scope).submission = submission_of(
        request, body, **options, warnings=tuple(form.warnings)
    )


def _text(given: str) -> str | None:
    """A field as BentoML's clients send it, in JSON; others send it as it is."""
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return value if value is None or isinstance(value, str) else given


@functools.cache
def _form() -> bytes:
    image = io.BytesIO()
    Image.new("L", (1, 1)).save(image, "PNG")
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=".encode()
    prompt = b'"prompt"\r\n\r\n-\r\n'
    file = b'"image"; filename="-"\r\n\r\n' + image.getvalue() + b"\r\n"
    return part + prompt + part + file + f"--{BOUNDARY}--\r\n".encode()


def _short_body(scope: Scope, receive: Receive, content_type: str, body: bytes) -> Receive:
    """A `receive` that gives the body, then what `receive` has; the scope's headers change to its
    own."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["Content-Type"] = content_type
    headers["Content-Length"] = str(len(body))
    del headers["Transfer-Encoding"]
    scope["headers"] = headers.raw
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
