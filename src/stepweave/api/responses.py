"""Errors as answers."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from stepweave.errors import OutOfMemory, StepweaveError
from stepweave.server import as_stepweave_error

REQUEST_ID = "stepweave.request_id"  # key in the ASGI scope
ERROR_MARK = "x-stepweave-error"  # header between a handler and the middleware: the body is in the contract's shape


def error_response(error: StepweaveError, **extra: Any) -> JSONResponse:
    """The answer for an error: its body (and `extra` members beside it), status and Retry-After."""
    headers = {ERROR_MARK: "1"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, OutOfMemory):  # OpenAI's clients repeat what failed with a 500 unless told not to
        headers["X-Should-Retry"] = "false"
    return JSONResponse({**error.body(), **extra}, status_code=error.status, headers=headers)


def handle_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler; whatever is not the caller's fault goes to the log with the request's id."""
    return error_response(as_stepweave_error(error, request.scope[REQUEST_ID]))
