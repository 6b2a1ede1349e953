"""The status of a server."""

from __future__ import annotations

from dataclasses import dataclass

from stepweave.errors import Code, UnavailableError

LOADING_RETRY_SECONDS = 5
DRAINING_RETRY_SECONDS = 1  # another server may accept the request immediately


@dataclass(frozen=True)
class Status:
    """The stage of a server; `progress` to `ready` is from 0 to 1."""

    # starting, importing, loading, warming_up, ready, draining, closed, failed or stuck
    stage: str
    progress: float
    message: str = ""

    def unavailable(self) -> UnavailableError:
        """The error to answer in this status."""
        code: dict[str, Code] = {
            "failed": "load_failed",
            "draining": "draining",
            "closed": "draining",
            "stuck": "engine_stuck",
        }
        seconds = {"failed": None, "stuck": None, "draining": DRAINING_RETRY_SECONDS}
        return UnavailableError(
            f"The server is not ready: {self.stage}, {self.message or 'retry later'}.",
            code=code.get(self.stage, "loading"),
            retry_after=seconds.get(self.stage, LOADING_RETRY_SECONDS),
        )
