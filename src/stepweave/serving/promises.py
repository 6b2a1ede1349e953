"""Places that are promised to refused requests, for when they come back as they were told."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from dataclasses import dataclass, field

LEARNING = 0.1  # weight of the last promise in the share of those that were kept
PROMISES = 1024  # at most
# to clients that have not come back yet, as far as they put off the next one; more as clients do
# come back
NEW_PROMISES = 8
NEW_OF_ONE = 8  # promises that one client may have before it has come back for any of them
GRACE = 5.0  # seconds that a place is kept for a client that is late


@dataclass(frozen=True, order=True)
class Promise:
    """A place that is kept for a refused request."""

    due: float  # when a place will be free, in seconds of the admission's clock
    number: int  # tells equals apart
    token: Hashable = field(compare=False)
    client: Hashable = field(compare=False)
    # whether its client has come back before, as it was told
    returning: bool = field(compare=False)


class Promises:
    """The promises of one server, and how many of the last ones their clients came back for.

    A refusal costs a client nothing, so promises to clients that have not come back yet put off
    others by a few places only, at first `NEW_PROMISES`: promises beyond that fall on the same
    time. As a congestion window that number grows by one with each client that comes back as told,
    shrinks with each that does not, and is the first again once nothing is promised. A client that
    comes back and finds no place has shown that it waits, and queues behind all others that have.
    """

    def __init__(self) -> None:
        self.made: list[Promise] = []  # the earliest first
        self._number = 0
        # share of the last promises whose clients came back; of those returning
        self._redeemed = {False: 1.0, True: 1.0}
        # promises to clients that have not come back yet that put off others
        self._window = float(NEW_PROMISES)

    def lapse(self, now: float) -> None:
        """Drop those whose clients are too late."""
        while self.made and self.made[0].due + GRACE < now:
            self._learn(self.made.pop(0), came=False)
        if not self.made:
            self._window = float(NEW_PROMISES)

    def make(self, token: Hashable, client: Hashable, due: float, *, returning: bool) -> None:
        self._number += 1
        insort(self.made, Promise(due, self._number, token, client, returning))

    def redeem(self, promise: Promise) -> None:
        """Its client came back. No effect on one that was redeemed before, with a reservation."""
        if promise in self.made:
            self.made.remove(promise)
            self._learn(promise, came=True)

    def of(self, token: Hashable, client: Hashable) -> Promise | None:
        """The earliest promise to a request of a client."""
        if token is None:
            return None
        theirs = (
            promise for promise in self.made if (promise.token, promise.client) == (token, client)
        )
        return next(theirs, None)

    def may_make(self, client: Hashable) -> bool:
        """Whether one more place may be promised to a client that does not come back for one."""
        if len(self.made) >= PROMISES:
            return False
        return client is None or NEW_OF_ONE > sum(
            not promise.returning and promise.client == client for promise in self.made
        )

    def wait(self, now: float, interval: float) -> float:
        """Seconds by which the promises put off a client that has none, if a place becomes free
        every `interval` seconds."""
        wait = max(self.made[-1].due - now, 0.0) if self.made else 0.0
        new = sum(not promise.returning for promise in self.made)
        if new > self._window:
            wait = min(wait, (len(self.made) - new + self._window) * interval)
        return wait

    def wait_of(self, mine: Promise, now: float, interval: float) -> float:
        """Seconds until it is due, and until the places that become free are not all promised to
        others that have come back, too."""
        return max(mine.due - now, 0.0, self._behind(mine, now, interval))

    def expected(self, until: float, before: Promise | None) -> float:
        """How many clients are likely to come back by then, of those with promises older than
        `before`."""
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
