"""Admission: which requests get a place, and when refused ones should be retried."""

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
TRUST_SECONDS = 900.0  # idle time after which a deadline of half the predicted seconds is accepted
LEAD = 4  # a promised place is kept from this many mean intervals before it is due: ends are uneven
# when most places are held by bodies that are being sent, one older than this loses its place
SENDING_SECONDS = 1.0
RESERVED_SECONDS = 60.0  # how long a place is reserved while the request's body is being sent
JOINING = 8  # most requests without a place whose body is being sent and that may join a job


class Reservation:
    """A place that is reserved before the request's body is read; a context manager, which gives
    the place back unless `Admission.enter` has taken it over.

    It expires after `RESERVED_SECONDS` while the body is being sent, so that clients cannot hold
    places by sending slowly; `settle` then looks for another place. One that `joins` has no place.
    """

    def __init__(
        self, admission: Admission, token: Hashable, client: Hashable, *, joins: bool
    ) -> None:
        self._admission: Admission | None = admission
        self.joins = joins
        self.token = token
        self.client = client
        self.until: float | None = None  # when it expires; None for never
        self.promise: Promise | None = None  # which it redeemed

    @property
    def held(self) -> bool:
        """Whether it got a place and was not released; the place may have expired."""
        return self._admission is not None and not self.joins

    def settle(self) -> None:
        """Keep the place after the body. Raises AdmissionError if expired, and none is free."""
        if self._admission is not None and not self.joins:
            self._admission.settle(self)

    def release(self) -> None:
        """Give the place back if it is still held."""
        if self._admission is not None:
            self._admission.release(self)
            self._admission = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """A limited number of places. A request holds its place until its image files are encoded.

    `drain` predicts the seconds until all requests in flight are done, None if unknown. A refused
    request gets `Retry-After`, and a place is kept for its retry: for the same `token` and
    `client`; others get it only if the server is idle. Otherwise, under steady overload, clients
    that wait would be overtaken by others that arrive at random. No place is promised later than
    `max_wait` seconds ahead. At most half of the places are kept at a time, and fewer if clients
    do not retry; `Promises` limits how long promises delay others.
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
        self._informed = clock()  # when a request last began or ended
        self._lock = threading.RLock()

    @property
    def in_flight(self) -> int:
        """Accepted requests (waiting, running or being encoded), and places reserved for bodies."""
        return self._taken

    def reserve(
        self, token: Hashable = None, client: Hashable = None, *, joins: bool = False
    ) -> Reservation:
        """Reserve a place for a request whose body has not been read yet; `token` as in `enter`.

        With `joins`, the request may join a job, and reserves no place unless `JOINING` others do
        so at the same time. Raises AdmissionError if there is no place.
        """
        with self._lock:
            joins = joins and len(self._joining) < JOINING
            reservation = Reservation(self, token, client, joins=joins)
            if joins:
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
        """Take a place; returns the request's estimate.

        Args:
            token: equal for a retry of the same request; None if a retry cannot be recognised.
            estimate: predicts wait and finish; called only if there is a place.
            deadline: seconds from now.
            alone: predicts the seconds on an idle server, None if unknown; called only with a
                deadline.
            client: None counts as a new client each time.
            reservation: use its place, unless that was released.

        Raises DeadlineTooShortError if an idle server could not meet the deadline either;
        AdmissionError, with the predicted wait, if there is no place, the wait would exceed
        `max_wait`, the deadline cannot be met now, or others use the memory that it needs. A
        request that retried when it was told to is then promised a place for its next retry.
        """
        with self._lock:
            now = self._now()
            held = reservation if reservation in self._reserved else None
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
        """Give a place back; call it once for each `enter`."""
        with self._lock:
            self._taken -= 1
            self._informed = self._clock()

    def _now(self) -> float:
        """The time by `clock`; drops expired reservations and promises."""
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
        """The promise made to this request, if any. Raises AdmissionError if there is no place."""
        promise = self._promises.of(token, client)
        full = self._taken and self._taken + self._kept(promise, now) >= self.limit
        if full and not self._displace(now):
            raise self._full(token, client, promise, now)
        return promise

    def _displace(self, now: float) -> bool:
        """Release the oldest reservation whose body is still being sent, if such reservations hold
        more than half of the places; returns whether one was released."""
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
        """Raise what `enter` does if the estimate is too late; renews a promise for a retry."""
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
        """The error to raise, if the request must be retried later."""
        if deadline is not None and expected.finish > deadline >= expected.solo:
            return self._refusal(
                "deadline",
                f"deadline_ms is {_milliseconds(deadline)}; estimated completion is "
                f"{duration(expected.finish)} ({duration(expected.solo)} on an idle server).",
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
                "Device memory is in use by other requests, and too little is free for this one.",
                self._interval(),
            )
        return None

    def _check_alone(self, solo: float, deadline: float, now: float) -> None:
        """Raise DeadlineTooShortError if the deadline is shorter than `solo`, the seconds on an
        idle server.

        `solo` is predicted from past jobs. After a time without any, deadlines that are slightly
        too short are accepted, to measure again: otherwise a server whose requests all have
        deadlines would never correct the prediction.
        """
        idle = 0.0 if self._taken else max(0.0, now - self._informed)
        if solo > deadline * (1 + idle / TRUST_SECONDS):
            self.refused["deadline"] += 1
            raise DeadlineTooShortError(
                f"deadline_ms is {_milliseconds(deadline)}; the image takes {duration(solo)} even "
                "on an idle server. Use fewer steps, fewer images or a smaller size."
            )

    def _full(
        self, token: Hashable, client: Hashable, promise: Promise | None, now: float
    ) -> AdmissionError:
        if promise is not None and promise.due > now + 1:
            # too early: another request with the same content
            promise = None
        interval, promises = self._interval(), self._promises
        if promise is None:
            seconds = interval + promises.wait(now, interval)
        else:
            seconds = interval + promises.wait_of(promise, now, interval)
        known = self._drain() is not None
        guess = "" if known else " Their duration is not known yet: Retry-After is a guess."
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
        """Mean seconds until the next place becomes free."""
        drain, running = self._drain(), self._taken - len(self._reserved)
        # how long clients still send their bodies is unknown
        if drain is None or (self._reserved and not running):
            return UNKNOWN_SECONDS
        return drain / max(1, running)

    def _kept(self, promise: Promise | None, now: float) -> int:
        """Number of places kept now for older promises, each from shortly before it is due."""
        if not self._promises.made:
            return 0
        lead = 1 + LEAD * self._interval()
        return min(self.limit // 2, round(self._promises.expected(now + lead, promise)))


def _milliseconds(deadline: float) -> str:
    """Seconds as the milliseconds that the client sent."""
    return f"{deadline * 1000:.10g}"
