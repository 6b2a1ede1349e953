"""How a request is found in the log, and counted."""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from stepweave.api.context import context_of, outcome_of
from stepweave.api.counting import Count
from stepweave.api.middleware.base import Middleware
from stepweave.api.middleware.probes import PROBES
from stepweave.serving.server import Server

logger = logging.getLogger("stepweave.access")

UNLOGGED = (*PROBES, "/metrics")  # requested every few seconds
LOGGED_PATH = 200  # characters
_VALID_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def identify(scope: Scope, server: Server) -> None:
    """Give the request the id that the client sent if that is valid, else a new one."""
    id = Headers(scope=scope).get("x-request-id", "")
    context_of(scope).id = id if _VALID_ID.fullmatch(id) else uuid.uuid4().hex


class AccessLog(Middleware):
    """Logs and counts each request once it has been answered, by what it was answered with."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        try:
            await self.app(scope, receive, send)
        finally:
            context, status = context_of(scope), outcome_of(scope)
            if context.count is not None:
                context.count.close(status, context.client)
            if scope["path"] not in UNLOGGED:
                logger.info(
                    "%s %s %d %.0f ms, request %s",
                    scope["method"],
                    quote(scope["path"])[:LOGGED_PATH],  # it may contain line ends
                    status,
                    1000 * (time.monotonic() - began),
                    context.id,
                )


def count(scope: Scope, server: Server) -> None:
    """Begin to count the request, which needs its path."""
    context_of(scope).count = Count(scope, server.metrics)
