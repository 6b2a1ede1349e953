"""The status of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepweave.errors import Code, UnavailableError

Stage = Literal[
    "starting",
    "importing",
    "downloading",
    "loading",
    "warming_up",
    "ready",
    "draining",
    "closed",
    "failed",
    "stuck",
]
LOADING_RETRY_SECONDS = 5
DRAINING_RETRY_SECONDS = 1  # another server may accept the request immediately
# code and Retry-After of stages other than those of a start
_REFUSALS: dict[Stage, tuple[Code, int | None]] = {
    "failed": ("load_failed", None),
    "stuck": ("engine_stuck", None),
    "draining": ("draining", DRAINING_RETRY_SECONDS),
    "closed": ("draining", LOADING_RETRY_SECONDS),
}


@dataclass(frozen=True)
class Status:
    """The stage of a server; `progress` to `ready` is from 0 to 1."""

    stage: Stage
    progress: float
    message: str = ""

    @property
    def ready(self) -> bool:
        return self.stage == "ready"

    def unavailable(self) -> UnavailableError:
        """The error to answer in this status."""
        code, seconds = _REFUSALS.get(self.stage, ("loading", LOADING_RETRY_SECONDS))
        message = f"The server is not ready: {self.stage}, {self.message or 'retry later'}."
        return UnavailableError(message, code=code, retry_after=seconds)
