"""Every error that Stepweave raises, each with the HTTP status, type and code it becomes.

StepweaveError (500)
├── ConfigError                          a setting is unknown or malformed: no server starts
├── LoadError                            the model cannot be loaded
├── EngineMisuseError                    the engine is used in a way that cannot work
├── IsolationError                       a component of a pipeline cannot be shared between calls
├── OutOfMemoryError                     the job does not fit into the device's memory, even alone
├── NonFiniteError                       the model gave NaN or infinite values
├── ImageCountError                      the pipeline made more or fewer images than were asked for
│   └── NoImagesError                    it made something else than images
└── RequestError                         the caller's request cannot be served
    ├── InvalidRequestError (400)        a value is not allowed; `param` names the field
    │   └── DeadlineTooShortError        no server like this one could meet it, however idle
    ├── ContentFlaggedError (400)        the safety checker flagged an image, and such are refused
    ├── AuthenticationError (401)        keys are set, and the request has none of them
    ├── NotFoundError (404)              no such route, model, job or image
    ├── MethodNotAllowedError (405)
    ├── ConflictError (409)              the idempotency key is of another request, or the end began
    ├── BodyTooLargeError (413)
    ├── UnsupportedMediaTypeError (415)
    │   └── UnsupportedEncodingError     its content encoding is not one that is undone
    ├── AdmissionError (429)             admission refused it; `retry_after` says when to retry
    ├── RequestCancelledError (499)      the caller left or cancelled
    ├── DeadlineExceededError (504)      the job was not done in the time it was given
    └── UnavailableError (503)           loading, draining, failed; `retry_after` says when to retry
        ├── EngineClosedError            the engine has been closed
        └── DeviceFailedError            the device has failed, until the process is started again

Names of errors end in Error. Exceptions outside of the tree are signals inside the engine, or in
one package: they are no errors, their names do not end so, and no package above the engine sees
those of another.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self, get_args

RefusalReason = Literal["queue_full", "wait", "deadline", "memory"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)  # codes of 429
# for programs, each with its meaning in docs/http.md
Code = Literal[
    "ambiguous_length",
    "body_too_large",
    "cancel_ignored",
    "cancelled",
    "config_error",
    "content_policy_violation",
    "cross_site",
    "deadline",
    "deadline_exceeded",
    "deadline_too_short",
    "decoder_failed",
    "device_failed",
    "draining",
    "engine_failed",
    "engine_misuse",
    "engine_stuck",
    "expired",
    "file_too_large",
    "generation_failed",
    "idempotency_conflict",
    "image_not_found",
    "image_too_complex",
    "image_too_slow",
    "internal_error",
    "invalid_api_key",
    "invalid_encoding",
    "invalid_form",
    "invalid_http",
    "invalid_json",
    "invalid_request",
    "invalid_target",
    "invalid_value",
    "isolation",
    "job_not_found",
    "jobs_list_disabled",
    "load_failed",
    "loading",
    "memory",
    "method_not_allowed",
    "missing_field",
    "model_not_found",
    "no_base_url",
    "no_images",
    "non_finite",
    "not_delivered",
    "not_found",
    "out_of_memory",
    "queue_full",
    "restarted",
    "store_failed",
    "terminating",
    "too_many_connections",
    "unavailable",
    "unknown_field",
    "unsupported",
    "unsupported_image",
    "unsupported_media_type",
    "untrusted_host",
    "wait",
]
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
    """Base of all. `message` never holds a traceback or a server path; `code` is one of `Code`, or
    for what BentoML answers itself the name of the status."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: Code | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.param = param
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))

    def again(self) -> Self:
        """The same, to be raised once more: an error's traceback holds on to all who raise it."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


class ConfigError(StepweaveError):
    """A setting is unknown or malformed."""

    code = "config_error"


class LoadError(StepweaveError):
    """The model cannot be loaded."""

    code = "load_failed"


class EngineMisuseError(StepweaveError):
    """The engine is used in a way that cannot work."""

    code = "engine_misuse"


class OutOfMemoryError(StepweaveError):
    """The device's memory is too small for the job, even by itself."""

    code = "out_of_memory"


