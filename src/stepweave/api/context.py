"""What middleware and routes tell each other of one request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import Receive, Scope

from stepweave.api.connections import MALFORMED
from stepweave.api.counting import Count
from stepweave.config.clients import Client
from stepweave.errors import InvalidRequestError, RequestCancelledError
from stepweave.serving.submission import Submission

CONTEXT = "stepweave.context"  # key in the ASGI scope


@dataclass
class RequestContext:
    """One request, from the first middleware to the end of its answer."""

    body_turns: asyncio.Semaphore  # of all requests, for long bodies
    id: str = ""  # in the answer and in the log
    client: Client | None = None  # whose API key it has; None without keys
    count: Count | None = None  # once its path is known
    submission: Submission | None = None  # of a native edit, which BentoML must not read
    rest: Receive | None = None  # tells that the client has left, once the body has been read
    client_left: bool = False  # before the end of the answer
    status: int = 0  # of the answer; 0 until it starts
    complete: bool = False  # the answer has been sent to its end


def context_of(scope: Scope) -> RequestContext:
    context: RequestContext = scope[CONTEXT]
    return context


def outcome_of(scope: Scope) -> int:
    """The status that a request is logged and counted with: 499 if the client left before the end
    of the answer, 500 if the answer broke off."""
    context = context_of(scope)
    if MALFORMED in scope:
        return InvalidRequestError.status
    if context.client_left:
        return RequestCancelledError.status
    return context.status if context.complete else 500
