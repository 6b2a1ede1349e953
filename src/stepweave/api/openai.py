"""OpenAI's Images API: generations and edits, at once, as a stream, or as jobs."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stepweave.api.answers import (
    PROFILE,
    json_answer,
    one_picture,
    picture_answer,
    wants_picture,
    wants_stream,
    wants_to_come_back,
)
from stepweave.api.auth import owner_of
from stepweave.api.disconnect import read_body, until_disconnect
from stepweave.api.events import EventStream, events, request_id
from stepweave.api.forms import PICTURES, read_form, read_pictures
from stepweave.api.job_answers import job_answer
from stepweave.api.schemas import (
    EditRequest,
    GenerationRequest,
    OpenAIRequest,
    parse_form,
    parse_off_loop,
    require_form,
    require_json,
)
from stepweave.api.urls import base_url
from stepweave.errors import Conflict, InvalidRequest, shown
from stepweave.generation import Answer, Sources
from stepweave.jobs import Claim, Followed
from stepweave.server import Server
from stepweave.telemetry.metrics import outcome_of
from stepweave.ticket import Ticket

MAX_KEY = 255  # characters of an idempotency key


class OpenAI:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
        ]

    async def generations(self, request: Request) -> Response:
        with self.server.metrics.counted(success=False):
            require_json(request.headers.get("content-type", ""))
            body = await parse_off_loop(await read_body(request), GenerationRequest)
        return await self._answer(request, body, None, b"")

    async def edits(self, request: Request) -> Response:
        with self.server.metrics.counted(success=False):
            self.server.ready()  # before a picture is read that nobody can use
            require_form(request.headers.get("content-type", ""))
            fields, files = await read_form(request)
            body = parse_form(fields, EditRequest)
            sources = await read_pictures(files, self.server)
            digest = await asyncio.to_thread(_digest, files)
        return await self._answer(request, body, sources, digest)

    async def _answer(self, request: Request, body: OpenAIRequest, sources: Sources | None, digest: bytes) -> Response:
        """`digest` is of the pictures' files."""
        server = self.server
        with server.metrics.counted(success=False):
            server.ready()
            jobs = server.jobs
            assert jobs is not None
            detached, stream = wants_to_come_back(request), wants_stream(request)
            streams = body.stream or stream is not None
            picture = None if detached or streams else wants_picture(request)
            if picture is not None:
                one_picture(body.n, picture, body.output_format, "output_format" in body.model_fields_set)
                body = body.model_copy(update={"output_format": picture})
            base = base_url(request, server.settings) if body.response_format == "url" else None
            fingerprint = hashlib.sha256(digest + body.model_dump_json().encode()).hexdigest()
            claim = Claim(owner_of(request), _key(request), fingerprint)

        async def accept() -> Ticket:
            ticket = await server.accept(
                body,
                n=body.n,
                model=body.model,
                sources=sources,
                strength=body.strength if isinstance(body, EditRequest) else None,
                previews=body.partial_images if streams or detached else 0,
                warnings=body.ignored(),
            )
            ticket.response_format = body.response_format
            return ticket

        async def start() -> Followed:
            try:
                return await jobs.start(claim, accept, detached=detached)
            except Conflict as error:  # `accept` counts all else
                server.metrics.requests.labels(outcome_of(error)).inc()
                raise

        if detached:
            job = await start()
            answered = await job_answer(job, jobs.files, base)
            headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
            return Response(answered, 202, headers, "application/json")
        if streams:
            job = await start()
            verbose = body.events == "all" or (stream or {}).get("profile") == PROFILE
            told = events(job, request_id(request), jobs.files, verbose=verbose, base=base)
            return EventStream(request, job, told, {"X-Stepweave-Job": job.id})

        async def work() -> Answer:
            job = await start()
            with job.held():
                return await job.result()

        answer = await until_disconnect(request, work())
        if picture is not None:
            return picture_answer(answer)
        return Response(
            await json_answer(answer, body.response_format, base, jobs.files), media_type="application/json"
        )


def _digest(files: Mapping[str, bytes]) -> bytes:
    return b"".join(hashlib.sha256(files.get(name, b"")).digest() for name in PICTURES)


def _key(request: Request) -> str | None:
    """The idempotency key, one for each route. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise InvalidRequest(
            f"Idempotency-Key is {shown(key)}; it must have 1 to {MAX_KEY} printable characters.",
            param="Idempotency-Key",
        )
    return f"{request.url.path} {key}"
