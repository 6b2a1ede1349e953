"""Admission: who gets a place, what those are told that get none, and that it is kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepweave.errors import Refused
from stepweave.scheduling import admission
from stepweave.scheduling.admission import GRACE, REASONS, UNKNOWN_SECONDS, Admission, Outlook


class Door:
    """An admission with a clock and a drain that are set by hand."""

    def __init__(self, limit: int, drain: float | None = 10.0, max_wait: float = math.inf) -> None:
        self.now, self.drain = 1000.0, drain
        self.admission = Admission(limit, lambda: self.drain, max_wait=max_wait, clock=lambda: self.now)

    def comes(
        self, token: Hashable = None, outlook: Outlook | None = None, deadline: float | None = None
    ) -> float | None:
        """None if let in, else the Retry-After."""
        try:
            self.admission.enter(token, lambda: outlook, deadline)
        except Refused as refused:
            assert refused.retry_after is not None
            return refused.retry_after
        return None

    def leaves(self) -> None:
        self.admission.leave()


def refusal(door: Door, outlook: Outlook, deadline: float | None = None) -> Refused:
    with pytest.raises(Refused) as refused:
        door.admission.enter("request", lambda: outlook, deadline)
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
    for outlook, deadline in ((Outlook(9, 1), None), (Outlook(3, 1), 2.0), (Outlook(3, 1, fits=False), None)):
        assert door.comes("x", outlook, deadline) is not None
    assert door.admission.in_flight == 1


def test_an_outlook_that_fails_takes_no_place() -> None:
    door = Door(1)

    def fails() -> Outlook:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        door.admission.enter("x", fails)
    assert door.comes("y") is None


def test_the_outlook_is_returned_and_only_asked_for_if_there_is_a_place() -> None:
    door, asked = Door(1), []

    def outlook() -> Outlook:
        asked.append(1)
        return Outlook(2.0, 1.0)

    assert door.admission.enter("a", outlook) == Outlook(2.0, 1.0)
    with pytest.raises(Refused):
        door.admission.enter("b", outlook)
    assert len(asked) == 1


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(("comes", "leaves", "later")), st.integers(0, 9)), max_size=60),
)
def test_never_more_than_the_limit_and_never_nobody(limit: int, events: list[tuple[str, int]]) -> None:
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
def test_retry_after_is_a_whole_number_of_seconds_and_at_least_one(drain: float | None, limit: int, count: int) -> None:
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


def test_an_idle_server_tries_now_and_then_what_it_thinks_too_slow() -> None:
    """What it has learnt may be wrong, and nothing would correct it."""
    door, slow = Door(2), Outlook(finish=3.0, solo=3.0)
    assert door.comes("a", slow, deadline=1.0) is not None
    door.now += 31
    assert door.comes("a", slow, deadline=1.0) is None
    assert door.comes("b", slow, deadline=1.0) is not None
    door.leaves()
    assert door.comes("b", slow, deadline=1.0) is not None


def test_a_deadline_shorter_than_the_time_alone_is_said_to_be() -> None:
    refused = refusal(Door(2), Outlook(finish=9.0, solo=3.0), deadline=1.0)
    assert "takes 3 s even alone" in refused.message
    assert refused.retry_after is not None
    assert refused.retry_after >= 60


# Promises


@pytest.mark.parametrize("promise_others", [False, True])
def test_a_client_that_comes_when_told_gets_its_place_before_fresh_ones(promise_others: bool) -> None:
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
    assert admission.PROMISES == 1024
    monkeypatch.setattr(admission, "PROMISES", 2)
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


CLIENTS = 12  # more than there are places


@given(st.integers(1, 5), st.floats(0.1, 30.0), st.lists(st.sampled_from(("due", "leaves", "comes")), max_size=40))
def test_whoever_was_promised_the_first_place_gets_it(limit: int, interval: float, events: list[str]) -> None:
    """Clients come when they were told to, and find a place if one is free and nobody's turn is before theirs."""
    door = Door(limit)
    due: dict[int, float] = {}  # by client
    for _ in range(limit):
        door.comes()
    for event in events:
        door.drain = interval * door.admission.in_flight
        if event == "leaves" and door.admission.in_flight:
            door.leaves()
        elif event == "due" and due:
            client = min(due, key=lambda one: due[one])
            door.now = max(door.now, due.pop(client))
            free = door.admission.in_flight < limit
            wait = door.comes(client)
            assert wait is None or not free, f"{door.admission.in_flight} of {limit} places are taken"
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
    refused = refusal(door, Outlook(finish=12.0, solo=3.0), deadline=5.0)
    assert (refused.code, refused.status, refused.retry_after) == ("deadline", 429, 7)
    assert door.comes("x", Outlook(12.0, 3.0), 12.0) is None
    assert door.comes("y", Outlook(12.0, 3.0)) is None


def test_a_deadline_is_refused_by_the_idle_server_too() -> None:
    assert refusal(Door(4), Outlook(3.0, 3.0), deadline=2.0).code == "deadline"


def test_a_wait_beyond_the_limit_is_refused() -> None:
    door = Door(4, max_wait=10.0)
    assert door.comes("x", Outlook(finish=40.0, solo=30.0)) is None  # what it takes itself is no wait
    refused = refusal(door, Outlook(finish=45.0, solo=30.0))
    assert (refused.code, refused.retry_after) == ("wait", 5)


def test_too_little_memory_is_refused_while_others_use_it() -> None:
    door = Door(4, drain=6.0)
    assert door.comes("x", Outlook(1.0, 1.0, fits=False)) is None
    refused = refusal(door, Outlook(1.0, 1.0, fits=False))
    assert (refused.code, refused.retry_after) == ("memory", 6)


def test_a_request_of_which_nothing_is_known_is_let_in() -> None:
    assert Door(1, max_wait=0.0).comes("x", None, deadline=0.001) is None


def test_refusals_are_counted_by_reason() -> None:
    door = Door(2, max_wait=10.0)
    door.comes()
    assert dict(door.admission.refused) == {}
    for _ in range(2):
        refusal(door, Outlook(50.0, 1.0), deadline=5.0)
    refusal(door, Outlook(50.0, 1.0))
    refusal(door, Outlook(1.0, 1.0, fits=False))
    door.comes()
    for _ in range(3):
        refusal(door, Outlook(1.0, 1.0))
    assert dict(door.admission.refused) == {"deadline": 2, "wait": 1, "memory": 1, "queue_full": 3}
    assert set(REASONS) == set(door.admission.refused)


def test_threads_never_share_a_place() -> None:
    """Entering is made slow where it counts, between the look at the places and the taking of one."""
    limit, rounds = 3, 60
    shared = Admission(limit, lambda: 0.001)
    inside, most, guard, pause = 0, 0, threading.Lock(), threading.Event()

    def outlook() -> None:
        pause.wait(0.0005)

    def client(number: int) -> tuple[int, int]:
        nonlocal inside, most
        let_in = refused = 0
        for _ in range(rounds):
            try:
                shared.enter(number, outlook)
            except Refused:
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
