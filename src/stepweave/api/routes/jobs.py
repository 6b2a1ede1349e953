"""Jobs: status, list, cancel and events."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stepweave.api.answer_schemas import JobList
from stepweave.api.answers import job_of
from stepweave.api.auth import owner_of
from stepweave.api.bodies import pass_over_body
from stepweave.api.events import EventStream, events
from stepweave.api.responses import answer, json_answer
from stepweave.api.urls import base_url
from stepweave.errors import InvalidRequestError, NotFoundError, RequestCancelledError, shown
from stepweave.serving.jobs import Followed, Jobs
from stepweave.serving.request import ActiveRequest
from stepweave.serving.server import Server

MAX_LIST = 100
CANCEL_SECONDS = 5.0  # how long the answer waits for the cancelled job to end


class JobRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/v1/jobs", self.list, methods=["GET"]),
            Route("/v1/jobs/{id}", self.get, methods=["GET"]),
            Route("/v1/jobs/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/jobs/{id}/events", self.events, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        if not self.server.keys.required:
            raise NotFoundError(
                "The list of jobs is disabled unless API keys are set (STEPWEAVE_API_KEYS_FILE, "
                "STEPWEAVE_API_KEYS).",
                code="jobs_list_disabled",
            )
        for name in request.query_params:
            if name not in ("limit", "before"):
                raise InvalidRequestError(
                    f"Unknown parameter {shown(name)}.", code="unknown_field", param=name
                )
        given = request.query_params.get("limit", "20")
        limit = int(given) if given.isascii() and given.isdecimal() and len(given) < 4 else 0
        if not 1 <= limit <= MAX_LIST:
            raise InvalidRequestError(
                f"limit is {shown(given)}; it must be 1 to {MAX_LIST}.", param="limit"
            )
        jobs = self._jobs()
        found, after = await jobs.list(owner_of(request), limit, request.query_params.get("before"))
        return answer(JobList(data=[job.view() for job in found], next=after))

    async def get(self, request: Request) -> Response:
        return await self._described(request, await self._job(request))

    async def delete(self, request: Request) -> Response:
        """Cancel a job, or delete one that has ended, with its images."""
        job = await self._job(request)
        if isinstance(job, ActiveRequest) and not job.done:
            job.cancel(RequestCancelledError("The job was cancelled."))
            await asyncio.wait({job.ended()}, timeout=CANCEL_SECONDS)
            return await self._described(request, job)
        view = job.view()
        await self._jobs().delete(job.id)
        return answer(view)

    async def events(self, request: Request) -> Response:
        """Previews so far, then progress until the job ends."""
        # a GET may have a body; after it, the only message is that the client has left
        await pass_over_body(request)
        job, jobs = await self._job(request), self._jobs()
        told = events(job, request, jobs.files, verbose=True, base=self._base(request, job))
        return EventStream(request, job, told)

    def _jobs(self) -> Jobs:
        if self.server.jobs is None:
            raise self.server.unavailable()
        return self.server.jobs

    async def _job(self, request: Request) -> Followed:
        return await self._jobs().get(request.path_params["id"], owner_of(request))

    async def _described(self, request: Request, job: Followed) -> Response:
        return await json_answer(await job_of(job, self._jobs().files, self._base(request, job)))

    def _base(self, request: Request, job: Followed) -> str | None:
        return base_url(request, self.server.settings) if job.response_format == "url" else None
