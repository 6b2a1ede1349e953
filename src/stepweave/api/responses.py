"""Errors as answers."""

from __future__ import annotations

import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from stepweave.errors import (
    AuthenticationError,
    DeadlineExceededError,
    ImageCountError,
    NonFiniteError,
    OutOfMemoryError,
    StepweaveError,
    UnsupportedEncodingError,
)

logger = logging.getLogger(__name__)

LASTING = (OutOfMemoryError, NonFiniteError, ImageCountError)  # errors that would come again
REQUEST_ID = "stepweave.request_id"  # key in the ASGI scope
# key in the ASGI scope: a list, to which a stream adds that its client left before its end
LEFT = "stepweave.left"
# header of the Open Inference Protocol's errors, whose body has no place for it
CODE = "X-Stepweave-Code"
# header between a handler and the middleware: the body is in the contract's shape
ERROR_MARK = "x-stepweave-error"


def is_of_protocol(path: str) -> bool:
    """Whether a path is the Open Inference Protocol's, whose errors are `{"error": "text"}`."""
    return path == "/v2" or path.startswith("/v2/")


def is_of_examples(path: str) -> bool:
    """Whether a path is one of diffusers' example servers, whose clients read an error's `detail`,
    as of any FastAPI server."""
    return path.startswith(("/api/", "/images/"))


def error_response(error: StepweaveError, path: str = "", **extra: Any) -> JSONResponse:
    """The answer for an error of a request to `path`: its body (and `extra` members beside it) as
    that path's clients read one, status and Retry-After."""
    body = error.body()
    headers = {ERROR_MARK: "1"}
    if is_of_protocol(path):
        body = {"error": error.message}
        headers[CODE] = error.code
    elif is_of_examples(path):
        body["detail"] = error.message
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedEncodingError):
        headers["Accept-Encoding"] = error.TAKEN
    # OpenAI's clients repeat what failed with a 5xx unless told not to; of a deadline the time is
    # up
    if isinstance(error, (*LASTING, DeadlineExceededError)):
        headers["X-Should-Retry"] = "false"
    return JSONResponse({**body, **extra}, status_code=error.status, headers=headers)


def handle_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler; whatever is not the caller's fault goes to the log with the
    request's id."""
    return error_response(
        as_stepweave_error(error, request.scope[REQUEST_ID]), request.scope["path"]
    )


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
