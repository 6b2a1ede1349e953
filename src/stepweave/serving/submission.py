"""A request for images, as an HTTP surface submits it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

from stepweave.parameters import ImageRequest, ResponseFormat, Sources
from stepweave.serving.admission import Reservation


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request, its client, and how to answer it."""

    request: ImageRequest
    n: int = 1  # images
    model: str | None = None  # the requested name
    strength: float | None = None  # of an edit
    # reads an edit's images; called only if they are needed
    sources: Callable[[], Awaitable[Sources]] | None = None
    files: bytes = b""  # a digest of an edit's files
    asked: str = ""  # the body, if it is not `request`
    owner: str | None = None  # of the job; None without API keys
    client: Hashable = None  # to whom admission may promise a place
    key: str | None = None  # for idempotency: requests of one owner and key share a job
    reservation: Reservation | None = None
    previews: int = 0  # number requested
    warnings: tuple[str, ...] = ()  # from reading the request
    response_format: ResponseFormat = "b64_json"  # if the result is fetched later
    detached: bool = False  # the job continues when no client waits for it

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the request in hex, by which idempotency and admission recognise a retry."""
        body = self.asked or self.request.model_dump_json(exclude_none=True)
        return hashlib.sha256(self.files + body.encode()).hexdigest()
