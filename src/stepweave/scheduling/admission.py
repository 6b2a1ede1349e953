"""Admission: what is let in, and when to come back with what is not."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, get_args

from stepweave.errors import Refused

Reason = Literal["queue_full", "wait", "deadline", "memory"]
REASONS: tuple[Reason, ...] = get_args(Reason)

UNKNOWN_SECONDS = 5.0  # Retry-After before anything has been timed
LEAD = 4  # places on average that become free while one is kept: their ends come unevenly
PROMISES = 1024  # at most
GRACE = 5.0  # seconds that a place is kept for a client that is late


@dataclass(frozen=True)
class Outlook:
    """What a request would meet if it were let in now, in seconds."""

    finish: float  # until it is done
    solo: float  # what it takes alone; 0 if unknown
    fits: bool = True  # into the memory that is left


class Admission:
    """Places for requests, up to a limit. A request holds its place until its picture files are encoded.

    `drain` gives the predicted seconds until all that are in flight are done, or None if that is unknown. A request that finds
    no place is told when one will be free, and a place is kept for it then: for the same request, by its `token`, which others
    cannot take unless the server were idle. Otherwise, under steady overload, those who wait as told would be overtaken by those
    who come at random. Nothing is promised for later than `max_wait`.
    """

    def __init__(
        self,
        limit: int,
        drain: Callable[[], float | None],
        *,
        max_wait: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.max_wait = max_wait
        self.refused: Counter[Reason] = Counter()
        self._drain = drain
        self._clock = clock
        self._taken = 0
        self._promised: dict[Hashable, float] = {}  # by token, when a place will be free
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet answered: waiting, running, or being encoded."""
        return self._taken

    def enter(
        self,
        token: Hashable = None,
        outlook: Callable[[], Outlook | None] = lambda: None,
        deadline: float | None = None,
    ) -> Outlook | None:
        """Take a place; what was expected of it.

        Args:
            token: what the same request will have when it comes again; None if that cannot be told.
            outlook: predicts what the request would meet; asked only if there is a place.
            deadline: seconds from now.

        Raises Refused, with the predicted wait, if there is no place, the wait would exceed `max_wait`, the deadline cannot be
        met, or the memory that is left is too little while others use it.
        """
        with self._lock:
            now = self._clock()
            self._lapse(now)
            if self._taken and self._taken + self._kept(token, now) >= self.limit:
                raise self._full(token, now)
            self._promised.pop(token, None)
            expected = outlook()
            if expected is not None:
                self._check(expected, deadline)
            self._taken += 1
            return expected

    def leave(self) -> None:
        """Give the place back, once for each `enter`."""
        with self._lock:
            self._taken -= 1

    def _check(self, expected: Outlook, deadline: float | None) -> None:
        if deadline is not None and expected.finish > deadline:
            raise self._refusal(
                "deadline",
                f"deadline_ms is {deadline * 1000:.0f}; the picture would be done in {expected.finish:.1f} s, "
                f"of which it takes {expected.solo:.1f} s alone.",
                expected.finish - max(deadline, expected.solo),
            )
        wait = expected.finish - expected.solo
        if wait > self.max_wait:
            raise self._refusal(
                "wait", f"The request would wait {wait:.0f} s; the limit is {self.max_wait:g} s.", wait - self.max_wait
            )
        if not expected.fits and self._taken:
            raise self._refusal("memory", "There is not enough memory left for it beside the others.", self._interval())

    def _full(self, token: Hashable, now: float) -> Refused:
        due = self._promised.get(token)
        ahead = len(self._promised)
        seconds = (ahead + 1) * self._interval() if due is None else max(due - now, self._interval())
        refusal = self._refusal(
            "queue_full", f"{self._taken} requests are in flight; the limit is {self.limit}.", seconds
        )
        assert refusal.retry_after is not None
        if token is not None and (due is not None or (ahead < PROMISES and refusal.retry_after <= self.max_wait)):
            self._promised[token] = now + refusal.retry_after
        return refusal

    def _refusal(self, reason: Reason, message: str, seconds: float) -> Refused:
        self.refused[reason] += 1
        return Refused(message, retry_after=seconds, code=reason)

    def _interval(self) -> float:
        """Seconds until a place will be free, on average."""
        drain = self._drain()
        return UNKNOWN_SECONDS if drain is None else drain / max(1, self._taken)

    def _kept(self, token: Hashable, now: float) -> int:
        """Places that are kept now, for others with older promises: each from shortly before its owner comes, to be free then."""
        own = self._promised.get(token, float("inf"))
        lead = 1 + LEAD * self._interval() if self._promised else 0.0
        return sum(due - lead <= now for due in self._promised.values() if due < own)

    def _lapse(self, now: float) -> None:
        for token in [token for token, due in self._promised.items() if due + GRACE < now]:
            del self._promised[token]
