"""Every error that Stepweave raises, with its HTTP status, type and code.

StepweaveError (500)
├── ConfigError                          a setting is unknown or invalid: the server does not start
├── LoadError                            the model cannot be loaded
├── EngineMisuseError                    a wrong use of the engine
├── IsolationError                       a component of a pipeline cannot be shared between calls
├── OutOfMemoryError                     the job exceeds the device's memory, even alone
├── NonFiniteError                       the model returned NaN or infinite values
├── ImageCountError                      the pipeline made more or fewer images than requested
│   └── NoImagesError                    it made something other than images
└── RequestError                         the request cannot be served
    ├── InvalidRequestError (400)        a value is not allowed; `param` names the field
    │   ├── DeadlineTooShortError        not even an idle server could meet the deadline
    │   └── LoraError                    the file of a LoRA cannot be used with this model
    ├── ContentFlaggedError (400)        the safety checker flagged an image, and the server refuses
    ├── AuthenticationError (401)        the API key is missing or wrong
    ├── ForbiddenError (403)             the API key may not do this
    ├── NotFoundError (404)              no such route, model, job or image
    │   └── LoraNotFoundError            no LoRA has this name
    ├── MethodNotAllowedError (405)
    ├── ConflictError (409)              the idempotency key is in use, or the process is ending
    ├── BodyTooLargeError (413)
    ├── UnsupportedMediaTypeError (415)
    │   └── UnsupportedEncodingError     the content encoding is not supported
    ├── AdmissionError (429)             refused by admission; `retry_after` says when to retry
    ├── RequestCancelledError (499)      the client disconnected or cancelled
    ├── DeadlineExceededError (504)      the job missed its deadline
    └── UnavailableError (503)           loading, draining, failed; `retry_after` says when to retry
        ├── EngineClosedError            the engine is closed
        └── DeviceFailedError            the device has failed, until the process is restarted

Names of errors end in Error. Exceptions outside of the tree are signals within the engine or one
package; their names do not end in Error, and no package above the engine sees those of another.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import ClassVar, Literal, Self, get_args

RefusalReason = Literal["queue_full", "wait", "deadline", "memory"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)  # codes of 429
Code = Literal[  # explained in docs/http.md
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
    "forbidden",
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
    "lora_not_found",
    "lora_unusable",
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
SHOWN = 80  # characters of a value in a message


def shown(value: object) -> str:
    """The value for a message: its repr, cut to `SHOWN` characters."""
    text = repr(value[: 2 * SHOWN]) if isinstance(value, (str, bytes)) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a message about an unknown name: the known one that is like it, if there is
    one."""
    meant = nearest(name, known)
    return f" (did you mean {meant}?)" if meant else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is like an unknown one, if there is one."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def duration(seconds: float) -> str:
    """Seconds for a message, rounded up to three digits: never less than a limit, never 0."""
    seconds = max(seconds, 1e-3)
    unit = 10.0 ** min(0, math.floor(math.log10(seconds)) - 2)
    rounded = math.ceil(round(seconds / unit, 6)) * unit
    return f"{rounded:.10g} s"


class StepweaveError(Exception):
    """Base of all. `message` never contains a traceback or a path of the server; `code` is one of
    `Code`, or, in BentoML's own answers, the name of the status."""

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
        """A copy to raise: a traceback keeps the frames alive wherever the error was raised."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


class ConfigError(StepweaveError):
    """A setting is unknown or invalid."""

    code = "config_error"


class LoadError(StepweaveError):
    """The model cannot be loaded."""

    code = "load_failed"


class EngineMisuseError(StepweaveError):
    """A wrong use of the engine."""

    code = "engine_misuse"


class OutOfMemoryError(StepweaveError):
    """The job exceeds the device's memory, even alone."""

    code = "out_of_memory"


_NON_FINITE = (
    "The result is not finite: the model returned NaN or infinite values. Other parameters may "
    "work; if all requests fail, the weights are damaged, or overflow in the server's "
    "STEPWEAVE_DTYPE (try bfloat16 or float32)."
)


