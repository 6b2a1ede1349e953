"""Admission: what is let in, and when to come back with what is not."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Self

from stepweave.errors import DeadlineTooShort, RefusalReason, Refused, duration
from stepweave.planning.plan import Estimate

UNKNOWN_SECONDS = 5.0  # Retry-After before anything has been timed
# for which an idle server halves how sure it is that a deadline is too short: it may be faster by
# now
TRUST_SECONDS = 900.0
LEARNING = 0.1  # weight of the last promise in the share of those that were kept
LEAD = 4  # places on average that become free while one is kept: their ends come unevenly
PROMISES = 1024  # at most
NEW_PROMISES = (
    # to clients that have not come back yet, as far as they put off the next one; more as clients
    # do come back
    8
)
NEW_OF_ONE = 8  # promises that one client may have before it has come back for any of them
GRACE = 5.0  # seconds that a place is kept for a client that is late
# after which the place of a body that is still being sent may go to another, if most are held so
SENDING_SECONDS = 1.0
RESERVED_SECONDS = 60.0  # that a place is reserved for a request whose body is still being sent
# requests at a time that hold no place while their body is sent, as they may join a job
JOINING = 8


@dataclass(frozen=True, order=True)
class _Promise:
    """A place that is kept for a refused request."""

    due: float  # when a place will be free
    number: int  # tells equals apart
    token: Hashable = field(compare=False)
    client: Hashable = field(compare=False)
    # whether its client has come back before, as it was told
    returning: bool = field(compare=False)


class Reservation:
    """A place that a request holds from before its body is read; a context, which gives the place
    back unless `enter` took it.

    While the body is being sent the place is the request's for `RESERVED_SECONDS`: a client must
    not hold one by sending slowly. After that others may take it, and `settle` looks for another.
    One that `joins` holds no place.
    """

    def __init__(
        self,
        admission: Admission,
        token: Hashable = None,
        client: Hashable = None,
        *,
        joins: bool = False,
    ) -> None:
        self._admission: Admission | None = admission
        self.joins = joins
        self.token = token
        self.client = client
        self.until: float | None = None  # when it lapses; None if it does not
        self.promise: _Promise | None = None  # that it has taken up

    @property
    def held(self) -> bool:
        """Whether it was given a place and has not given that back, though it may have lapsed."""
        return self._admission is not None and not self.joins

    def settle(self) -> None:
        """The body has been read: from now on the place does not lapse. Raises Refused if it has,
        and there is no other."""
        if self._admission is not None and not self.joins:
            self._admission.settle(self)

    def release(self) -> None:
        """Give the place back, if it still has one; it may be called more than once."""
        if self._admission is not None:
            self._admission.release(self)
            self._admission = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """Places for requests, up to a limit. A request holds its place until its picture files are
    encoded.

    `drain` gives the predicted seconds until all that are in flight are done, or None if that is
    unknown. A request that finds no place is told when one will be free, and a place is kept for it
    then: for the same request of the same client, by its `token` and `client`, which others cannot
    take unless the server were idle. Otherwise, under steady overload, those who wait as told would
    be overtaken by those who come at random. Nothing is promised for later than `max_wait`. No more
    than half of the places are kept at a time, and the fewer the more clients do not come back.

    A refusal costs a client nothing, so promises to clients that have not come back yet put off
    others by a few places only, at first `NEW_PROMISES`: promises beyond that fall on the same
    time. As a congestion window that number grows by one with each client that comes back as told,
    shrinks with each that does not, and is the first again once nothing is promised. A client that
    comes back and finds no place has shown that it waits, and queues behind all others that have.
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
        self.refused: Counter[RefusalReason] = Counter()
        self._drain = drain
        self._clock = clock
        self._taken = 0
        self._reserved: list[Reservation] = []  # of the places that are taken
        self._joining: list[Reservation] = []  # without a place
        self._promised: list[_Promise] = []  # the earliest first
        self._number = 0
        # share of the last promises whose owners came; of those returning
        self._redeemed = {False: 1.0, True: 1.0}
        # promises to clients that have not come back yet that put off others
        self._window = float(NEW_PROMISES)
        self._informed = clock()  # when something last ran, as far as is seen here
        self._lock = threading.RLock()

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet answered, waiting, running, or being encoded, and places
        reserved for bodies."""
        return self._taken

    def reserve(
        self, token: Hashable = None, client: Hashable = None, *, joins: bool = False
    ) -> Reservation:
        """A place for a request whose body has not been read. `token` tells of it what is known
        before, as in `enter`.

        A request that may join a job `joins`: it then needs no place and has none, unless `JOINING`
        such are being read. Raises Refused if there is no place.
        """
        with self._lock:
            reservation = Reservation(
                self, token, client, joins=joins and len(self._joining) < JOINING
            )
            if reservation.joins:
                self._joining.append(reservation)
            else:
                self._reserve(reservation)
                reservation.until = self._clock() + RESERVED_SECONDS
        return reservation

    def settle(self, reservation: Reservation) -> None:
        """See `Reservation.settle`."""
        with self._lock:
            if reservation not in self._reserved:
                self._reserve(reservation)
            reservation.until = None

    def release(self, reservation: Reservation) -> None:
        """See `Reservation.release`."""
        with self._lock:
            if reservation in self._reserved:
                self._reserved.remove(reservation)
                self._taken -= 1
            elif reservation in self._joining:
                self._joining.remove(reservation)

    def enter(
        self,
        token: Hashable = None,
        estimate: Callable[[], Estimate | None] = lambda: None,
        deadline: float | None = None,
        *,
        alone: Callable[[], float | None] = lambda: None,
        client: Hashable = None,
        reservation: Reservation | None = None,
    ) -> Estimate | None:
        """Take a place; what was expected of it.

        Args:
            token: what the same request will have when it comes again; None if that cannot be told.
            estimate: predicts what the request would meet; asked only if there is a place.
            deadline: seconds from now.
            alone: predicts the seconds that the request takes by itself, None if unknown; asked of
                all that have a deadline.
            client: who asks; None counts as somebody else each time.
            reservation: the request's place becomes this one's, unless that has been released.

        Raises DeadlineTooShort if the deadline could not be met by an idle server either; Refused,
        with the predicted wait, if there is no place, the wait would exceed `max_wait`, the
        deadline cannot be met now, or the memory that is left is too little while others use it.
        One that came as told is then promised a place for when it is to come again.
        """
        with self._lock:
            now = self._now()
            held = (
                reservation if reservation is not None and reservation in self._reserved else None
            )
            if held is not None:
                self.release(held)
                token, client = held.token, held.client
            try:
                if deadline is not None:
                    self._check_alone(alone() or 0.0, deadline, now)
                own = held.promise if held is not None else self._find_place(token, client, now)
                expected = estimate()
                if expected is not None:
                    self._check(expected, deadline, now, own)
            except DeadlineTooShort:
                own = held.promise if held is not None else self._own(token, client)
                if own is not None:
                    self._take_up(own)
                raise
            if own is not None:
                self._take_up(own)
            self._taken += 1
            self._informed = now
            return expected

    def leave(self) -> None:
        """Give the place back, once for each `enter`."""
        with self._lock:
            self._taken -= 1
            self._informed = self._clock()

    def _now(self) -> float:
        """The time; what has lapsed by then is gone."""
        now = self._clock()
        for late in [one for one in self._reserved if one.until is not None and one.until <= now]:
            self.release(late)
        while self._promised and self._promised[0].due + GRACE < now:
            self._learn(self._promised.pop(0), came=False)
        if not self._promised:
            self._window = float(NEW_PROMISES)
        return now

    def _learn(self, promise: _Promise, *, came: bool) -> None:
        kind = promise.returning
        self._redeemed[kind] += LEARNING * (came - self._redeemed[kind])
        if not kind:
            self._window = self._window + 1 if came else self._window * (1 - LEARNING)

    def _reserve(self, reservation: Reservation) -> None:
        own = self._find_place(reservation.token, reservation.client, self._now())
        if own is not None:
            self._take_up(own)
            reservation.promise = own
        self._reserved.append(reservation)
        self._taken += 1

    def _find_place(self, token: Hashable, client: Hashable, now: float) -> _Promise | None:
        """The promise to a request, if any, that now finds a place. Raises Refused if it finds
        none."""
        own = self._own(token, client)
        if (
            self._taken
            and self._taken + self._kept(own, now) >= self.limit
            and not self._displace(now)
        ):
            raise self._full(token, client, own, now)
        return own

    def _displace(self, now: float) -> bool:
        """Have a place lapse whose request's body has not come for a while, if such have more than
        half of them."""
        sending = [one for one in self._reserved if one.until is not None]
        first = min(sending, key=lambda one: one.until or 0.0, default=None)
        if first is None or first.until is None or len(sending) <= max(1, self.limit // 2):
            return False
        if first.until - RESERVED_SECONDS + SENDING_SECONDS > now:
            return False
        self.release(first)
        return True

    def _take_up(self, promise: _Promise) -> None:
        if promise in self._promised:  # else it was taken up with a reservation
            self._promised.remove(promise)
            self._learn(promise, came=True)

    def _promise(self, token: Hashable, client: Hashable, due: float, *, returning: bool) -> None:
        self._number += 1
        insort(self._promised, _Promise(due, self._number, token, client, returning))

    def _check(
        self, expected: Estimate, deadline: float | None, now: float, own: _Promise | None
    ) -> None:
        """Raise what `enter` does if the estimate is not good enough; a promise to it is put off
        till it is."""
        if deadline is not None:
            self._check_alone(expected.solo, deadline, now)
        refused = self._refused(expected, deadline)
        if refused is None:
            return
        later = refused.retry_after or 0.0
        if own is not None:
            self._take_up(own)
            if later <= self.max_wait:
                self._promise(own.token, own.client, now + later, returning=True)
        raise refused

    def _refused(self, expected: Estimate, deadline: float | None) -> Refused | None:
        """Why it is to come back later, if it is."""
        if deadline is not None and expected.finish > deadline >= expected.solo:
            return self._refusal(
                "deadline",
                f"deadline_ms is {_milliseconds(deadline)}; the image would be done in "
                f"{duration(expected.finish)}, of which it "
                f"takes {duration(expected.solo)} itself.",
                expected.finish - deadline,
            )
        if expected.wait > self.max_wait:
            return self._refusal(
                "wait",
                f"The request would wait {duration(expected.wait)}; the limit is {self.max_wait:g} "
                f"s.",
                expected.wait - self.max_wait,
            )
        if not expected.fits and self._taken:
            return self._refusal(
                "memory",
                "There is not enough memory left for it beside the others.",
                self._interval(),
            )
        return None

    def _check_alone(self, solo: float, deadline: float, now: float) -> None:
        """Raise DeadlineTooShort if a deadline is shorter than what the request takes alone.

        What it takes is told from what ran last. If nothing has for a while, one that is nearly
        long enough is let in, and shows whether that still holds: else nothing would, where all
        requests have deadlines.
        """
        idle = 0.0 if self._taken else max(0.0, now - self._informed)
        if solo > deadline * (1 + idle / TRUST_SECONDS):
            self.refused["deadline"] += 1
            raise DeadlineTooShort(
                f"deadline_ms is {_milliseconds(deadline)}; the image takes {duration(solo)} even "
                f"if nothing else runs. Fewer "
                "steps, fewer images or a smaller size take less."
            )

    def _full(self, token: Hashable, client: Hashable, own: _Promise | None, now: float) -> Refused:
        if own is not None and own.due > now + 1:
            own = None  # too early to be the one that was told so: another with the same request
        new = sum(not one.returning for one in self._promised)
        interval = self._interval()
        if own is not None:
            wait = max(own.due - now, 0.0, self._behind(own, now, interval))
        else:
            wait = max(self._promised[-1].due - now, 0.0) if self._promised else 0.0
            if new > self._window:
                wait = min(wait, (len(self._promised) - new + self._window) * interval)
        seconds = interval + wait
        guess = (
            " How long they take is not known yet: Retry-After is a guess."
            if self._drain() is None
            else ""
        )
        refusal = self._refusal(
            "queue_full",
            f"{self._taken} requests are in flight; the limit is {self.limit}.{guess}",
            seconds,
        )
        if own is not None:
            self._take_up(own)
            self._promise(own.token, client, now + seconds, returning=True)
        elif token is not None and self._may_promise(client) and seconds <= self.max_wait:
            self._promise(token, client, now + seconds, returning=False)
        return refusal

    def _behind(self, own: _Promise, now: float, interval: float) -> float:
        """Seconds until the places that become free are not all promised to others that have come
        back, too."""
        others = [one.due for one in self._promised if one.returning and one is not own]
        for place, due in enumerate(others, 1):
            if due > now + place * interval + 1e-6:  # of rounding
                return (place - 1) * interval
        return len(others) * interval

    def _may_promise(self, client: Hashable) -> bool:
        """Whether one more place may be promised to a client that does not come back for one."""
        if len(self._promised) >= PROMISES:
            return False
        return client is None or NEW_OF_ONE > sum(
            not one.returning and one.client == client for one in self._promised
        )

    def _own(self, token: Hashable, client: Hashable) -> _Promise | None:
        """The earliest promise to a request of a client."""
        if token is None:
            return None
        return next(
            (one for one in self._promised if one.token == token and one.client == client), None
        )

    def _refusal(self, reason: RefusalReason, message: str, seconds: float) -> Refused:
        self.refused[reason] += 1
        return Refused(message, retry_after=seconds, code=reason)

    def _interval(self) -> float:
        """Seconds until a place will be free, on average."""
        drain, running = self._drain(), self._taken - len(self._reserved)
        # nobody knows when those who send bodies have sent them
        if drain is None or (self._reserved and not running):
            return UNKNOWN_SECONDS
        return drain / max(1, running)

    def _kept(self, own: _Promise | None, now: float) -> int:
        """Places that are kept now, for others with older promises: each from shortly before its
        owner comes, to be free then."""
        if not self._promised:
            return 0
        lead = 1 + LEAD * self._interval()
        before = own.due if own is not None else float("inf")
        kept = sum(
            self._redeemed[one.returning]
            for one in self._promised
            if one.due - lead <= now and one.due < before
        )
        return min(self.limit // 2, round(kept))


def _milliseconds(deadline: float) -> str:
    """A deadline as it was sent."""
    return f"{deadline * 1000:.10g}"
