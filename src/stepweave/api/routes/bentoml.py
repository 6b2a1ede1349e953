"""BentoML's native APIs, whose clients read the answers as images and as streams."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from bentoml._internal.server.http import traffic
from starlette.requests import Request
from starlette.responses import Response

from stepweave.api.answers import image_answer
from stepweave.api.context import context_of
from stepweave.api.disconnect import until_disconnect
from stepweave.api.events import EventStream, events
from stepweave.api.responses import handle_error
from stepweave.api.schemas import StreamRequest
from stepweave.parameters import ImageRequest
from stepweave.serving.server import Server
from stepweave.serving.submission import Submission

SCHEMAS: dict[str, type[ImageRequest]] = {
    "/generate": ImageRequest,
    "/generate_stream": StreamRequest,
}
PATHS = (*SCHEMAS, "/edit")


def drop_timeout_middleware() -> None:
    """Keep BentoML's TimeoutMiddleware out of the app that it is about to build.

    It cannot be configured away, and its `loop.call_later` is never cancelled: each request, probes
    included, keeps a timer and its context (5 KB) until the timeout. Nor does it stop the work that
    it answers 504 for.
    """
    traffic.TimeoutMiddleware = lambda app, timeout: app  # type: ignore[misc,assignment,return-value]


async def answered(request: Request, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
    """The answer of `work`, or its error in the contract's shape: BentoML answers in another, and
    its log lacks the request's id."""
    try:
        return await work()
    except Exception as error:
        return handle_error(request, error)


async def one_image(request: Request, server: Server) -> Response:
    """One image's file, by what the middleware has read."""
    return image_answer(await until_disconnect(request, server.generate(_submission(request))))


async def generate_stream(request: Request, server: Server) -> Response:
    """Server-sent events, by what the middleware has read."""
    assert server.jobs is not None
    submission = _submission(request)
    body = submission.request
    assert isinstance(body, StreamRequest)
    job = await server.submit(submission)
    told = events(job, request, server.jobs.files, verbose=body.events == "all")
    return EventStream(request, job, told, {"X-Stepweave-Job": job.id})


def _submission(request: Request) -> Submission:
    submission = context_of(request.scope).submission
    assert submission is not None
    return submission
