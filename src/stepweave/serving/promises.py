"""Places that are promised to refused requests for their retry after `Retry-After` seconds."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from dataclasses import dataclass, field

LEARNING = 0.1  # weight of the last promise in the share of promises that were redeemed
PROMISES = 1024  # at most
# initial number of promises to clients without a retry so far that delay further promises
NEW_PROMISES = 8
NEW_OF_ONE = 8  # most promises of one client without a retry so far
GRACE = 5.0  # seconds that a place is kept after it was due


@dataclass(frozen=True, order=True)
class Promise:
    """A place that is kept for a refused request."""

    due: float  # when a place will be free, in seconds of the admission's clock
    number: int  # in order of promises
    token: Hashable = field(compare=False)
    client: Hashable = field(compare=False)
    returning: bool = field(compare=False)  # whether the client has retried in time before


class Promises:
    """The promises of one server, and the share of them that is redeemed.

    A refusal costs a client nothing, so promises to new clients (without a retry so far) delay
    others by few places, at first `NEW_PROMISES`; further promises are due at the same time. Like a
    congestion window, that number grows by one with each new client that retries in time, shrinks
    with each that does not, and is reset when there are no promises. A client that retries in time
    and finds no place has shown that it waits: it queues behind all others that have.
    """

    def __init__(self) -> None:
        self.made: list[Promise] = []  # the earliest first
        self._number = 0
        self._redeemed = {False: 1.0, True: 1.0}  # recent share, by `Promise.returning`
        self._window = float(NEW_PROMISES)  # promises to new clients that delay others

    def lapse(self, now: float) -> None:
        """Drop promises that are overdue by more than `GRACE`."""
        while self.made and self.made[0].due + GRACE < now:
            self._learn(self.made.pop(0), came=False)
        if not self.made:
            self._window = float(NEW_PROMISES)

    def make(self, token: Hashable, client: Hashable, due: float, *, returning: bool) -> None:
        self._number += 1
        insort(self.made, Promise(due, self._number, token, client, returning))

    def redeem(self, promise: Promise) -> None:
        """Remove a promise whose client has retried, if a reservation has not done so before."""
        if promise in self.made:
            self.made.remove(promise)
            self._learn(promise, came=True)

    def of(self, token: Hashable, client: Hashable) -> Promise | None:
        """The earliest promise to the client's request, or None."""
        if token is None:
            return None
        theirs = (
            promise for promise in self.made if (promise.token, promise.client) == (token, client)
        )
        return next(theirs, None)

    def may_make(self, client: Hashable) -> bool:
        """Whether one more place may be promised to a client without a retry so far."""
        if len(self.made) >= PROMISES:
            return False
        return client is None or NEW_OF_ONE > sum(
            not promise.returning and promise.client == client for promise in self.made
        )

    def wait(self, now: float, interval: float) -> float:
        """Seconds by which the promises delay others, if a place becomes free per `interval`."""
        wait = max(self.made[-1].due - now, 0.0) if self.made else 0.0
        new = sum(not promise.returning for promise in self.made)
        if new > self._window:
            wait = min(wait, (len(self.made) - new + self._window) * interval)
        return wait

    def wait_of(self, mine: Promise, now: float, interval: float) -> float:
        """Seconds until the promise is due, and places of other returning clients are served."""
        return max(mine.due - now, 0.0, self._behind(mine, now, interval))

    def expected(self, until: float, before: Promise | None) -> float:
        """Expected number of retries until then, of promises that are due before `before`."""
        limit = before.due if before is not None else float("inf")
        return sum(
            self._redeemed[promise.returning]
            for promise in self.made
            if promise.due <= until and promise.due < limit
        )

    def _behind(self, mine: Promise, now: float, interval: float) -> float:
        others = [promise.due for promise in self.made if promise.returning and promise is not mine]
        for place, due in enumerate(others, 1):
            if due > now + place * interval + 1e-6:  # of rounding
                return (place - 1) * interval
        return len(others) * interval

    def _learn(self, promise: Promise, *, came: bool) -> None:
        kind = promise.returning
        self._redeemed[kind] += LEARNING * (came - self._redeemed[kind])
        if not kind:
            self._window = self._window + 1 if came else self._window * (1 - LEARNING)
