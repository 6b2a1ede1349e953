"""Policies: whose turn it is. That everybody's comes is tested in test_starvation.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policies import POLICIES, aged, fifo, keyed_fifo, round_robin
from stepweave.planning.cost import CostModel
from stepweave.scheduling.policy import Cap, Policy, fill, srpt
from stepweave.scheduling.queues import cost_of
from stepweave.scheduling.task import Demand, Key, Load, Priority, Task
from tests.support.simulated_engine import Call, play, queued, task

A, B, C = Key("transformer", 64), Key("transformer", 256), Key("transformer", 1024)
ENCODER, DECODER = Key("text_encoder", 8), Key("vae", 64)
# any forward takes a second
EVEN = CostModel.of({key: {1: 1.0, 8: 1.0} for key in (A, B, C, ENCODER, DECODER)})


def job(key: Key = A, steps: int = 10, rows: int = 1, **options: object) -> Task:
    return task(EVEN, Load(key, rows), count=steps, **options)  # type: ignore[arg-type]


def up_to(rows: int) -> Cap:
    return lambda call: rows


def order(tasks: Sequence[Task], now: float = 0.0, chosen: Policy = srpt) -> list[Task]:
    """In which a policy would serve them if each left after its turn, one at a time."""
    left, served = list(tasks), []
    while left:
        (call,) = chosen.choose(queued(left), now, up_to(1), EVEN)
        served.append(call.task)
        left.remove(call.task)
    return served


# The default's order


@given(st.permutations(range(3)), st.sampled_from((srpt, aged)))
def test_classes_come_before_all_else(places: list[int], chosen: Policy) -> None:
    high = job(A, steps=200, priority=Priority.HIGH)
    normal = job(B, steps=100, deadline=101.0)
    low = job(C, steps=1, priority=Priority.LOW, deadline=2.0)
    tasks = [high, normal, low]
    assert order([tasks[place] for place in places], chosen=chosen) == tasks


@given(st.permutations(range(7)))
def test_deadlines_that_press_come_first_by_deadline_and_the_late_come_last(
    places: list[int],
) -> None:
    soon = job(A, steps=20, deadline=30.0)
    later = job(B, steps=10, deadline=40.0)
    without = job(C, steps=1)
    at_leisure = job(B, steps=2, deadline=35.0)
    longer_without = job(A, steps=3)
    late = job(B, steps=5, deadline=4.0)  # 5 steps of a second cannot be done by then
    later_late = job(C, steps=9, deadline=3.0)
    tasks = [soon, later, without, at_leisure, longer_without, late, later_late]
    assert order([tasks[place] for place in places]) == tasks


def test_a_deadline_presses_once_four_times_the_remaining_work_cannot_be_spared() -> None:
    pressed, free = job(A, steps=2, deadline=10.0), job(B, steps=1)
    assert order([free, pressed]) == [pressed, free]
    pressed.deadline = 10.01
    assert order([free, pressed]) == [free, pressed]
    assert order([free, pressed], now=0.02) == [pressed, free]


def test_a_deadline_that_can_just_be_met_presses_and_one_that_cannot_is_late() -> None:
    feasible, late, free = job(steps=5, deadline=5.0), job(steps=4, deadline=3.9), job(steps=9)
    assert order([late, free, feasible]) == [feasible, free, late]


@pytest.mark.parametrize("chosen", [srpt, aged])
def test_least_remaining_work_comes_first(chosen: Policy) -> None:
    begun, fresh = job(A, steps=30), job(B, steps=10)
    begun.opened, begun.done = True, 25
    assert order([fresh, begun], chosen=chosen) == [begun, fresh]
    begun.done = 15
    assert order([fresh, begun], chosen=chosen) == [fresh, begun]


def test_of_equals_the_first_to_come_is_served() -> None:
    first, second = job(arrived=0.0), job(arrived=1.0)
    assert order([second, first], now=1.0)[0] is first


@pytest.mark.parametrize("chosen", [srpt, aged])
def test_many_brief_steps_of_a_lower_class_do_not_hold_up_a_higher_one(chosen: Policy) -> None:
    """Two jobs of about equal work: a step of the high one takes as long as eleven of the low
    one."""
    high = task(COSTS, Load(B, 1), count=20, priority=Priority.HIGH)
    low = task(COSTS, Load(A, 1), count=200, priority=Priority.LOW)
    assert (high.solo, low.solo) == pytest.approx((20, 18))
    assert play([high, low], chosen, COSTS, up_to(1))[0] <= 1.1 * high.solo


@pytest.mark.parametrize("chosen", [srpt, aged])
def test_many_brief_steps_do_not_go_before_one_that_is_the_last(chosen: Policy) -> None:
    last = task(COSTS, Load(B, 1), count=1)
    brief = task(COSTS, Load(A, 1), count=200)
    assert play([last, brief], chosen, COSTS, up_to(1))[0] <= 1.1


COSTS = CostModel.of({A: {1: 0.09}, B: {1: 1.0}})

# Overdue jobs


@pytest.mark.parametrize("chosen", [srpt, aged])
@pytest.mark.parametrize(
    "overtaken",
    [{"priority": Priority.LOW}, {"deadline": 1.0}, {"steps": 14}],
    ids=["class", "late", "longer"],
)
def test_after_the_stated_wait_a_job_goes_before_class_and_deadline(
    overtaken: dict[str, object], chosen: Policy
) -> None:
    """A minute, or four times what it takes alone."""
    waited = job(A, **overtaken)  # type: ignore[arg-type]
    first = job(B, steps=1, priority=Priority.HIGH, deadline=63.0, arrived=60.0)
    assert order([waited, first], now=60.0, chosen=chosen) == [first, waited]
    assert order([waited, first], now=60.1, chosen=chosen) == [waited, first]
    long, newer = job(A, steps=30, priority=Priority.LOW), job(B, steps=1, arrived=110.0)
    assert order([long, newer], now=120.0, chosen=chosen) == [newer, long]
    assert order([long, newer], now=120.1, chosen=chosen) == [long, newer]


@pytest.mark.parametrize("chosen", [srpt, aged])
def test_the_time_in_which_a_job_got_on_is_no_wait(chosen: Policy) -> None:
    slow = job(A, steps=100, priority=Priority.LOW)
    slow.opened, slow.done = True, 90
    fresh = job(B, steps=1, priority=Priority.HIGH, arrived=480.0)
    # it was delayed by 395 s, and may be by 400
    assert order([slow, fresh], now=485.0, chosen=chosen) == [fresh, slow]
    assert order([slow, fresh], now=491.0, chosen=chosen) == [slow, fresh]


@pytest.mark.parametrize("chosen", [srpt, aged])
def test_of_those_that_waited_too_long_the_oldest_goes_first(chosen: Policy) -> None:
    tasks = [
        job(A, priority=Priority.LOW, arrived=0.0),
        job(B, arrived=1.0),
        job(C, priority=Priority.HIGH, arrived=2.0),
    ]
    assert order(tasks[::-1], now=100.0, chosen=chosen) == tasks


def overdue(key: Key = B, cost: CostModel = EVEN, steps: int = 5, **options: object) -> Task:
    """A job of the lowest class that came long before 0."""
    return task(
        cost, Load(key, 1), count=steps, priority=Priority.LOW, **{"arrived": -500.0} | options
    )  # type: ignore[arg-type]


def test_an_overdue_job_and_the_others_take_turns() -> None:
    tasks = [job(A, 20, priority=Priority.HIGH), overdue()]
    assert play(tasks, srpt, EVEN, up_to(1)) == pytest.approx([25, 9])


def test_only_the_oldest_overdue_job_takes_turns() -> None:
    tasks = [job(A, 20, priority=Priority.HIGH), overdue(C, arrived=-400.0), overdue(B)]
    assert play(tasks, srpt, EVEN, up_to(1)) == pytest.approx([30, 18, 9])


def test_an_overdue_job_has_all_of_the_time_if_others_want_none() -> None:
    tasks = [overdue(), job(A, 3, priority=Priority.HIGH, arrived=5.0)]
    assert play(tasks, srpt, EVEN, up_to(1)) == pytest.approx([5, 8])
    alike = [overdue(arrived=-500.0 + i) for i in range(3)]
    assert play(alike, srpt, EVEN, up_to(1)) == pytest.approx([5, 10, 15])


def test_the_turns_are_equal_in_time_not_in_number() -> None:
    uneven = CostModel.of({A: {1: 0.5}, B: {1: 2.0}})
    others = task(uneven, Load(A, 1), count=100, priority=Priority.HIGH)
    assert play([others, overdue(cost=uneven)], srpt, uneven, up_to(1))[1] == pytest.approx(
        2 + 4 * (2 + 2)
    )
    others = task(uneven, Load(B, 1), count=100, priority=Priority.HIGH)
    ends = play([others, overdue(A, uneven)], srpt, uneven, up_to(1))
    assert ends[1] == pytest.approx(0.5 + 4 * (2 + 0.5))  # a forward is not cut short


def test_how_long_a_call_waited_is_what_counts() -> None:
    queues = queued([job(A, 20, priority=Priority.HIGH), overdue()])
    queues[B][0].since = 0.0
    assert srpt.choose(queues, 0.9, up_to(1), EVEN) == queues[A]
    assert srpt.choose(queues, 1.0, up_to(1), EVEN) == queues[B]


def test_an_overdue_job_goes_first_among_its_key_and_takes_the_best_along() -> None:
    waited = overdue(A)
    tasks = [job(A, steps=4), job(A, steps=2), waited]
    assert [call.task for call in srpt.choose(queued(tasks), 0.0, up_to(2), EVEN)] == [
        waited,
        tasks[1],
    ]


# The default's groups


@pytest.mark.parametrize("chosen", [srpt, aged])
def test_the_best_ranked_call_takes_others_of_its_key_along_up_to_the_cap(chosen: Policy) -> None:
    tasks = [job(A, steps=steps) for steps in (5, 3, 4, 2)] + [
        job(B, steps=6, priority=Priority.HIGH)
    ]
    high = chosen.choose(queued(tasks), 0.0, up_to(3), EVEN)
    assert [call.task for call in high] == [tasks[4]]
    group = chosen.choose(queued(tasks[:4]), 0.0, up_to(3), EVEN)
    assert [call.task.demand.steps for call in group] == [2, 3, 4]


@pytest.mark.parametrize("chosen", [srpt, aged])
def test_one_that_does_not_fit_lets_smaller_ones_by(chosen: Policy) -> None:
    tasks = [job(steps=1, rows=2), job(steps=2, rows=3), job(steps=3, rows=2)]
    group = chosen.choose(queued(tasks), 0.0, up_to(4), EVEN)
    assert [call.task.demand.steps for call in group] == [1, 3]


def test_a_call_of_more_rows_than_the_cap_runs_by_itself() -> None:
    for chosen in POLICIES.values():
        group = chosen.choose(queued([job(rows=5), job(rows=1, arrived=1.0)]), 2.0, up_to(4), EVEN)
        assert sum(call.rows for call in group) in (1, 5)


def test_calls_with_adapters_have_a_limit_of_their_own() -> None:
    calls = [
        Call("step", 1, A._replace(adapters=adapters), Task(Demand()))
        for adapters in (0, 0, 1, 0, 0)
    ]

    def cap(call: Call) -> int:
        return 3 if call.cost.adapters else 5

    assert fill(calls, cap) == calls[:3]
    assert fill([one for one in calls if not one.cost.adapters], cap) == calls[:2] + calls[3:]
    assert cost_of(calls) == calls[2].cost


# The default minds what half-empty forwards waste

MIXED = CostModel.of(
    {A: {1: 1.0, 8: 1.0}, B: {1: 1.0, 8: 8.0}, ENCODER: {1: 1.0, 8: 1.0}, DECODER: {1: 1.0, 8: 1.0}}
)  # batches pay for all keys but B


def begun(key: Key, steps: int, number: int = 1, **options: object) -> list[Task]:
    tasks = [task(MIXED, Load(key, 1), count=steps, **options) for _ in range(number)]  # type: ignore[arg-type]
    for one in tasks:
        one.opened = True
    return tasks


def goes_first(*tasks: Task, now: float = 0.0) -> Key:
    return srpt.choose(queued(tasks), now, up_to(8), MIXED)[0].cost


def test_a_half_empty_forward_lets_others_go_first_the_more_the_more_there_are() -> None:
    """A lone row's remaining work is counted 1 + 3 x 7/8 times for each call of another key that
    waits."""
    lone = begun(A, 4)
    assert goes_first(*lone, *begun(B, 14)) == B
    assert goes_first(*lone, *begun(B, 15)) == A
    assert goes_first(*lone, *begun(B, 24, 2)) == B
    assert goes_first(*lone, *begun(B, 26, 2)) == A


def test_the_fuller_the_group_the_less_it_lets_others_go_first() -> None:
    longest = []  # work of others that goes first
    for number in (1, 2, 4, 7):
        group = begun(A, 4, number)
        longest.append(
            max(steps for steps in range(1, 20) if goes_first(*group, *begun(B, steps)) == B)
        )
    assert longest == [14, 8, 5, 4]
    # a full group lets only less work go first
    assert goes_first(*begun(A, 4, 8), *begun(B, 5)) == A
    assert goes_first(*begun(A, 4, 8), *begun(B, 3)) == B


def test_where_batches_do_not_pay_a_lone_row_wastes_nothing() -> None:
    assert goes_first(*begun(B, 5), *begun(A, 6, 8)) == B


def test_others_of_its_own_key_are_no_reason_to_wait() -> None:
    lone = begun(A, 4)
    assert srpt.choose(queued([*lone, *begun(A, 9, 3)]), 0.0, up_to(1), MIXED)[0].task is lone[0]


def test_what_is_encoded_or_decoded_is_not_priced() -> None:
    encoded = task(MIXED, Load(A, 1), count=3, before=[Load(ENCODER, 1)])
    decoded = task(MIXED, Load(A, 1), count=3, after=[Load(DECODER, 1, 4)])
    decoded.opened, decoded.done = True, 3
    for key, one in ((ENCODER, encoded), (DECODER, decoded)):
        for steps, first in ((5, key), (3, B)):
            queues = queued(begun(B, steps))
            queues[key] = [Call(key, 1, key, one)]
            assert srpt.choose(queues, 0.0, up_to(8), MIXED)[0].cost == first


def test_classes_and_deadlines_that_press_are_not_outweighed_by_waste() -> None:
    assert goes_first(*begun(A, 9, priority=Priority.HIGH), *begun(B, 1, 5)) == A
    assert goes_first(*begun(A, 9, deadline=10.0), *begun(B, 1, 5)) == A
    assert goes_first(*begun(A, 9, deadline=10.0), *begun(B, 8, deadline=11.0)) == A


def test_while_one_lets_others_go_first_others_of_its_kind_come() -> None:
    tasks = [*begun(A, 3), *begun(B, 4), *begun(A, 3, arrived=1.0)]
    assert play(tasks, srpt, MIXED, up_to(8)) == pytest.approx([7, 4, 7])


# The default gathers calls after the last step

# a decoding of several images takes a quarter more than that of one
DECODES = CostModel.of({A: {1: 1.0, 8: 1.0}, B: {1: 1.0, 8: 1.0}, DECODER: {1: 0.4, 4: 0.5}})
DECODED = [Load(DECODER, 1)]


def steps_left(*left: int, key: Key = A, **options: object) -> list[Task]:
    """Jobs with so many steps left, and a decoding after them."""
    tasks = [
        task(DECODES, Load(key, 1), count=10, after=DECODED, **options)  # type: ignore[arg-type]
        for _ in left
    ]
    for one, count in zip(tasks, left, strict=True):
        one.opened, one.done = True, 10 - count
    return tasks


def decodes(ended: list[Task], running: list[Task], most: int = 8) -> int:
    """How many decodings run next; 0 if a step does."""
    queues = queued(running)
    queues[DECODER] = [Call(DECODER, 1, DECODER, one) for one in ended]
    chosen = srpt.choose(queues, 0.0, up_to(most), DECODES)
    return len(chosen) if chosen[0].cost == DECODER else 0


def test_a_decoding_waits_for_others_where_that_saves_the_others_more() -> None:
    """One more takes 0.03 s rather than 0.4 s: three jobs save 3 x 2 x 0.37 s by a step of 1 s."""
    assert decodes(steps_left(0), steps_left(1, 9, 9)) == 0
    assert decodes(steps_left(0), steps_left(1)) == 1  # only one would be sooner
    assert decodes(steps_left(0), steps_left(9, 9, 9)) == 1  # no other ends soon
    assert decodes(steps_left(0), steps_left(3, 9, 9)) == 1
    assert decodes(steps_left(0), steps_left(3, *[9] * 6)) == 0
    assert decodes(steps_left(0, 0, 0, 0), steps_left(1, 9, 9)) == 4  # four would wait


def test_a_full_batch_of_decodings_does_not_wait() -> None:
    assert decodes(steps_left(0, 0), steps_left(1, *[9] * 6), most=2) == 2
    assert decodes(steps_left(0), steps_left(1, *[9] * 6), most=2) == 0


def test_no_decoding_waits_for_a_lower_class_or_at_the_cost_of_its_deadline() -> None:
    running = steps_left(1, *[9] * 6)
    assert decodes(steps_left(0, priority=Priority.HIGH), running) == 1
    assert decodes(steps_left(0, deadline=1.0), running) == 1
    assert decodes(steps_left(0, deadline=100.0), running) == 0


def test_a_decoding_that_waits_for_others_is_not_put_off_for_ever() -> None:
    """Although another job is always about to end."""
    ended = steps_left(0)
    for waited in range(8):
        if decodes([*ended, *steps_left(*[0] * waited)], steps_left(1, *[9] * 6)):
            break
    assert 0 < waited < 8


# The old default


@given(st.permutations(range(4)))
def test_aged_takes_deadlines_that_can_be_met_first_and_the_late_last(places: list[int]) -> None:
    soon, later = job(A, steps=20, deadline=30.0), job(B, steps=2, deadline=40.0)
    without, late = job(C, steps=1), job(B, steps=5, deadline=4.0)
    tasks = [soon, later, without, late]
    assert order([tasks[place] for place in places], chosen=aged) == tasks


def test_age_counts_by_the_time_alone_for_aged_and_not_for_the_default() -> None:
    old, fresh = job(A, steps=30, arrived=0.0), job(B, steps=10, arrived=50.0)
    assert order([fresh, old], 50.0, aged) == [fresh, old]  # 30 / (1 + 50/30) = 11.25
    older = job(A, steps=30, arrived=-15.0)
    assert order([fresh, older], 50.0, aged) == [older, fresh]  # 30 / (1 + 65/30) = 9.5
    assert order([fresh, older], 50.0) == [fresh, older]


# The others


def test_fifo_joins_by_arrival_until_one_is_of_another_kind() -> None:
    tasks = [job(A, arrived=0.0), job(A, arrived=1.0), job(B, arrived=2.0), job(A, arrived=3.0)]
    assert [call.task for call in fifo.choose(queued(tasks), 9.0, up_to(8), EVEN)] == tasks[:2]
    tasks[0].begun = tasks[1].begun = True
    assert [call.task for call in fifo.choose(queued(tasks), 9.0, up_to(8), EVEN)] == tasks[:2]


def test_fifo_holds_all_up_behind_one_for_which_there_is_no_room() -> None:
    tasks = [job(rows=2, arrived=0.0), job(rows=3, arrived=1.0), job(rows=1, arrived=2.0)]
    assert [call.task for call in fifo.choose(queued(tasks), 9.0, up_to(4), EVEN)] == tasks[:1]


def test_under_fifo_a_job_waits_for_the_batch_before_it_to_end() -> None:
    ends = play([job(A, 10), job(B, 2, arrived=0.5), job(A, 2, arrived=0.6)], fifo, EVEN, up_to(8))
    assert ends == pytest.approx([10, 12, 14])
    ends = play([job(A, 10), job(A, 2, arrived=0.5), job(B, 2, arrived=0.6)], fifo, EVEN, up_to(8))
    assert ends == pytest.approx([10, 3, 12])


def test_under_keyed_fifo_jobs_of_the_oldest_ones_key_pass_others() -> None:
    ends = play(
        [job(A, 10), job(B, 2, arrived=0.5), job(A, 2, arrived=0.6)], keyed_fifo, EVEN, up_to(8)
    )
    assert ends == pytest.approx([10, 12, 3])


def test_under_round_robin_keys_take_turns() -> None:
    tasks = [job(A, 3), job(B, 3, arrived=0.1), job(A, 3, arrived=0.2)]
    assert play(tasks, round_robin, EVEN, up_to(8)) == pytest.approx([5, 6, 7])
    assert play([job(A, 3), job(A, 3, arrived=0.1)], round_robin, EVEN, up_to(1)) == pytest.approx(
        [3, 6]
    )


# Every policy

CALLS = st.lists(
    st.tuples(
        st.sampled_from((A, B, C)),
        st.integers(1, 6),  # rows
        st.integers(0, 40),  # steps
        st.integers(0, 100),  # arrived
        st.sampled_from(Priority),
        st.none() | st.integers(0, 400),  # deadline
        st.booleans(),  # begun
        st.booleans(),  # opened
    ),
    min_size=1,
    max_size=12,
)


@given(
    CALLS,
    st.sampled_from(sorted(POLICIES)),
    st.floats(100, 500),
    st.integers(0, 9),
    st.sampled_from((EVEN, CostModel())),
)
def test_every_policy_picks_some_of_one_queue_within_the_cap(
    calls: list[tuple[Key, int, int, float, Priority, float | None, bool, bool]],
    name: str,
    now: float,
    most: int,
    cost: CostModel,
) -> None:
    tasks = []
    for key, rows, steps, arrived, priority, deadline, begun, opened in calls:
        one = task(
            cost,
            Load(key, rows),
            count=steps,
            arrived=arrived,
            priority=priority,
            deadline=deadline,
        )
        one.begun, one.opened = begun, begun and opened
        tasks.append(one)
    queues = queued(tasks)
    before = {key: list(queue) for key, queue in queues.items()}
    picked = POLICIES[name].choose(queues, now, up_to(most), cost)
    assert picked
    assert len(set(map(id, picked))) == len(picked)
    queue = queues[picked[0].key]
    assert all(call in queue for call in picked)
    assert len(picked) == 1 or sum(call.rows for call in picked) <= most
    assert queues == before, "a policy is a pure function"
    assert picked == POLICIES[name].choose(queues, now, up_to(most), cost)
