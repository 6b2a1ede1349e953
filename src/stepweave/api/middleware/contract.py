"""What every request passes through: ids, the body limit, probes, and errors in the contract's one
shape.

BentoML answers validation errors, unknown routes and its own failures in shapes of its own; here
they all become the contract's. Its native APIs get a body that has been read and validated before,
so that their errors name value and limit.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.api.auth import authorize, client_of
from stepweave.api.bodies import WAITING, body_turns, decoded
from stepweave.api.connections import FULL, MALFORMED
from stepweave.api.counting import COUNT, Count
from stepweave.api.middleware.answer import ContractSend
from stepweave.api.middleware.bentoml_form import short_body, short_form
from stepweave.api.middleware.body_limit import limit_of, limited_body
from stepweave.api.middleware.csrf import check_site
from stepweave.api.middleware.probes import DRAIN, KEYLESS, PROBES, drain, probe
from stepweave.api.middleware.targets import (
    has_two_lengths,
    is_of_the_server,
    normalize_path,
    take_forwarded_client,
    to_origin_form,
)
from stepweave.api.responses import LEFT, REQUEST_ID, as_stepweave_error, error_response
from stepweave.api.routes.bentoml import EDIT, PATHS, READ, check, let_go
from stepweave.errors import InvalidRequestError, StepweaveError
from stepweave.serving.server import Server

logger = logging.getLogger("stepweave.access")

UNLOGGED = (*PROBES, "/metrics")  # asked for every few seconds
LOGGED_PATH = 200  # characters
METHODS = ("GET", "POST", "DELETE")
_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class ContractMiddleware:
    """Wraps BentoML's app."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.server = server
        self.app = self._shared(app)
        self.body_turns = body_turns()

    def _shared(self, app: ASGIApp) -> ASGIApp:
        """The app, for pages of the origins that are allowed too."""
        origins = self.server.settings.cors_origins
        if not origins:
            return app
        return CORSMiddleware(
            app, origins, allow_methods=METHODS, allow_headers=["*"], expose_headers=["*"]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope[REQUEST_ID] = request_id
        left: list[bool] = []
        scope[LEFT] = left
        scope[WAITING] = self.body_turns
        count: Count | None = None
        answer = ContractSend(scope, send, request_id, left, self.server.leaving)
        full, ambiguous = scope.get("state", {}).get(FULL), has_two_lengths(scope)
        # nobody knows where a body of two lengths ends
        answer.closes = full is not None or ambiguous
        began = time.monotonic()
        try:
            if is_of_the_server(scope):
                await Response(headers={"Allow": ", ".join((*METHODS, "HEAD", "OPTIONS"))})(
                    scope, receive, answer
                )
                return
            to_origin_form(scope)
            normalize_path(scope, self.server.settings)
            count = scope[COUNT] = Count(scope, self.server.metrics)
            if self.server.settings.trust_forwarded:
                take_forwarded_client(scope)
            if ambiguous:
                raise InvalidRequestError(
                    "The request has both Content-Length and Transfer-Encoding; send one of them.",
                    code="ambiguous_length",
                )
            check_site(scope, self.server.settings)
            if scope["path"] in PROBES:
                await probe(scope, self.server)(scope, receive, answer)
                return
            if scope["path"] == DRAIN:
                await drain(scope, self.server)(scope, receive, answer)
                return
            if full is not None:
                raise full
            if scope["path"] not in KEYLESS and not _is_preflight(scope):
                authorize(scope, self.server.keys)
            limit = limit_of(scope["path"], self.server.settings)
            receive = limited_body(receive, scope, limit, answer.body_read)
            if scope["method"] == "POST":
                receive = decoded(receive, scope, limit)
            if scope["method"] == "POST" and scope["path"] in PATHS:
                receive = await self._checked(scope, receive)
            await self.app(scope, receive, answer)
        except Exception as error:
            if answer.started and isinstance(error.__cause__, StepweaveError):
                error = error.__cause__  # which Starlette has wrapped: it can be told no more
            answer_with = self._shared(
                error_response(as_stepweave_error(error, request_id), scope["path"])
            )
            if not answer.started:
                await answer_with(scope, receive, answer)
        finally:
            let_go(scope)
            status = 499 if left else answer.status if answer.whole else 500
            if MALFORMED in scope:
                status = InvalidRequestError.status
            if count is not None:
                count.close(status, client_of(scope))
            if scope["path"] not in UNLOGGED:
                milliseconds = 1000 * (time.monotonic() - began)
                path = quote(scope["path"])[:LOGGED_PATH]  # which may hold line ends
                logger.info(
                    "%s %s %d %.0f ms, request %s",
                    scope["method"],
                    path,
                    status,
                    milliseconds,
                    request_id,
                )

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Have the body of a native API read and checked, and return a `receive` that gives BentoML
        a short one instead."""
        await check(Request(scope, receive), self.server)
        if EDIT in scope:
            return short_form(scope, receive)
        return short_body(
            scope,
            receive,
            "application/json",
            scope[READ].model_dump_json(exclude_unset=True).encode(),
        )


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what it may send (Fetch, 4.8), which it does without keys."""
    return scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)