_NON_FINITE = (
    "The result is not finite: the model gave NaN or infinite values. Other parameters may work; "
    "if all requests fail, the weights are damaged, or overflow in the server's STEPWEAVE_DTYPE "
    "(try bfloat16 or float32)."
)


class NonFiniteError(StepweaveError):
    """The model gave NaN or infinite values, of which no image can be made."""

    code = "non_finite"

    def __init__(self, message: str = _NON_FINITE) -> None:
        super().__init__(message)


class ImageCountError(StepweaveError):
    """The pipeline made more or fewer images than were asked for."""

    code = "generation_failed"


class NoImagesError(ImageCountError):
    """The pipeline made something else than images."""

    code = "no_images"


class RequestError(StepweaveError):
    """The caller's request cannot be served."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequestError(RequestError):
    """A value of the request is not allowed."""

    code = "invalid_value"

    def __init__(self, message: str, *, code: Code | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)


class DeadlineTooShortError(InvalidRequestError):
    """The job takes longer than its deadline even if it is the only one: nothing was run, and
    coming back would not help."""

    code = "deadline_too_short"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="deadline_ms")


class ContentFlaggedError(RequestError):
    """The pipeline's safety checker flagged an image, and the server refuses such images."""

    code = "content_policy_violation"

    def __init__(self, index: int, names: list[str]) -> None:
        super().__init__(
            f"Image {index} was flagged by the pipeline ({', '.join(names)}); this server does not "
            "return flagged images. Another prompt or seed may pass."
        )


class AuthenticationError(RequestError):
    """API keys are set, and the request has none of them."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(RequestError):
    """No such route, model, job or image."""

    status = 404
    code = "not_found"


class MethodNotAllowedError(RequestError):
    """The route exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class ConflictError(RequestError):
    """The request does not go with what there is: its idempotency key belongs to another request,
    or the process ends."""

    status = 409
    code = "idempotency_conflict"

    def __init__(
        self, message: str, *, code: Code | None = None, param: str | None = "Idempotency-Key"
    ) -> None:
        super().__init__(message, code=code, param=param)


class BodyTooLargeError(RequestError):
    """The request's body is over the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int, size: int | None = None, *, encoding: str | None = None) -> None:
        """`encoding` is the one that it came in, if its size is that of what comes out."""
        body = "The request's body" if size is None else f"The request's body of {size} bytes"
        body += "" if encoding is None else f", decoded from {encoding},"
        super().__init__(f"{body} is over the limit of {limit} bytes.")


class UnsupportedMediaTypeError(RequestError):
    """The request's content type is not one that the route reads, or a file of it is of a kind that
    is not read."""

    status = 415
    code = "unsupported_media_type"


class UnsupportedEncodingError(UnsupportedMediaTypeError):
    """The request's content encoding is not one that is undone; the answer names those that are
    (RFC 9110, 15.5.16)."""

    TAKEN = "gzip, deflate, identity"

    def __init__(self, encoding: str) -> None:
        super().__init__(f"The content encoding is {shown(encoding)}; send gzip, deflate or none.")


class AdmissionError(RequestError):
    """Admission refused the request: it would wait too long. Nothing was run."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(
        self, message: str, *, retry_after: float, code: RefusalReason | None = None
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class RequestCancelledError(RequestError):
    """The caller left or cancelled the job."""

    status = 499
    type = "cancelled"
    code = "cancelled"

    def __init__(self, message: str = "The request was cancelled.") -> None:
        super().__init__(message)


class UnavailableError(RequestError):
    """The server does not take work now."""

    status = 503
    type = "unavailable"
    code = "unavailable"

    def __init__(
        self, message: str, *, code: Code | None = None, retry_after: float | None
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class EngineClosedError(UnavailableError):
    """The engine has been closed and takes no more jobs."""

    code = "draining"

    def __init__(self, message: str = "The engine is closed.") -> None:
        super().__init__(message, retry_after=10)


class DeviceFailedError(UnavailableError):
    """The device has failed for good, as `reason` says; only another process can use it again."""

    code = "device_failed"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The server's device has failed ({reason}); send the request again, to another "
            f"server.",
            retry_after=10,
        )


class DeadlineExceededError(RequestError):
    """The job was not done in the time it was given."""

    status = 504
    type = "timeout"
    code = "deadline_exceeded"
