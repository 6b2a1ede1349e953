"""How a server leaves: it announces that, still takes work for a while, refuses it, and ends what
is left."""

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
    """Whether a server leaves, and how far it is. For the event loop's thread.

    From the announcement on, load balancers are told to send nothing more, and for `notice`
    seconds, until they have heard, work is still taken. Then it is refused, and `end` is called
    `grace` seconds later, unless the drain was taken back. A process that is terminated goes
    straight to refusing. All times are seconds of the monotonic clock.
    """

    def __init__(self, notice: float, grace: float, end: Callable[[], None]) -> None:
        # told of the announcement, and that it is taken back
        self.listeners: list[Callable[[bool], None]] = []
        self.ending_at: float | None = None  # when what is left is told to end
        self.terminated = False  # by a signal: not to be taken back
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
        """Whether what was left has been told to end."""
        return self.ending_at is not None and time.monotonic() >= self.ending_at

    @property
    def overdue(self) -> bool:
        """Whether what was left has been ended, and the process was not told to end: nobody else
        will do that."""
        return self.ended and not self.terminated

    def announce(self) -> None:
        """No effect once announced."""
        if not self.announced:
            self._begin(self._notice)

    def terminate(self) -> None:
        """The process was told to end. What was accepted has its grace from the end of the notice
        on, if one was given."""
        if self.terminated:
            return
        self.terminated = True
        if not self.announced:
            self._begin(0.0)

    def take_back(self) -> None:
        """Take work as before. Raises ConflictError once the process was told to end."""
        if self.terminated:
            raise ConflictError(
                "The process was told to end: its drain cannot be taken back.",
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
    """What proves that who drains a server may read its state directory: a secret, new at each
    start, in a file of mode 0600."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError if the file cannot be written."""
        self.path = directory / TOKEN_FILE
        self._token = secrets.token_hex(32)
        partial = self.path.with_suffix(".partial")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            os.fchmod(file.fileno(), 0o600)  # also of a file that was there
            file.write(self._token)
        os.replace(partial, self.path)

    def matches(self, authorization: str) -> bool:
        """Whether a header `Authorization` bears it (RFC 6750)."""
        scheme, _, given = authorization.partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token.encode())
        return scheme.lower() == "bearer" and same
