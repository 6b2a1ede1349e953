"""Server-sent events of a generation: OpenAI's and, on request, queue position and progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepweave.api.answer_schemas import Completed, PartialImage, ProgressEvent, QueuedEvent
from stepweave.api.answers import EVENT_STREAM, in_base64, url_of
from stepweave.api.context import context_of
from stepweave.api.disconnect import disconnected
from stepweave.api.responses import as_stepweave_error
from stepweave.previews.stream import Partial
from stepweave.resource import Resource
from stepweave.serving.jobs import Followed
from stepweave.serving.request import ActiveRequest, Queued, Update
from stepweave.serving.resources import Answer, Error, Outcome
from stepweave.store import FileStore
from stepweave.store.jobs import JobKind
from stepweave.threads import on_thread

COMMENT = b": still here\n\n"  # keeps proxies from closing the connection
Surface = Literal["image_generation", "image_edit"]
SURFACES: dict[JobKind, Surface] = {"generation": "image_generation", "edit": "image_edit"}


def event(name: str, data: Resource) -> bytes:
    """One event in the stream's format (WHATWG HTML, 9.2.6)."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data.to_ascii())


async def events(
    job: Followed, request: Request, files: FileStore, *, verbose: bool, base: str | None = None
) -> AsyncGenerator[bytes, None]:
    """The progress of a job, then its images (with URLs that begin with `base`, if given) or an
    error, as which the request is counted."""
    surface = SURFACES[job.kind]
    try:
        async for update in job.updates(progress=verbose):
            if update is None:
                yield COMMENT
            elif isinstance(update, Partial):
                assert isinstance(job, ActiveRequest)  # a kept job has no previews left
                yield await on_thread(None, _partial, surface, update, job)
            else:
                yield _progress(job.id, update)
        answer = await job.result()
        for i in range(len(answer.images)):
            yield await _completed(surface, answer, i, files, base)
    except Exception as error:
        yield _failed(request, error)


def _failed(request: Request, error: Exception) -> bytes:
    context = context_of(request.scope)
    failure = as_stepweave_error(error, context.id)
    if context.count is not None:
        context.count.failed = failure.status
    return event("error", Error.of(failure))


def _partial(surface: Surface, update: Partial, active: ActiveRequest) -> bytes:
    data = PartialImage(
        type=f"{surface}.partial_image",
        b64_json=in_base64(update.data),
        partial_image_index=update.number,
        image_index=update.image,
        created_at=int(time.time()),
        size=active.parameters.of_image(0)["size"],
        output_format=active.request.output_format,
    )
    return event(data.type, data)


def _progress(id: str, update: Update) -> bytes:
    eta = None if isinstance(update, Partial) or update.eta is None else round(update.eta, 3)
    told: QueuedEvent | ProgressEvent
    if isinstance(update, Queued):
        assert update.position is not None
        told = QueuedEvent(id=id, position=update.position, eta_seconds=eta)
    else:
        assert not isinstance(update, Partial)
        told = ProgressEvent(id=id, step=update.step, total_steps=update.total, eta_seconds=eta)
    return event(told.type, told)


async def _completed(
    surface: Surface, answer: Answer, index: int, files: FileStore, base: str | None
) -> bytes:
    details, file = answer.details, answer.images[index]
    data = Completed(
        type=f"{surface}.completed",
        # as OpenAI's type requires, also beside a URL
        b64_json=await on_thread(None, in_base64, file.data),
        url=None if base is None else await url_of(file, base, files),
        created_at=details.created,
        size=file.values["size"],
        output_format=file.output_format,
        image_index=index,
        seed=file.seed,
        flagged=file.flagged,
        **{name: getattr(details, name) for name in Outcome.model_fields},
    )
    return await on_thread(None, event, data.type, data)


class EventStream(Response):
    """An answer of server-sent events, which ends when the client disconnects."""

    media_type = EVENT_STREAM

    def __init__(
        self,
        request: Request,
        job: Followed,
        content: AsyncGenerator[bytes, None],
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._request = request
        self._job = job
        self._content = content
        self.init_headers(
            {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        if scope["method"] == "HEAD":
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            await self._content.aclose()
            return
        with self._job.held():  # so that others that follow it do not end it when they leave
            await send(start)
            sending = asyncio.ensure_future(self._send(send))
            watching = asyncio.ensure_future(disconnected(self._request))
            try:
                await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, watching):
                    if not task.done():
                        task.cancel()
                await asyncio.wait({sending, watching})
        failure = None if watching.cancelled() else watching.exception()
        if not sending.cancelled():
            sending.result()
        elif failure is not None:
            raise failure
        else:
            context_of(scope).client_left = True

    async def _send(self, send: Send) -> None:
        try:
            async for chunk in self._content:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._content.aclose()
