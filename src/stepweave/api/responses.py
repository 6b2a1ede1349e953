"""Resources and errors as answers in JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stepweave.api.answer_schemas import ExamplesError, ProtocolError
from stepweave.api.context import context_of
from stepweave.errors import (
    AuthenticationError,
    DeadlineExceededError,
    ImageCountError,
    NonFiniteError,
    OutOfMemoryError,
    StepweaveError,
    UnsupportedEncodingError,
)
from stepweave.resource import Resource
from stepweave.serving.resources import Error, ErrorDetail
from stepweave.threads import on_thread

logger = logging.getLogger(__name__)

# of pages, beside their Content-Security-Policy
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
LASTING = (OutOfMemoryError, NonFiniteError, ImageCountError)  # would happen again
# header of the Open Inference Protocol's errors, whose body has no place for it
CODE = "X-Stepweave-Code"
# header between a handler and the middleware: the body is in the contract's shape
ERROR_MARK = "x-stepweave-error"


def is_of_protocol(path: str) -> bool:
    """Whether a path is the Open Inference Protocol's, whose errors are `{"error": "text"}`."""
    return path == "/v2" or path.startswith("/v2/")


def is_of_examples(path: str) -> bool:
    """Whether a path is one of diffusers' example servers, whose clients read an error's `detail`,
    as from any FastAPI server."""
    return path.startswith(("/api/", "/images/"))


def answer(
    resource: Resource, headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    """A resource in JSON."""
    return Response(resource.to_json(), status, headers, "application/json")


async def json_answer(
    resource: Resource, headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    """The same, made on another thread: for resources with images, which take long."""
    return await on_thread(None, answer, resource, headers, status)


def error_response(
    error: StepweaveError, path: str = "", kind: type[Resource] | None = None, **beside: Any
) -> Response:
    """The answer for an error of a request to `path`: its body as that path's clients read one,
    status and Retry-After. `kind` is a body with members `beside` the error."""
    body: Resource
    headers = {ERROR_MARK: "1"}
    if is_of_protocol(path):
        body = (kind or ProtocolError)(error=error.message, **beside)
        headers[CODE] = error.code
    elif is_of_examples(path):
        body = ExamplesError(error=ErrorDetail.of(error), detail=error.message)
    else:
        body = (kind or Error)(error=ErrorDetail.of(error), **beside)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedEncodingError):
        headers["Accept-Encoding"] = error.TAKEN
    # OpenAI's clients retry after a 5xx unless told not to; a missed deadline stays missed
    if isinstance(error, (*LASTING, DeadlineExceededError)):
        headers["X-Should-Retry"] = "false"
    return answer(body, headers, error.status)


def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler; the server's own failures are logged with the request id."""
    scope = request.scope
    return error_response(as_stepweave_error(error, context_of(scope).id), scope["path"])


def as_stepweave_error(error: Exception, request_id: str) -> StepweaveError:
    """The error to answer with: itself if it is ours, else a 500 that names only the request's id,
    which the log has too."""
    if isinstance(error, StepweaveError) and error.status != 500:
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    if isinstance(error, LASTING):
        return type(error)(f"{error.message} Request id: {request_id}")
    if isinstance(error, StepweaveError):
        failure = StepweaveError(f"{error.message} Request id: {request_id}")
        failure.code = error.code
        return failure
    return StepweaveError(f"Internal error. Request id: {request_id}", code="internal_error")