class NonFiniteError(StepweaveError):
    """The model returned NaN or infinite values."""

    code = "non_finite"

    def __init__(self, message: str = _NON_FINITE) -> None:
        super().__init__(message)


class ImageCountError(StepweaveError):
    """The pipeline made more or fewer images than requested."""

    code = "generation_failed"


class NoImagesError(ImageCountError):
    """The pipeline made something other than images."""

    code = "no_images"


class RequestError(StepweaveError):
    """The request cannot be served."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequestError(RequestError):
    """A value of the request is not allowed."""

    code = "invalid_value"

    def __init__(self, message: str, *, code: Code | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)


class DeadlineTooShortError(InvalidRequestError):
    """Not even an idle server could meet the deadline: nothing was run, and a retry is useless."""

    code = "deadline_too_short"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="deadline_ms")


class ContentFlaggedError(RequestError):
    """The pipeline's safety checker flagged an image, and the server refuses such images."""

    code = "content_policy_violation"

    def __init__(self, index: int, names: list[str]) -> None:
        super().__init__(
            f"Image {index} was flagged by the pipeline ({', '.join(names)}); this server does not "
            "return flagged images. Try another prompt or seed."
        )


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(RequestError):
    """No such route, model, job or image."""

    status = 404
    code = "not_found"


class ForbiddenError(RequestError):
    """The API key may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class LoraNotFoundError(NotFoundError):
    """No adapter has this name."""

    code = "lora_not_found"


class LoraError(InvalidRequestError):
    """An adapter's file cannot be used with this model."""

    code = "lora_unusable"


class MethodNotAllowedError(RequestError):
    """The route does not support the method."""

    status = 405
    code = "method_not_allowed"


class ConflictError(RequestError):
    """The idempotency key was used for a different request, or the process is ending."""

    status = 409
    code = "idempotency_conflict"

    def __init__(
        self, message: str, *, code: Code | None = None, param: str | None = "Idempotency-Key"
    ) -> None:
        super().__init__(message, code=code, param=param)


class BodyTooLargeError(RequestError):
    """The request body is over the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int, size: int | None = None, *, encoding: str | None = None) -> None:
        """`size` in bytes, after decoding from `encoding` if that is set."""
        body = "The request's body" if size is None else f"The request's body of {size} bytes"
        body += "" if encoding is None else f", decoded from {encoding},"
        super().__init__(f"{body} is over the limit of {limit} bytes.")


class UnsupportedMediaTypeError(RequestError):
    """The route does not support the request's content type, or the type of one of its files."""

    status = 415
    code = "unsupported_media_type"


class UnsupportedEncodingError(UnsupportedMediaTypeError):
    """The content encoding is not supported; the answer lists others (RFC 9110, 15.5.16)."""

    TAKEN = "gzip, deflate, identity"

    def __init__(self, encoding: str) -> None:
        super().__init__(f"The content encoding is {shown(encoding)}; send gzip, deflate or none.")


class AdmissionError(RequestError):
    """Admission refused the request; nothing was run."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(
        self, message: str, *, retry_after: float, code: RefusalReason | None = None
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class RequestCancelledError(RequestError):
    """The client disconnected or cancelled the job."""

    status = 499
    type = "cancelled"
    code = "cancelled"

    def __init__(self, message: str = "The request was cancelled.") -> None:
        super().__init__(message)


class UnavailableError(RequestError):
    """The server does not accept requests now."""

    status = 503
    type = "unavailable"
    code = "unavailable"

    def __init__(
        self, message: str, *, code: Code | None = None, retry_after: float | None
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class EngineClosedError(UnavailableError):
    """The engine is closed and accepts no more jobs."""

    code = "draining"

    def __init__(self, message: str = "The engine is closed.") -> None:
        super().__init__(message, retry_after=10)


class DeviceFailedError(UnavailableError):
    """The device has failed, for `reason`; it needs a new process."""

    code = "device_failed"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The server's device has failed ({reason}); retry the request with another server.",
            retry_after=10,
        )


class DeadlineExceededError(RequestError):
    """The job missed its deadline."""

    status = 504
    type = "timeout"
    code = "deadline_exceeded"
