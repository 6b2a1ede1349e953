"""Admission: what is let in, and when to come back with what is not."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, get_args

from stepweave.errors import Refused

Reason = Literal["queue_full", "wait", "deadline", "memory"]
REASONS: tuple[Reason, ...] = get_args(Reason)

Promise = tuple[float, int, Hashable]  # when a place will be free, a number that tells equals apart, whose it is

UNKNOWN_SECONDS = 5.0  # Retry-After before anything has been timed
IMPOSSIBLE_SECONDS = 60.0  # Retry-After of a deadline shorter than what the job takes alone
PROBE_SECONDS = (
    30.0  # in which an idle server lets in one deadline that it thinks too short: what it learnt may be wrong
)
LEARNING = 0.1  # weight of the last promise in the share of those that were kept
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
    who come at random. Nothing is promised for later than `max_wait`. No more than half of the places are kept at a time, and
    the fewer the more clients do not come back.
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
        self._promised: list[Promise] = []  # the earliest first
        self._number = 0
        self._redeemed = 1.0  # share of the last promises whose owners came
        self._probed = clock()
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
            own = self._own(token)
            if own is not None:
                self._promised.remove(own)
                self._redeemed += LEARNING * (1 - self._redeemed)
            expected = outlook()
            if expected is not None:
                self._check(expected, deadline, now)
            self._taken += 1
            return expected

    def check(self) -> None:
        """Raise Refused if every place is taken. Promises nothing, and keeps no place for who asks."""
        with self._lock:
            if self._taken >= self.limit:
                raise self._full(None, self._clock())

    def leave(self) -> None:
        """Give the place back, once for each `enter`."""
        with self._lock:
            self._taken -= 1

    def _check(self, expected: Outlook, deadline: float | None, now: float) -> None:
        if deadline is not None and expected.finish > deadline and not self._probes(now):
            message = f"deadline_ms is {deadline * 1000:.0f}; the picture would be done in {expected.finish:.4g} s"
            if expected.solo > deadline:
                raise self._refusal(
                    "deadline", f"{message}, and takes {expected.solo:.4g} s even alone.", IMPOSSIBLE_SECONDS
                )
            raise self._refusal("deadline", f"{message}.", expected.finish - deadline)
        wait = expected.finish - expected.solo
        if wait > self.max_wait:
            raise self._refusal(
                "wait", f"The request would wait {wait:.0f} s; the limit is {self.max_wait:g} s.", wait - self.max_wait
            )
        if not expected.fits and self._taken:
            raise self._refusal("memory", "There is not enough memory left for it beside the others.", self._interval())

    def _probes(self, now: float) -> bool:
        if self._taken or now - self._probed < PROBE_SECONDS:
            return False
        self._probed = now
        return True

    def _full(self, token: Hashable, now: float) -> Refused:
        own = self._own(token)
        if own is not None and own[0] > now + 1:
            own = None  # too early to be the one that was told so: another with the same request
        ahead = len(self._promised)
        last = self._promised[-1][0] if self._promised else now
        seconds = self._interval() + (max(last - now, 0.0) if own is None else max(own[0] - now, 0.0))
        refusal = self._refusal(
            "queue_full", f"{self._taken} requests are in flight; the limit is {self.limit}.", seconds
        )
        if own is not None:
            self._promised.remove(own)
        if token is not None and (own or (ahead < PROMISES and seconds <= self.max_wait)):
            self._number += 1
            insort(self._promised, (now + seconds, self._number, token))
        return refusal

    def _own(self, token: Hashable) -> Promise | None:
        """The earliest promise to a token."""
        return None if token is None else next((one for one in self._promised if one[2] == token), None)

    def _refusal(self, reason: Reason, message: str, seconds: float) -> Refused:
        self.refused[reason] += 1
        return Refused(message, retry_after=seconds, code=reason)

    def _interval(self) -> float:
        """Seconds until a place will be free, on average."""
        drain = self._drain()
        return UNKNOWN_SECONDS if drain is None else drain / max(1, self._taken)

    def _kept(self, token: Hashable, now: float) -> int:
        """Places that are kept now, for others with older promises: each from shortly before its owner comes, to be free then."""
        if not self._promised:
            return 0
        own, lead = self._own(token), 1 + LEAD * self._interval()
        before = own[0] if own is not None else float("inf")
        kept = sum(due - lead <= now for due, _, _ in self._promised if due < before)
        return min(self.limit // 2, round(kept * self._redeemed))

    def _lapse(self, now: float) -> None:
        while self._promised and self._promised[0][0] + GRACE < now:
            self._promised.pop(0)
            self._redeemed -= LEARNING * self._redeemed
