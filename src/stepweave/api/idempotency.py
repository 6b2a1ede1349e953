"""The `Idempotency-Key` header: requests of one key and one body are one job."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from starlette.requests import Request

from stepweave.api.auth import owner_of
from stepweave.errors import InvalidRequestError, shown
from stepweave.serving.admission import Reservation
from stepweave.serving.jobs import Claim, Followed
from stepweave.serving.request import ActiveRequest
from stepweave.serving.resources import Answer
from stepweave.serving.server import Server

MAX_KEY = 255  # characters of an idempotency key


def claim_of(request: Request, asked: str, digest: bytes = b"", part: int | None = None) -> Claim:
    """What a request says of itself: `asked` is its body as it was read, `digest` is of its files.

    A key is for one route and, where a request is several jobs, for each `part` of it. Raises
    InvalidRequestError for a key that is none.
    """
    return Claim(
        owner_of(request), _key(request, part), hashlib.sha256(digest + asked.encode()).hexdigest()
    )


async def start(
    server: Server,
    claim: Claim,
    accept: Callable[[], Awaitable[ActiveRequest]],
    *,
    detached: bool = False,
    reservation: Reservation | None = None,
) -> Followed:
    """As `Jobs.start`. A request that joins another needs no place, and gives back what it has
    reserved."""
    assert server.jobs is not None
    try:
        return await server.jobs.start(claim, accept, detached=detached)
    finally:
        if reservation is not None:
            reservation.release()


async def generate(
    server: Server,
    claim: Claim,
    accept: Callable[[], Awaitable[ActiveRequest]],
    *,
    reservation: Reservation | None = None,
) -> Answer:
    """Start a request or join the first of its key, and wait for its images. Cancelling the
    awaiting task lets go of it."""
    job = await start(server, claim, accept, reservation=reservation)
    with job.held():
        return await job.result()


async def joins(request: Request, server: Server) -> bool:
    """Whether a request's key has a job already, so that it may need no place. Raises
    InvalidRequestError for a key that is none."""
    key = _key(request, None)
    if key is None or server.jobs is None:
        return False
    return await server.jobs.store.by_key(owner_of(request), key) is not None


def _key(request: Request, part: int | None) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise InvalidRequestError(
            f"Idempotency-Key is {shown(key)}; it must have 1 to {MAX_KEY} printable characters.",
            param="Idempotency-Key",
        )
    return f"{request.url.path}{'' if part is None else f'#{part}'} {key}"
