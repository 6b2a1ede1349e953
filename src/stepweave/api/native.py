"""BentoML's native APIs: answers that its clients read as pictures."""

from __future__ import annotations

import json

from bentoml._internal.server.http import traffic
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.api.http import until_disconnect
from stepweave.api.responses import handle_error
from stepweave.api.schemas import ImageRequest
from stepweave.server import Server

MAX_WARNINGS_HEADER = 4096  # bytes; proxies refuse headers of 8 KB


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


async def picture_response(request: Request, server: Server, body: ImageRequest) -> Response:
    """Generate one picture and answer with its file, or with the error in the contract's shape.

    The parameters stand in headers, but for the prompts: they may be longer than proxies let a header be, and the file has them.
    Warnings, if there are any, stand in `X-Stepweave-Warnings`.
    """
    try:
        with server.metrics.counted():
            generation, (file,) = await until_disconnect(request, server.generate(body))
    except Exception as error:
        # BentoML would answer in its own shape and log without the request's id
        return handle_error(request, error)
    headers = {
        f"X-Stepweave-{name.replace('_', '-').title()}": "true" if value is True else str(value)
        for name, value in file.values.items()
        if "prompt" not in name
    }
    if generation.warnings:
        headers["X-Stepweave-Warnings"] = warnings_header(generation.warnings)
    return Response(file.data, media_type=f"image/{body.output_format}", headers=headers)


def warnings_header(warnings: list[str]) -> str:
    """Warnings as a JSON list in ASCII (other characters are \\u escapes); those that do not fit are counted in a last one."""
    kept = list(warnings)
    while True:
        more = len(warnings) - len(kept)
        text = json.dumps([*kept, *([f"and {more} more"] if more else [])]).replace("\x7f", "\\u007f")
        if len(text) <= MAX_WARNINGS_HEADER or not kept:
            return text
        kept.pop()
