"""A request for images as a surface submits it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

from stepweave.parameters import ImageRequest, ResponseFormat, Sources
from stepweave.serving.admission import Reservation


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is asked for, by whom, and how it is to be answered."""

    request: ImageRequest
    n: int = 1  # images
    model: str | None = None  # the name that it is asked for by, if any
    strength: float | None = None  # of an edit
    # reads an edit's images; called only where they are needed
    sources: Callable[[], Awaitable[Sources]] | None = None
    files: bytes = b""  # a digest of an edit's files
    asked: str = ""  # its body as it was read, where that is not `request`
    owner: str | None = None  # whose its job is; None without keys
    client: Hashable = None  # who asks, to whom a place is promised if there is none
    key: str | None = None  # requests of one owner and one key are one job
    reservation: Reservation | None = None  # of its place, if it has one
    previews: int = 0  # wanted on the way
    warnings: tuple[str, ...] = ()  # before those that come with its prompts
    response_format: ResponseFormat = "b64_json"  # of its result, if that is asked for later
    detached: bool = False  # its job goes on without anybody who waits for it

    @cached_property
    def fingerprint(self) -> str:
        """What it asks for, in hex digits: by it, idempotency and admission know it again."""
        body = self.asked or self.request.model_dump_json()
        return hashlib.sha256(self.files + body.encode()).hexdigest()
