"""Server-sent events of a generation: OpenAI's, and with them, for those who ask, its place in the
queue and its progress."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepweave.api.answers import EVENT_STREAM, urls
from stepweave.api.counting import count_of
from stepweave.api.disconnect import disconnected
from stepweave.api.responses import LEFT, REQUEST_ID, as_stepweave_error
from stepweave.parameters import Answer
from stepweave.previews.stream import Partial
from stepweave.serving.jobs import Followed
from stepweave.serving.request import ActiveRequest, Queued, Update
from stepweave.store import FileStore
from stepweave.threads import on_thread

COMMENT = b": still here\n\n"  # keeps proxies from closing the connection
# what OpenAI's events have beside, and no effect here
IGNORED = {"quality": "auto", "background": "auto"}
SURFACES = {"generation": "image_generation", "edit": "image_edit"}


def event(name: str, data: dict[str, Any]) -> bytes:
    """One event in the stream's format (WHATWG HTML, 9.2.6)."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def events(
    job: Followed, request: Request, files: FileStore, *, verbose: bool, base: str | None = None
) -> AsyncGenerator[bytes, None]:
    """What happens to a job, until it ends, and its end: the images (with URLs that begin with
    `base`, if given), or an error, as which the request is counted."""
    prefix = SURFACES[job.kind]
    try:
        async for update in job.updates(progress=verbose):
            if update is None:
                yield COMMENT
            elif isinstance(update, Partial):
                assert isinstance(job, ActiveRequest)  # a kept job has no previews left
                yield await on_thread(None, _partial, prefix, update, job)
            else:
                yield _progress(job.id, update)
        answer = await job.result()
        for i in range(len(answer.images)):
            yield await _completed(prefix, answer, i, files, base)
    except Exception as error:
        yield _failed(request, error)


def _failed(request: Request, error: Exception) -> bytes:
    failure = as_stepweave_error(error, request.scope[REQUEST_ID])
    count_of(request).failed = failure.status
    return event("error", failure.body())


def _partial(prefix: str, update: Partial, active: ActiveRequest) -> bytes:
    name = f"{prefix}.partial_image"
    data = {
        "type": name,
        "b64_json": base64.b64encode(update.data).decode(),
        "partial_image_index": update.number,
        "image_index": update.image,
        "created_at": int(time.time()),
        "size": active.parameters.of_image(0)["size"],
        "output_format": active.request.output_format,
        **IGNORED,
    }
    return event(name, data)


def _progress(id: str, update: Update) -> bytes:
    eta = None if isinstance(update, Partial) or update.eta is None else round(update.eta, 3)
    if isinstance(update, Queued):
        place = {"id": id, "position": update.position, "eta_seconds": eta}
        return event("stepweave.queued", {"type": "stepweave.queued", **place})
    assert not isinstance(update, Partial)
    progress = {"id": id, "step": update.step, "total_steps": update.total, "eta_seconds": eta}
    return event("stepweave.progress", {"type": "stepweave.progress", **progress})


async def _completed(
    prefix: str, answer: Answer, index: int, files: FileStore, base: str | None
) -> bytes:
    name, file = f"{prefix}.completed", answer.images[index]
    # as OpenAI's type requires, also beside a URL
    content = {"b64_json": (await on_thread(None, base64.b64encode, file.data)).decode()}
    if base is not None:
        content["url"] = (await urls(Answer(answer.body, [file]), base, files))[0]["url"]
    parameters = answer.body["parameters"]
    data = {
        "type": name,
        **content,
        "created_at": answer.body["created"],
        "size": file.values["size"],
        "output_format": file.output_format,
        **IGNORED,
        "image_index": index,
        "seed": file.seed,
        "flagged": file.flagged,
        "model": answer.body["model"],
        "usage": answer.body["usage"],
        "parameters": parameters,
        "timings": answer.body["timings"],
        "warnings": answer.body["warnings"],
        **({"outputs": answer.body["outputs"]} if "outputs" in answer.body else {}),
    }
    return await on_thread(None, event, name, data)


class EventStream(Response):
    """An answer of server-sent events, which ends when the client leaves."""

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
        with self._job.held():  # from here, lest it be let go by others that follow it
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
            scope.get(LEFT, []).append(True)

    async def _send(self, send: Send) -> None:
        try:
            async for chunk in self._content:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._content.aclose()
