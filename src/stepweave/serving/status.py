"""Where a server stands."""

from __future__ import annotations

from dataclasses import dataclass

from stepweave.errors import Code, UnavailableError

LOADING_RETRY_SECONDS = 5
DRAINING_RETRY_SECONDS = 1  # another server takes it at once


@dataclass(frozen=True)
class Status:
    """Where the server stands. `progress` is the share of the way to `ready`, 0 to 1."""

    stage: str  # starting, importing, loading, warming_up, ready, draining, closed or failed
    progress: float
    message: str = ""

    def unavailable(self) -> UnavailableError:
        """What to answer in it, unless it is ready."""
        code: dict[str, Code] = {
            "failed": "load_failed",
            "draining": "draining",
            "closed": "draining",
            "stuck": "engine_stuck",
        }
        seconds = {"failed": None, "stuck": None, "draining": DRAINING_RETRY_SECONDS}
        return UnavailableError(
            f"The server is not ready: {self.stage}, {self.message or 'please wait'}.",
            code=code.get(self.stage, "loading"),
            retry_after=seconds.get(self.stage, LOADING_RETRY_SECONDS),
        )
