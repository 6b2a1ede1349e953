"""The stages of a shutdown: announce it, accept work for a while, refuse it, and end the rest."""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from stepweave.errors import ConflictError

TOKEN_FILE = "drain-token"  # in the state directory


class Drain:
    """Whether a server is draining, and how far it is. For the event loop's thread only.

    Once a drain is announced, readiness fails, and work is still accepted for `notice` seconds,
    until load balancers have noticed. Then it is refused, and `end` is called `grace` seconds
    later, unless the drain was cancelled. A terminated process refuses work immediately. All times
    are seconds of the monotonic clock.
    """

    def __init__(self, notice: float, grace: float, end: Callable[[], None]) -> None:
        # called with True when a drain is announced, with False when it is cancelled
        self.listeners: list[Callable[[bool], None]] = []
        self.ending_at: float | None = None  # when unfinished work is cancelled
        self.terminated = False  # by a signal: cannot be cancelled
        self._notice = notice
        self._grace = grace
        self._end = end
        self._refusing_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def announced(self) -> bool:
        return self._refusing_at is not None

    @property
    def refusing(self) -> bool:
        """Whether new work is refused."""
        return self._refusing_at is not None and (
            self.terminated or time.monotonic() >= self._refusing_at
        )

    @property
    def ended(self) -> bool:
        """Whether unfinished work has been cancelled."""
        return self.ending_at is not None and time.monotonic() >= self.ending_at

    @property
    def overdue(self) -> bool:
        """Whether the grace period is over and the process got no signal to end."""
        return self.ended and not self.terminated

    def announce(self) -> None:
        """Announce the drain, unless it has been announced."""
        if not self.announced:
            self._begin(self._notice)

    def terminate(self) -> None:
        """Refuse new work for good. Accepted work keeps the grace period of an earlier drain."""
        if self.terminated:
            return
        self.terminated = True
        if not self.announced:
            self._begin(0.0)

    def take_back(self) -> None:
        """Cancel the drain and accept work again. Raises ConflictError once terminated."""
        if self.terminated:
            raise ConflictError(
                "The process is terminating: its drain cannot be cancelled.",
                code="terminating",
                param=None,
            )
        self._refusing_at = self.ending_at = None
        if self._timer is not None:
            self._timer.cancel()
        self._tell()

    def _tell(self) -> None:
        for listener in self.listeners:
            listener(self.announced)

    def _begin(self, notice: float) -> None:
        self._refusing_at = time.monotonic() + notice
        self.ending_at = self._refusing_at + self._grace
        self._timer = asyncio.get_running_loop().call_later(notice + self._grace, self._end)
        self._tell()


class DrainToken:
    """The secret that `POST /drain` requires: new at each start, in a file of mode 0600, so that
    only users who may read the state directory can drain the server."""

    def __init__(self, directory: Path) -> None:
        """Write the file. Raises OSError."""
        self.path = directory / TOKEN_FILE
        self._token = secrets.token_hex(32)
        partial = self.path.with_suffix(".partial")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            os.fchmod(file.fileno(), 0o600)  # also if the file existed
            file.write(self._token)
        os.replace(partial, self.path)

    def matches(self, authorization: str) -> bool:
        """Whether an `Authorization` header contains the token (RFC 6750)."""
        scheme, _, token = authorization.partition(" ")
        same = hmac.compare_digest(token.strip().encode("latin-1", "replace"), self._token.encode())
        return scheme.lower() == "bearer" and same
