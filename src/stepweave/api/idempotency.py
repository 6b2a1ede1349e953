"""The `Idempotency-Key` of a request: requests with the same key and body are one job."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from stepweave.api.auth import asker_of, owner_of
from stepweave.errors import InvalidRequestError, shown
from stepweave.parameters import ImageRequest
from stepweave.serving.server import Server
from stepweave.serving.submission import Submission

MAX_KEY = 255  # characters of an idempotency key


def submission_of(
    request: Request, body: ImageRequest, *, part: int | None = None, **options: Any
) -> Submission:
    """What an HTTP request submits; `options` are further ones of Submission.

    A key is for one route and, where a request is several jobs, for each `part` of it. Raises
    InvalidRequestError for an invalid key.
    """
    return Submission(
        request=body,
        owner=owner_of(request),
        client=asker_of(request),
        key=key_of(request, part),
        strength=getattr(body, "strength", None),
        **options,
    )


async def joins(request: Request, server: Server) -> bool:
    """Whether a request's key has a job already, so that it may need no place. Raises
    InvalidRequestError for an invalid key."""
    key = key_of(request)
    if key is None or server.jobs is None:
        return False
    return await server.jobs.store.by_key(owner_of(request), key) is not None


def key_of(request: Request, part: int | None = None) -> str | None:
    """The key of a request's job, if it has one. Raises InvalidRequestError for an invalid one."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise InvalidRequestError(
            f"Idempotency-Key is {shown(key)}; it must have 1 to {MAX_KEY} printable characters.",
            param="Idempotency-Key",
        )
    return f"{request.url.path}{'' if part is None else f'#{part}'} {key}"
