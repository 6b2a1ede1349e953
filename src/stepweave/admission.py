"""Admission: how many requests may be in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable

from stepweave.errors import Refused

UNKNOWN_SECONDS = 5.0  # Retry-After before any job has been timed


class Admission:
    """Places for requests, up to a limit. A request holds its place until its picture files are encoded.

    `interval` gives the mean seconds between the ends of the last jobs, or None: a place is likely free after so long.
    """

    def __init__(self, limit: int, interval: Callable[[], float | None]) -> None:
        self.limit = limit
        self._interval = interval
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet answered: waiting, running, or being encoded."""
        return self._taken

    def enter(self) -> None:
        """Take a place. Raises Refused, with the predicted wait, if there is none."""
        with self._lock:
            if self._taken >= self.limit:
                wait = self._interval()
                raise Refused(
                    f"{self._taken} requests are in flight; the limit is {self.limit}.",
                    retry_after=UNKNOWN_SECONDS if wait is None else wait,
                )
            self._taken += 1

    def leave(self) -> None:
        """Give the place back, once for each `enter`."""
        with self._lock:
            self._taken -= 1
