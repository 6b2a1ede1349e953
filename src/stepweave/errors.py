"""Every error that Stepweave raises, each with the HTTP status, type and code it becomes.

StepweaveError (500)
├── ConfigError                 a setting is unknown or malformed; the server does not start
├── LoadError                   the model cannot be loaded
├── EngineMisuse                the engine is used in a way that cannot work
├── OutOfMemory                 the device's memory is too small for the job, even by itself
├── NonFinite                   the model gave NaN or infinite values
├── WrongNumber                 the pipeline made more or fewer images than were asked for
│   └── NoImages                it made something else than images
└── RequestError                the caller's request cannot be served
    ├── InvalidRequest (400)    a value is not allowed; `param` names the field
    │   └── DeadlineTooShort    no server like this one could meet it, however idle
    ├── ContentFlagged (400)    the pipeline's safety checker flagged an image, and such are refused
    ├── Unauthorized (401)      keys are set, and the request bears none of them
    ├── NotFound (404)          no such route, model, job or picture
    ├── MethodNotAllowed (405)
    ├── Conflict (409)          the idempotency key belongs to another request; or the process ends
    ├── BodyTooLarge (413)
    ├── UnsupportedMedia (415)
    │   └── UnsupportedEncoding its content encoding is not one that is undone
    ├── Refused (429)           admission refused it; `retry_after` says when to come back
    ├── Cancelled (499)         the caller left or cancelled
    ├── DeadlineExceeded (504)  the job was not done in the time it was given
    └── Unavailable (503)       loading, draining or failed; `retry_after` says when to come back
        ├── EngineClosed        the engine has been closed
        └── DeviceFailed        the device has failed, until the process is started again
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self, get_args

RefusalReason = Literal["queue_full", "wait", "deadline", "memory"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)  # codes of 429
SHOWN = 80  # characters of an offending value that a message repeats


def shown(value: object) -> str:
    """The value as a message repeats it: its repr, cut to a sane length."""
    text = repr(value[: 2 * SHOWN]) if isinstance(value, (str, bytes)) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def duration(seconds: float) -> str:
    """Seconds as a message tells them, to three digits and rounded up: what is longer than a limit
    never looks shorter, nor a wait like none."""
    seconds = max(seconds, 1e-3)
    unit = 10.0 ** min(0, math.floor(math.log10(seconds)) - 2)
    rounded = math.ceil(round(seconds / unit, 6)) * unit
    return f"{rounded:.10g} s"


class StepweaveError(Exception):
    """Base of all. `message` never holds a traceback or a server path."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).__name__.lower()
        self.param = param
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))

    def again(self) -> Self:
        """The same, to be raised once more: an error's traceback holds on to all who raise it."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin

    def body(self) -> dict[str, Any]:
        """The body of the answer, in OpenAI's error shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "code": self.code,
                "param": self.param,
            }
        }


class ConfigError(StepweaveError):
    """A setting is unknown or malformed."""


class LoadError(StepweaveError):
    """The model cannot be loaded."""


class EngineMisuse(StepweaveError):
    """The engine is used in a way that cannot work."""


class OutOfMemory(StepweaveError):
    """The device's memory is too small for the job, even by itself."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="out_of_memory")


_NON_FINITE = (
    "The result is not finite: the model gave NaN or infinite values. Other parameters may work; "
    "if all requests fail, the "
    "weights are damaged, or overflow in the server's STEPWEAVE_DTYPE (try bfloat16 or float32)."
)


class NonFinite(StepweaveError):
    """The model gave NaN or infinite values, of which no image can be made."""

    def __init__(self, message: str = _NON_FINITE) -> None:
        super().__init__(message, code="non_finite")


class WrongNumber(StepweaveError):
    """The pipeline made more or fewer images than were asked for."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="generation_failed")


class NoImages(WrongNumber):
    """The pipeline made something else than images."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = "no_images"


class RequestError(StepweaveError):
    """The caller's request cannot be served."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A value of the request is not allowed."""

    def __init__(
        self, message: str, *, code: str = "invalid_value", param: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)


class DeadlineTooShort(InvalidRequest):
    """The job takes longer than its deadline even if it is the only one: nothing was run, and
    coming back would not help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="deadline_too_short", param="deadline_ms")


class ContentFlagged(RequestError):
    """The pipeline's safety checker flagged an image, and the server refuses such images."""

    def __init__(self, index: int, names: list[str]) -> None:
        super().__init__(
            f"Image {index} was flagged by the pipeline ({', '.join(names)}); this server does not "
            f"return flagged images. "
            "Another prompt or seed may pass.",
            code="content_policy_violation",
        )


class Unauthorized(RequestError):
    """Keys are set, and the request bears none of them."""

    status = 401
    type = "authentication_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class NotFound(RequestError):
    """No such route, model, job or picture."""

    status = 404

    def __init__(self, message: str, *, code: str = "not_found", param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    status = 405

    def __init__(self, message: str) -> None:
        super().__init__(message, code="method_not_allowed")


class Conflict(RequestError):
    """The request does not go with what there is: its idempotency key belongs to another request,
    or the process ends."""

    status = 409

    def __init__(
        self,
        message: str,
        *,
        code: str = "idempotency_conflict",
        param: str | None = "Idempotency-Key",
    ) -> None:
        super().__init__(message, code=code, param=param)


class BodyTooLarge(RequestError):
    """The request's body is over the limit."""

    status = 413

    def __init__(self, limit: int, size: int | None = None, *, encoding: str | None = None) -> None:
        """`encoding` is the one that it came in, if its size is that of what comes out."""
        body = "The request's body" if size is None else f"The request's body of {size} bytes"
        body += "" if encoding is None else f", decoded from {encoding},"
        super().__init__(f"{body} is over the limit of {limit} bytes.", code="body_too_large")


class UnsupportedMedia(RequestError):
    """The request's content type is not one that the route reads, or a file of it is of a kind that
    is not read."""

    status = 415

    def __init__(
        self, message: str, *, code: str = "unsupported_media_type", param: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)


class UnsupportedEncoding(UnsupportedMedia):
    """The request's content encoding is not one that is undone; the answer names those that are
    (RFC 9110, 15.5.16)."""

    TAKEN = "gzip, deflate, identity"

    def __init__(self, encoding: str) -> None:
        super().__init__(f"The content encoding is {shown(encoding)}; send gzip, deflate or none.")


class Refused(RequestError):
    """Admission refused the request: it would wait too long. Nothing was run."""

    status = 429
    type = "rate_limit_error"

    def __init__(
        self, message: str, *, retry_after: float, code: RefusalReason = "queue_full"
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class Cancelled(RequestError):
    """The caller left or cancelled the job."""

    status = 499
    type = "cancelled"

    def __init__(self, message: str = "The request was cancelled.") -> None:
        super().__init__(message, code="cancelled")


class Unavailable(RequestError):
    """The server does not take work now."""

    status = 503
    type = "unavailable"

    def __init__(self, message: str, *, code: str, retry_after: float | None) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class EngineClosed(Unavailable):
    """The engine has been closed and takes no more jobs."""

    def __init__(self, message: str = "The engine is closed.") -> None:
        super().__init__(message, code="draining", retry_after=10)


class DeviceFailed(Unavailable):
    """The device has failed for good, as `reason` says; only another process can use it again."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The server's device has failed ({reason}); send the request again, to another "
            f"server.",
            code="device_failed",
            retry_after=10,
        )


class DeadlineExceeded(RequestError):
    """The job was not done in the time it was given."""

    status = 504
    type = "timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="deadline_exceeded")
