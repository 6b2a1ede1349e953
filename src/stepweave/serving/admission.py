"""Admission: what is let in, and when to come back with what is not."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Self

from stepweave.errors import AdmissionError, DeadlineTooShortError, RefusalReason, duration
from stepweave.planning.plan import Estimate
from stepweave.serving.promises import Promise, Promises

UNKNOWN_SECONDS = 5.0  # Retry-After before anything has been timed
# for which an idle server halves how sure it is that a deadline is too short: it may be faster by
# now
TRUST_SECONDS = 900.0
LEAD = 4  # places on average that become free while one is kept: their ends come unevenly
# after which the place of a body that is still being sent may go to another, if most are held so
SENDING_SECONDS = 1.0
RESERVED_SECONDS = 60.0  # that a place is reserved for a request whose body is still being sent
# requests at a time that hold no place while their body is sent, as they may join a job
JOINING = 8


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
        self.promise: Promise | None = None  # that it has taken up

    @property
    def held(self) -> bool:
        """Whether it was given a place and has not given that back, though it may have lapsed."""
        return self._admission is not None and not self.joins

    def settle(self) -> None:
        """The body has been read: from now on the place does not lapse. Raises AdmissionError if it
        has, and there is no other."""
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
    """Places for requests, up to a limit. A request holds its place until its image files are
    encoded.

    `drain` gives the predicted seconds until all that are in flight are done, or None if that is
    unknown. A request that finds no place is told when one will be free, and a place is kept for it
    then: for the same request of the same client, by its `token` and `client`, which others cannot
    take unless the server were idle. Otherwise, under steady overload, those who wait as told would
    be overtaken by those who come at random. Nothing is promised for later than `max_wait`. No more
    than half of the places are kept at a time, and the fewer the more clients do not come back;
    `Promises` tells by how much promises put off others.
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
        self._promises = Promises()
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
        such are being read. Raises AdmissionError if there is no place.
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

        Raises DeadlineTooShortError if the deadline could not be met by an idle server either;
        AdmissionError, with the predicted wait, if there is no place, the wait would exceed
        `max_wait`, the deadline cannot be met now, or the memory that is left is too little while
        others use it. One that came as told is then promised a place for when it is to come again.
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
                promise = held.promise if held is not None else self._find_place(token, client, now)
                expected = estimate()
                if expected is not None:
                    self._check(expected, deadline, now, promise)
            except DeadlineTooShortError:
                promise = held.promise if held is not None else self._promises.of(token, client)
                if promise is not None:
                    self._promises.redeem(promise)
                raise
            if promise is not None:
                self._promises.redeem(promise)
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
        for reservation in list(self._reserved):
            if reservation.until is not None and reservation.until <= now:
                self.release(reservation)
        self._promises.lapse(now)
        return now

    def _reserve(self, reservation: Reservation) -> None:
        promise = self._find_place(reservation.token, reservation.client, self._now())
        if promise is not None:
            self._promises.redeem(promise)
            reservation.promise = promise
        self._reserved.append(reservation)
        self._taken += 1

    def _find_place(self, token: Hashable, client: Hashable, now: float) -> Promise | None:
        """The promise to a request, if any, that now finds a place. Raises AdmissionError if it
        finds none."""
        promise = self._promises.of(token, client)
        if (
            self._taken
            and self._taken + self._kept(promise, now) >= self.limit
            and not self._displace(now)
        ):
            raise self._full(token, client, promise, now)
        return promise

    def _displace(self, now: float) -> bool:
        """Have a place lapse whose request's body has not come for a while, if such have more than
        half of them."""
        sending = [reservation for reservation in self._reserved if reservation.until is not None]
        first = min(sending, key=lambda reservation: reservation.until or 0.0, default=None)
        if first is None or first.until is None or len(sending) <= max(1, self.limit // 2):
            return False
        if first.until - RESERVED_SECONDS + SENDING_SECONDS > now:
            return False
        self.release(first)
        return True

    def _check(
        self, expected: Estimate, deadline: float | None, now: float, promise: Promise | None
    ) -> None:
        """Raise what `enter` does if the estimate is not good enough; a promise to it is put off
        till it is."""
        if deadline is not None:
            self._check_alone(expected.solo, deadline, now)
        refused = self._refused(expected, deadline)
        if refused is None:
            return
        later = refused.retry_after or 0.0
        if promise is not None:
            self._promises.redeem(promise)
            if later <= self.max_wait:
                self._promises.make(promise.token, promise.client, now + later, returning=True)
        raise refused

    def _refused(self, expected: Estimate, deadline: float | None) -> AdmissionError | None:
        """Why it is to come back later, if it is."""
        if deadline is not None and expected.finish > deadline >= expected.solo:
            return self._refusal(
                "deadline",
                f"deadline_ms is {_milliseconds(deadline)}; the image would be done in "
                f"{duration(expected.finish)}, of which it takes {duration(expected.solo)} itself.",
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
        """Raise DeadlineTooShortError if a deadline is shorter than what the request takes alone.

        What it takes is told from what ran last. If nothing has for a while, one that is nearly
        long enough is let in, and shows whether that still holds: else nothing would, where all
        requests have deadlines.
        """
        idle = 0.0 if self._taken else max(0.0, now - self._informed)
        if solo > deadline * (1 + idle / TRUST_SECONDS):
            self.refused["deadline"] += 1
            raise DeadlineTooShortError(
                f"deadline_ms is {_milliseconds(deadline)}; the image takes {duration(solo)} even "
                "if nothing else runs. Fewer steps, fewer images or a smaller size take less."
            )

    def _full(
        self, token: Hashable, client: Hashable, promise: Promise | None, now: float
    ) -> AdmissionError:
        if promise is not None and promise.due > now + 1:
            # too early to be the one that was told so: another with the same request
            promise = None
        interval, promises = self._interval(), self._promises
        wait = (
            promises.wait(now, interval)
            if promise is None
            else promises.wait_of(promise, now, interval)
        )
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
        if promise is not None:
            self._promises.redeem(promise)
            self._promises.make(promise.token, client, now + seconds, returning=True)
        elif token is not None and self._promises.may_make(client) and seconds <= self.max_wait:
            self._promises.make(token, client, now + seconds, returning=False)
        return refusal

    def _refusal(self, reason: RefusalReason, message: str, seconds: float) -> AdmissionError:
        self.refused[reason] += 1
        return AdmissionError(message, retry_after=seconds, code=reason)

    def _interval(self) -> float:
        """Seconds until a place will be free, on average."""
        drain, running = self._drain(), self._taken - len(self._reserved)
        # nobody knows when those who send bodies have sent them
        if drain is None or (self._reserved and not running):
            return UNKNOWN_SECONDS
        return drain / max(1, running)

    def _kept(self, promise: Promise | None, now: float) -> int:
        """Places that are kept now, for others with older promises: each from shortly before its
        owner comes, to be free then."""
        if not self._promises.made:
            return 0
        lead = 1 + LEAD * self._interval()
        return min(self.limit // 2, round(self._promises.expected(now + lead, promise)))


def _milliseconds(deadline: float) -> str:
    """A deadline as it was sent."""
    return f"{deadline * 1000:.10g}"
