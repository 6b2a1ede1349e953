"""Admission: who gets a place, what those are told that get none, and that it is kept."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepweave.errors import (
    REFUSAL_REASONS,
    AdmissionError,
    DeadlineTooShortError,
    InvalidRequestError,
)
from stepweave.planning.plan import Estimate
from stepweave.serving import promises
from stepweave.serving.admission import (
    RESERVED_SECONDS,
    SENDING_SECONDS,
    TRUST_SECONDS,
    UNKNOWN_SECONDS,
    Admission,
    Reservation,
)
from stepweave.serving.promises import GRACE, NEW_PROMISES


class Door:
    """An admission with a clock and a drain that are set by hand."""

    def __init__(self, limit: int, drain: float | None = 10.0, max_wait: float = math.inf) -> None:
        self.now, self.drain = 1000.0, drain
        self.admission = Admission(
            limit, lambda: self.drain, max_wait=max_wait, clock=lambda: self.now
        )

    def comes(
        self,
        token: Hashable = None,
        estimate: Estimate | None = None,
        deadline: float | None = None,
        client: Hashable = None,
        reservation: Reservation | None = None,
        alone: float | None = None,
    ) -> float | None:
        """None if let in, else the Retry-After; infinite where coming back would not help."""
        try:
            self.admission.enter(
                token,
                lambda: estimate,
                deadline,
                client=client,
                reservation=reservation,
                alone=lambda: alone,
            )
        except DeadlineTooShortError as error:
            assert error.retry_after is None
            return math.inf
        except AdmissionError as refused:
            assert refused.retry_after is not None
            return refused.retry_after
        return None

    def leaves(self) -> None:
        self.admission.leave()


def refusal(door: Door, estimate: Estimate, deadline: float | None = None) -> AdmissionError:
    with pytest.raises(AdmissionError) as refused:
        door.admission.enter("request", lambda: estimate, deadline)
    return refused.value


def fresh(door: Door) -> float | None:
    return door.comes(object())


# Places


def test_as_many_as_the_limit_are_let_in_and_places_come_back() -> None:
    door = Door(3)
    assert [door.comes() for _ in range(3)] == [None] * 3
    assert door.comes() is not None
    door.leaves()
    assert door.admission.in_flight == 2
    assert door.comes() is None
    assert door.comes() is not None
    assert door.admission.in_flight == 3


def test_a_refusal_takes_no_place() -> None:
    door = Door(2, max_wait=5)
    door.comes()
    for estimate, deadline in (
        (Estimate(9, 1), None),
        (Estimate(3, 1), 2.0),
        (Estimate(3, 1, fits=False), None),
    ):
        assert door.comes("x", estimate, deadline) is not None
    assert door.admission.in_flight == 1


def test_an_outlook_that_fails_takes_no_place() -> None:
    door = Door(1)

    def fails() -> Estimate:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        door.admission.enter("x", fails)
    assert door.comes("y") is None


def test_the_outlook_is_returned_and_only_asked_for_if_there_is_a_place() -> None:
    door, asked = Door(1), []

    def estimate() -> Estimate:
        asked.append(1)
        return Estimate(2.0, 1.0)

    assert door.admission.enter("a", estimate) == Estimate(2.0, 1.0)
    with pytest.raises(AdmissionError):
        door.admission.enter("b", estimate)
    assert len(asked) == 1


@given(
    st.integers(1, 5),
    st.lists(
        st.tuples(st.sampled_from(("comes", "leaves", "later")), st.integers(0, 9)), max_size=60
    ),
)
def test_never_more_than_the_limit_and_never_nobody(
    limit: int, events: list[tuple[str, int]]
) -> None:
    door = Door(limit)
    for event, number in events:
        if event == "later":
            door.now += number
        elif event == "leaves" and door.admission.in_flight:
            door.leaves()
        elif event == "comes":
            before = door.admission.in_flight
            admitted = door.comes(number) is None
            assert admitted or before, "refused while idle"
            assert door.admission.in_flight == before + admitted <= limit


# Retry-After


@given(st.floats(0, 1e4) | st.none(), st.integers(1, 6), st.integers(1, 12))
def test_retry_after_is_a_whole_number_of_seconds_and_at_least_one(
    drain: float | None, limit: int, count: int
) -> None:
    door = Door(limit, drain)
    told = [door.comes(i) for i in range(limit + count)][limit:]
    assert all(isinstance(seconds, int) and seconds >= 1 for seconds in told)


def test_retry_after_is_when_a_place_will_be_free_one_after_another() -> None:
    door = Door(4, drain=40.0)
    for _ in range(4):
        door.comes()
    assert [door.comes(i) for i in range(6)] == [10, 20, 30, 40, 50, 60]


def test_before_anything_was_timed_retry_after_is_a_guess() -> None:
    door = Door(1, drain=None)
    door.comes()
    assert door.comes("x") == UNKNOWN_SECONDS
    assert refusal(door, Estimate(1.0, 1.0)).message.endswith("Retry-After is a guess.")
    door.drain = 3.0
    assert refusal(door, Estimate(1.0, 1.0)).message.endswith("the limit is 1.")


def test_a_client_that_comes_too_early_may_still_come_when_it_was_told_first() -> None:
    door = Door(2, drain=40.0)
    door.comes(), door.comes()
    assert (door.comes("a"), door.comes("b")) == (20, 40)
    door.now += 5
    door.drain = 30.0
    assert door.comes("a") == 50  # it may be another client with the same request
    door.now += 15
    door.leaves()
    assert door.comes("a") is None


def test_clients_with_equal_requests_are_told_different_times() -> None:
    door = Door(4, drain=40.0)
    for _ in range(4):
        door.comes()
    assert [door.comes("a") for _ in range(3)] == [10, 20, 30]


def test_hardly_any_place_is_kept_once_clients_do_not_come_back() -> None:
    door = Door(4, drain=4.0)
    for _ in range(4):
        door.comes()
    for _ in range(40):  # nobody comes as told
        assert fresh(door) is not None
        door.now += 10
    fresh(door)
    door.leaves()
    assert fresh(door) is None


def test_at_most_half_of_the_places_are_kept() -> None:
    door = Door(6, drain=6.0)
    for _ in range(6):
        door.comes()
    for _ in range(6):
        fresh(door)
    for _ in range(4):
        door.leaves()
    assert fresh(door) is None
    assert fresh(door) is not None


@given(st.floats(1.01, 100), st.integers(0, 1))
def test_the_longer_nothing_ran_the_less_sure_it_is_that_a_deadline_is_too_short(
    times: float, busy: int
) -> None:
    """What was learnt may have become wrong, and where all requests have deadlines nothing would
    correct it."""
    door, slow = Door(3), Estimate(finish=3.0, solo=3.0)
    for _ in range(busy):
        door.comes()
    assert door.comes("a", slow, deadline=3.0 / times) == math.inf
    door.now += 0.99 * (times - 1) * TRUST_SECONDS
    assert door.comes("a", slow, deadline=3.0 / times) == math.inf
    door.now += 0.02 * times * TRUST_SECONDS
    assert door.comes("a", slow, deadline=3.0 / times) == (math.inf if busy else None)
    assert door.comes("b", slow, deadline=3.0 / times) == math.inf, "one runs, and will tell"
    while door.admission.in_flight:
        door.leaves()
    assert door.comes("b", slow, deadline=3.0 / times) == math.inf, "one has just told"


@pytest.mark.parametrize("deadline", [0.001, 0.3, 1.0, 7.36, 7.3649])
@pytest.mark.parametrize("full", [False, True])
def test_a_deadline_that_nothing_can_meet_is_said_to_be_and_not_to_come_back(
    deadline: float, full: bool
) -> None:
    """By a full server, too: there a client would wait for a place that does not help it."""
    door = Door(2)
    for _ in range(2 if full else 1):
        door.comes()
    with pytest.raises(DeadlineTooShortError) as refused:
        door.admission.enter("x", lambda: Estimate(9.0, 7.365), deadline, alone=lambda: 7.365)
    error = refused.value
    assert isinstance(error, InvalidRequestError)
    assert (error.status, error.code, error.param) == (400, "deadline_too_short", "deadline_ms")
    assert error.retry_after is None
    assert (
        f"deadline_ms is {deadline * 1000:g}; the image takes 7.37 s even on an idle server"
        in error.message
    )
    assert door.admission.in_flight == (2 if full else 1)
    assert not door.admission._promises.made


@given(
    st.floats(0, 1e4),
    st.floats(0, 1e4),
    st.integers(1, 10**7),
)
def test_what_is_told_of_a_deadline_is_consistent(
    finish: float, solo: float, deadline_ms: int
) -> None:
    """Estimates of two moments: the time alone is never more than the whole, and neither fits into
    the deadline."""
    door, estimate, deadline = Door(4), Estimate(finish, solo), deadline_ms / 1000
    assert estimate.wait >= 0
    try:
        door.admission.enter("x", lambda: estimate, deadline, alone=lambda: solo)
    except (AdmissionError, DeadlineTooShortError) as error:
        told = [float(one) for one in re.findall(r"([0-9.]+) s\b", error.message)]
        assert f"deadline_ms is {deadline_ms};" in error.message
        if isinstance(error, AdmissionError):
            assert told[0] >= told[1]
            assert (
                error.retry_after is not None and error.retry_after >= max(finish, solo) - deadline
            )
        assert told[0] >= max(0.001, deadline * (1 - 1e-9))
        assert isinstance(error, DeadlineTooShortError) == (solo > deadline)
    else:
        assert max(finish, solo) <= deadline


# Promises


@pytest.mark.parametrize("promise_others", [False, True])
def test_a_client_that_comes_when_told_gets_its_place_before_fresh_ones(
    promise_others: bool,
) -> None:
    door = Door(2, drain=20.0)
    door.comes(), door.comes()
    assert door.comes("a") == 10
    door.now += 9
    door.leaves()
    door.drain = 10.0
    assert door.comes("b" if promise_others else None) is not None
    door.now += 1
    assert door.comes("c" if promise_others else None) is not None
    assert door.comes("a") is None


@pytest.mark.parametrize("drain", [0.0, 1.0, 4.0])
def test_a_place_is_kept_from_shortly_before_its_owner_comes(drain: float) -> None:
    """A second, and four times the interval at which places become free."""
    door = Door(2, drain=60.0)
    door.comes(), door.comes()
    assert door.comes("a") == 30
    door.leaves()
    door.drain = drain  # of the one that is left
    door.now += 30 - (1 + 4 * drain) - 0.01
    assert fresh(door) is None
    door.leaves()
    door.now += 0.02
    assert fresh(door) is not None


def test_no_more_places_are_kept_than_will_be_wanted_soon() -> None:
    door = Door(4, drain=40.0)
    for _ in range(4):
        door.comes()
    assert [door.comes(token) for token in "abcd"] == [10, 20, 30, 40]
    door.now += 2
    for _ in range(3):
        door.leaves()
    door.drain = 0.5
    assert fresh(door) is None


def test_places_are_promised_for_no_later_than_the_longest_wait() -> None:
    door = Door(2, drain=20.0, max_wait=30.0)
    door.comes(), door.comes()
    assert [door.comes(token) for token in "abc"] == [10, 20, 30]
    assert [door.comes(token) for token in "de"] == [40, 40]  # told a time, but promised nothing


def test_promises_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert promises.PROMISES == 1024
    monkeypatch.setattr(promises, "PROMISES", 2)
    door = Door(2, drain=20.0)
    door.comes(), door.comes()
    assert [door.comes(token) for token in "abcde"] == [10, 20, 30, 30, 30]


def test_a_promise_lapses_if_its_owner_does_not_come() -> None:
    door = Door(2, drain=20.0)
    door.comes(), door.comes()
    assert door.comes("a") == 10
    door.leaves()
    door.now += 10 + GRACE
    assert door.comes() is not None
    door.now += 0.1
    assert door.comes() is None


def test_a_promise_is_kept_once() -> None:
    door = Door(2, drain=2.0)
    door.comes(), door.comes()
    assert door.comes("a") == 1
    door.now += 1
    door.leaves()
    assert door.comes("a") is None
    door.leaves()
    assert fresh(door) is None  # nothing is kept for it any more


def test_no_promise_without_a_token() -> None:
    door = Door(2, drain=2.0)
    door.comes(), door.comes()
    for _ in range(5):
        assert door.comes() == 1
    door.leaves()
    assert fresh(door) is None


def test_the_idle_server_admits_whatever_it_promised() -> None:
    door = Door(1, drain=2.0)
    door.comes()
    assert door.comes("a") == 2
    door.leaves()
    door.now += 2
    assert fresh(door) is None


def test_of_two_that_were_promised_places_the_first_is_not_kept_out_by_the_second() -> None:
    door = Door(2, drain=10.0)
    door.comes(), door.comes()
    assert (door.comes("a"), door.comes("b")) == (5, 10)
    door.now += 5
    door.leaves()
    door.drain = 5.0
    assert door.comes("a") is None


@pytest.mark.parametrize("clients", [1, 30, 1000])
@pytest.mark.parametrize("limit", [1, 2, 16, 65])
def test_refusals_of_clients_that_do_not_come_back_hardly_put_off_others(
    limit: int, clients: int
) -> None:
    """A thousand in a second, and a place a second is free."""
    door = Door(limit, max_wait=600.0)
    for number in range(limit):
        assert door.comes(number) is None
    door.drain = float(limit)
    for number in range(1000):
        assert door.comes(number, client=("elsewhere", number % clients)) is not None
        door.now += 0.001
    told = door.comes("mine", client="honest")
    assert told is not None and told <= NEW_PROMISES + 1
    waited = 0.0
    while told is not None:
        for _ in range(int(told)):
            door.now += 1
            door.leaves()
            if told := door.comes("mine", client="honest") if _ == int(told) - 1 else told:
                fresh(door)
        waited += 1
        assert waited < 2 * NEW_PROMISES
    assert door.admission.in_flight <= limit


def test_clients_that_do_come_back_are_promised_places_as_late_as_these_become_free() -> None:
    """A crowd that is refused at once, each of which comes when told: all get in, and nobody much
    later than in turn."""
    door, crowd = Door(4, max_wait=600.0), 60
    for _ in range(4):
        door.comes()
    door.drain = 4.0
    start = door.now
    due = {
        client: door.now + (door.comes("equal", client=client) or 0.0) for client in range(crowd)
    }
    asked = crowd
    while due:
        door.now += 1
        door.leaves()
        for client in [one for one, at in due.items() if at <= door.now]:
            asked += 1
            told = door.comes("equal", client=client)
            if told is None:
                del due[client]
            else:
                due[client] = door.now + told
    assert door.now - start <= crowd + 2 * NEW_PROMISES
    assert asked <= 4 * crowd


def test_equal_requests_of_two_clients_do_not_share_a_promise() -> None:
    door = Door(2, drain=20.0)
    door.comes(), door.comes()
    assert door.comes("a", client="first") == 10
    door.now += 10
    door.leaves()
    assert door.comes("a", client="second") is not None
    assert door.comes("a", client="first") is None


@pytest.mark.parametrize(
    ("estimate", "deadline"),
    [(Estimate(9.0, 1.0), 2.0), (Estimate(45.0, 1.0), None), (Estimate(3.0, 1.0, False), None)],
)
def test_who_comes_as_told_and_is_refused_for_another_reason_keeps_its_place(
    estimate: Estimate, deadline: float | None
) -> None:
    door = Door(2, drain=20.0, max_wait=40.0)
    door.comes(), door.comes()
    assert door.comes("a", client="told") == 10
    door.now += 10
    door.leaves()
    again = door.comes("a", estimate, deadline, client="told")
    assert again is not None
    door.now += again
    assert door.comes("b", client="another") is not None
    assert door.comes("a", client="told") is None


def test_no_place_is_kept_for_a_deadline_that_can_never_be_met() -> None:
    door = Door(2, drain=20.0)
    door.comes(), door.comes()
    assert door.comes("a") == 10
    door.now += 10
    door.leaves()
    assert door.comes("a", Estimate(9.0, 5.0), 2.0) == math.inf
    assert not door.admission._promises.made
    assert fresh(door) is None


def test_a_reserved_place_comes_back_from_a_deadline_that_can_never_be_met() -> None:
    door = Door(2)
    door.comes()
    with door.admission.reserve("x", "me") as place:
        assert door.comes("x", None, 2.0, client="me", reservation=place, alone=5.0) == math.inf
        assert door.admission.in_flight == 1
    assert door.admission.in_flight == 1


# Reservations


def test_of_two_that_want_the_last_place_one_reserves_it() -> None:
    door = Door(2)
    door.comes()
    place = door.admission.reserve()
    with pytest.raises(AdmissionError):
        door.admission.reserve()
    assert door.comes() is not None
    assert door.comes("x", reservation=place) is None
    assert door.admission.in_flight == 2
    place.release()
    assert door.admission.in_flight == 2, "it is the request's now"


@pytest.mark.parametrize("estimate", [Estimate(9.0, 1.0), None])
def test_a_reserved_place_comes_back_however_the_request_ends(estimate: Estimate | None) -> None:
    door = Door(2)
    with door.admission.reserve() as place:
        if estimate is not None:
            assert door.comes("x", estimate, 2.0, reservation=place) is not None
    place.release()
    assert door.admission.in_flight == 0
    with pytest.raises(ZeroDivisionError), door.admission.reserve():
        raise ZeroDivisionError
    assert door.admission.in_flight == 0
    assert door.comes("x", reservation=place) is None, "one that was released is none"
    assert door.admission.in_flight == 1


def test_a_reserved_place_is_promised_and_kept_as_any() -> None:
    door = Door(1, drain=10.0)
    door.comes()
    with pytest.raises(AdmissionError):
        door.admission.reserve("an edit", "mine")
    door.now += 10
    with pytest.raises(AdmissionError):
        door.admission.reserve("an edit", "another's")
    door.leaves()
    door.comes()  # the idle server lets in anybody
    with pytest.raises(AdmissionError):
        door.admission.reserve("an edit", "mine")
    assert [one.returning for one in door.admission._promises.made] == [False, True]
    door.now += 10
    door.leaves()
    place = door.admission.reserve("an edit", "mine")
    refused = door.comes("x", Estimate(19.0, 1.0), 2.0, reservation=place)
    assert refused == 17
    last = door.admission._promises.made[-1]
    assert (last.client, last.due, last.returning) == ("mine", door.now + 17, True)


def test_bodies_that_do_not_come_leave_half_of_the_places_to_requests_that_are_there() -> None:
    door = Door(4, drain=0.0)
    places = [door.admission.reserve() for _ in range(4)]
    assert door.comes() == UNKNOWN_SECONDS, (
        "a burst of uploads has its places, and nobody knows until when"
    )
    door.now += SENDING_SECONDS
    places.append(door.admission.reserve())  # else those that never come would keep out all that do
    places[0].settle()  # it is there, and another's body is not
    assert door.comes() is None
    assert door.admission.in_flight == 4
    assert door.comes() is not None, "half of them are left"
    assert door.admission.in_flight == 4
    with pytest.raises(AdmissionError):
        places[1].settle()
    places[3].settle()
    assert door.comes("x", reservation=places[3]) is None
    for place in places:
        place.release()
    assert door.admission.in_flight == 2


def test_a_place_that_is_reserved_for_too_long_is_free_for_others() -> None:
    """A client must not hold one by sending slowly."""
    door = Door(1)
    place = door.admission.reserve()
    door.now += RESERVED_SECONDS - 1
    assert door.comes() is not None
    door.now += 1
    assert door.comes() is None
    with pytest.raises(AdmissionError):
        place.settle()
    assert door.comes("x", reservation=place) is not None
    door.leaves()
    place.settle()
    door.now += 10 * RESERVED_SECONDS
    assert door.comes() is not None
    assert door.comes("x", reservation=place) is None
    assert door.admission.in_flight == 1


CLIENTS = 12  # more than there are places


@given(
    st.integers(1, 5),
    st.floats(0.1, 30.0),
    st.lists(st.sampled_from(("due", "leaves", "comes")), max_size=40),
)
@example(
    2,
    0.5,
    ["comes"] * 3 + ["due"] * 2 + ["comes", "due", "comes"] + ["due"] * 4 + ["leaves", "due"],
)
def test_whoever_was_promised_the_first_place_gets_it(
    limit: int, interval: float, events: list[str]
) -> None:
    """Clients come when they were told to, and find a place if one is free and nobody's turn is
    before theirs."""
    door = Door(limit)
    due: dict[int, float] = {}  # by client
    for _ in range(limit):
        door.comes()
    for event in events:
        door.drain = interval * door.admission.in_flight
        if event == "leaves" and door.admission.in_flight:
            door.leaves()
        elif event == "due" and due:
            # not the first that was told so: what clients are told is rounded up
            client = next(one.token for one in door.admission._promises.made if one.token in due)
            door.now = max(door.now, due.pop(client))
            free = door.admission.in_flight < limit
            wait = door.comes(client)
            assert wait is None or not free, (
                f"{door.admission.in_flight} of {limit} places are taken"
            )
            if wait is not None:
                due[client] = door.now + wait
        elif event == "comes" and len(due) < CLIENTS:
            client = next(one for one in range(CLIENTS) if one not in due)
            wait = door.comes(client)
            if wait is not None:
                due[client] = door.now + wait


# What a request would meet


def test_a_deadline_that_cannot_be_met_is_refused_and_one_that_can_is_not() -> None:
    door = Door(4)
    refused = refusal(door, Estimate(finish=12.0, solo=3.0), deadline=5.0)
    assert (refused.code, refused.status, refused.retry_after) == ("deadline", 429, 7)
    assert door.comes("x", Estimate(12.0, 3.0), 12.0) is None
    assert door.comes("y", Estimate(12.0, 3.0)) is None


def test_a_deadline_is_refused_by_the_idle_server_too() -> None:
    assert Door(4).comes("x", Estimate(3.0, 3.0), 2.0) == math.inf
    assert Door(4).comes("x", Estimate(3.0, 3.0), 3.0) is None


def test_a_wait_beyond_the_limit_is_refused() -> None:
    door = Door(4, max_wait=10.0)
    # what it takes itself is no wait
    assert door.comes("x", Estimate(finish=40.0, solo=30.0)) is None
    refused = refusal(door, Estimate(finish=45.0, solo=30.0))
    assert (refused.code, refused.retry_after) == ("wait", 5)


def test_too_little_memory_is_refused_while_others_use_it() -> None:
    door = Door(4, drain=6.0)
    assert door.comes("x", Estimate(1.0, 1.0, fits=False)) is None
    refused = refusal(door, Estimate(1.0, 1.0, fits=False))
    assert (refused.code, refused.retry_after) == ("memory", 6)


def test_a_request_of_which_nothing_is_known_is_let_in() -> None:
    assert Door(1, max_wait=0.0).comes("x", None, deadline=0.001) is None
    assert Door(1, max_wait=0.0).comes("x", None, deadline=0.001, alone=None) is None


def test_refusals_are_counted_by_reason() -> None:
    door = Door(2, max_wait=10.0)
    door.comes()
    assert dict(door.admission.refused) == {}
    for _ in range(2):
        refusal(door, Estimate(50.0, 1.0), deadline=5.0)
    assert door.comes("x", Estimate(50.0, 6.0), 5.0) == math.inf
    refusal(door, Estimate(50.0, 1.0))
    refusal(door, Estimate(1.0, 1.0, fits=False))
    door.comes()
    for _ in range(3):
        refusal(door, Estimate(1.0, 1.0))
    assert dict(door.admission.refused) == {"deadline": 3, "wait": 1, "memory": 1, "queue_full": 3}
    assert set(REFUSAL_REASONS) == set(door.admission.refused)


def test_threads_never_share_a_place() -> None:
    """Entering is made slow where it counts, between the look at the places and the taking of
    one."""
    limit, rounds = 3, 60
    shared = Admission(limit, lambda: 0.001)
    inside, most, guard, pause = 0, 0, threading.Lock(), threading.Event()

    def estimate() -> None:
        pause.wait(0.0005)

    def client(number: int) -> tuple[int, int]:
        nonlocal inside, most
        let_in = refused = 0
        for _ in range(rounds):
            try:
                shared.enter(number, estimate)
            except AdmissionError:
                refused += 1
                continue
            let_in += 1
            with guard:
                inside += 1
                most = max(most, inside)
            pause.wait(0.001)
            with guard:
                inside -= 1
            shared.leave()
        return let_in, refused

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(client, range(8)))
    assert 1 < most <= limit
    assert shared.in_flight == 0
    assert sum(let_in + refused for let_in, refused in counts) == 8 * rounds
    assert sum(refused for _, refused in counts) == shared.refused["queue_full"]
