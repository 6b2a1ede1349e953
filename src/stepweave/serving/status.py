"""Where a server stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepweave.errors import Code, UnavailableError

Stage = Literal[
    "starting",
    "importing",
    "loading",
    "warming_up",
    "ready",
    "draining",
    "closed",
    "failed",
    "stuck",
]
LOADING_RETRY_SECONDS = 5
DRAINING_RETRY_SECONDS = 1  # another server takes it at once
# code and Retry-After of those in which it does not load
_REFUSALS: dict[Stage, tuple[Code, int | None]] = {
    "failed": ("load_failed", None),
    "stuck": ("engine_stuck", None),
    "draining": ("draining", DRAINING_RETRY_SECONDS),
    "closed": ("draining", LOADING_RETRY_SECONDS),
}


@dataclass(frozen=True)
class Status:
    """Where the server stands. `progress` is the share of the way to `ready`, 0 to 1."""

    stage: Stage
    progress: float
    message: str = ""

    @property
    def ready(self) -> bool:
        return self.stage == "ready"

    def unavailable(self) -> UnavailableError:
        """What to answer in it, unless it is ready."""
        code, seconds = _REFUSALS.get(self.stage, ("loading", LOADING_RETRY_SECONDS))
        return UnavailableError(
            f"The server is not ready: {self.stage}, {self.message or 'please wait'}.",
            code=code,
            retry_after=seconds,
        )
