"""Policies: whose turn it is, and that everybody's comes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from stepweave.scheduling import policy
from stepweave.scheduling.cost import CostModel
from stepweave.scheduling.policy import POLICIES, aged_remaining, fifo, keyed_fifo, round_robin
from stepweave.scheduling.task import Key, Load, Priority, Task
from tests.scheduling.toy import Call, play, queued, task

A, B, C = Key("transformer", 64), Key("transformer", 256), Key("transformer", 1024)
ENCODER, DECODER = Key("text_encoder", 8), Key("vae", 64)
EVEN = CostModel.of({key: {1: 1.0, 8: 1.0} for key in (A, B, C, ENCODER, DECODER)})  # any forward takes a second


def job(key: Key = A, steps: int = 10, rows: int = 1, **options: object) -> Task:
    return task(EVEN, Load(key, rows), count=steps, **options)  # type: ignore[arg-type]


def up_to(rows: int) -> policy.Cap:
    return lambda call: rows


def order(tasks: Sequence[Task], now: float = 0.0) -> list[Task]:
    """In which the default policy would serve them if each left after its turn, one at a time."""
    left, served = list(tasks), []
    while left:
        (call,) = aged_remaining(queued(left), now, up_to(1), EVEN)
        served.append(call.task)
        left.remove(call.task)
    return served


# The default's order


@given(st.permutations(range(3)))
def test_classes_come_before_all_else(places: list[int]) -> None:
    high = job(A, steps=200, priority=Priority.HIGH)
    normal = job(B, steps=100, deadline=101.0)
    low = job(C, steps=1, priority=Priority.LOW, deadline=2.0)
    tasks = [high, normal, low]
    assert order([tasks[place] for place in places]) == tasks


@given(st.permutations(range(6)))
def test_the_earliest_deadline_comes_first_among_the_feasible_and_the_late_come_last(places: list[int]) -> None:
    soon = job(A, steps=20, deadline=30.0)
    later = job(B, steps=2, deadline=40.0)
    without = job(C, steps=1)
    longer_without = job(A, steps=3)
    late = job(B, steps=5, deadline=4.0)  # 5 steps of a second cannot be done by then
    later_late = job(C, steps=9, deadline=3.0)
    tasks = [soon, later, without, longer_without, late, later_late]
    assert order([tasks[place] for place in places]) == tasks


def test_a_deadline_that_can_just_be_met_is_feasible() -> None:
    feasible, late, free = job(steps=5, deadline=5.0), job(steps=4, deadline=3.9), job(steps=1)
    assert order([late, free, feasible]) == [feasible, free, late]


def test_least_remaining_work_comes_first() -> None:
    begun, fresh = job(A, steps=30), job(B, steps=10)
    begun.opened, begun.done = True, 25
    assert order([fresh, begun]) == [begun, fresh]
    begun.done = 15
    assert order([fresh, begun]) == [fresh, begun]


def test_age_counts_by_the_time_alone() -> None:
    old, fresh = job(A, steps=30, arrived=0.0), job(B, steps=10, arrived=50.0)
    assert order([fresh, old], now=50.0) == [fresh, old]  # 30 / (1 + 50/30) = 11.25
    older = job(A, steps=30, arrived=-15.0)
    assert order([fresh, older], now=50.0) == [older, fresh]  # 30 / (1 + 65/30) = 9.5


def test_of_equals_the_first_to_come_is_served() -> None:
    second, first = job(arrived=0.0), job(arrived=-0.0)
    second.arrived = 1.0
    assert order([second, first], now=1.0)[0] is first


@pytest.mark.parametrize(
    "overtaken", [{"priority": Priority.LOW}, {"deadline": 1.0}, {"steps": 14}], ids=["class", "late", "longer"]
)
def test_after_the_stated_wait_a_job_goes_before_class_and_deadline(overtaken: dict[str, object]) -> None:
    """A minute, or four times what it takes alone."""
    waited = job(A, **overtaken)  # type: ignore[arg-type]
    first = job(B, steps=1, priority=Priority.HIGH, deadline=63.0, arrived=60.0)
    assert order([waited, first], now=60.0) == [first, waited]
    assert order([waited, first], now=60.1) == [waited, first]
    long, newer = job(A, steps=30, priority=Priority.LOW), job(B, steps=1, arrived=110.0)
    assert order([long, newer], now=120.0) == [newer, long]
    assert order([long, newer], now=120.1) == [long, newer]


def test_the_time_in_which_a_job_got_on_is_no_wait() -> None:
    slow = job(A, steps=100, priority=Priority.LOW)
    slow.opened, slow.done = True, 90
    fresh = job(B, steps=1, priority=Priority.HIGH, arrived=480.0)
    assert order([slow, fresh], now=485.0) == [fresh, slow]  # it lost 395 s, and may lose 400
    assert order([slow, fresh], now=491.0) == [slow, fresh]


def test_of_those_that_waited_too_long_the_oldest_goes_first() -> None:
    tasks = [
        job(A, priority=Priority.LOW, arrived=0.0),
        job(B, arrived=1.0),
        job(C, priority=Priority.HIGH, arrived=2.0),
    ]
    assert order(tasks[::-1], now=100.0) == tasks


# The default's groups


def test_the_best_ranked_call_takes_others_of_its_key_along_up_to_the_cap() -> None:
    tasks = [job(A, steps=steps) for steps in (5, 3, 4, 2)] + [job(B, steps=6, priority=Priority.HIGH)]
    high = aged_remaining(queued(tasks), 0.0, up_to(3), EVEN)
    assert [call.task for call in high] == [tasks[4]]
    group = aged_remaining(queued(tasks[:4]), 0.0, up_to(3), EVEN)
    assert [call.task.demand.steps for call in group] == [2, 3, 4]


def test_one_that_does_not_fit_lets_smaller_ones_by() -> None:
    tasks = [job(steps=1, rows=2), job(steps=2, rows=3), job(steps=3, rows=2)]
    group = aged_remaining(queued(tasks), 0.0, up_to(4), EVEN)
    assert [call.task.demand.steps for call in group] == [1, 3]


def test_a_call_of_more_rows_than_the_cap_runs_by_itself() -> None:
    for chosen in POLICIES.values():
        group = chosen(queued([job(rows=5), job(rows=1, arrived=1.0)]), 2.0, up_to(4), EVEN)
        assert sum(call.rows for call in group) in (1, 5)


def test_what_a_newcomer_needs_before_its_first_step_goes_first_if_it_can_join() -> None:
    running = job(A, steps=9)
    running.opened = True
    newcomer = task(EVEN, Load(A, 1), count=9, before=[Load(ENCODER, 1)], arrived=1.0)
    queues = queued([running])
    encode = Call(ENCODER, 1, ENCODER, newcomer)
    queues[ENCODER] = [encode]
    assert aged_remaining(queues, 1.0, up_to(2), EVEN) == [encode]
    assert aged_remaining(queues, 1.0, up_to(1), EVEN) == queues[A]  # there is no room for it
    other = task(EVEN, Load(B, 1), count=9, before=[Load(ENCODER, 1)], arrived=1.0)
    queues[ENCODER] = [Call(ENCODER, 1, ENCODER, other)]
    assert aged_remaining(queues, 1.0, up_to(2), EVEN) == queues[A]  # its steps are of another size
    running.arrived = -500.0
    queues[ENCODER] = [encode]
    assert aged_remaining(queues, 1.0, up_to(2), EVEN) == queues[A]  # it has waited too long


COSTS = CostModel.of({A: {1: 0.09}, B: {1: 1.0}, ENCODER: {1: 0.09}, DECODER: {1: 0.09}})


def test_a_brief_call_goes_before_a_long_one() -> None:
    long = task(COSTS, Load(B, 1), count=10)
    decoded = task(COSTS, Load(A, 1), count=10, after=[Load(DECODER, 1)])
    decoded.opened, decoded.done = True, 10
    queues = queued([long])
    queues[DECODER] = [Call(DECODER, 1, DECODER, decoded)]
    assert aged_remaining(queues, 0.0, up_to(1), COSTS) == queues[DECODER]
    long.arrived = -500.0
    assert aged_remaining(queues, 0.0, up_to(1), COSTS) == queues[B]


def test_many_brief_steps_of_a_lower_class_do_not_hold_up_a_higher_one() -> None:
    """Two jobs of about equal work: a step of the high one takes as long as eleven of the low one."""
    high = task(COSTS, Load(B, 1), count=20, priority=Priority.HIGH)
    low = task(COSTS, Load(A, 1), count=200, priority=Priority.LOW)
    assert (high.solo, low.solo) == pytest.approx((20, 18))
    ends = play([high, low], aged_remaining, COSTS, up_to(1))
    assert ends[0] <= 1.1 * high.solo  # it ends at 38 s, when the other, of the lowest class, is done


def test_many_brief_steps_do_not_go_before_one_that_is_the_last() -> None:
    last = task(COSTS, Load(B, 1), count=1)
    brief = task(COSTS, Load(A, 1), count=200)
    assert play([last, brief], aged_remaining, COSTS, up_to(1))[0] <= 1.1


# The others


def test_fifo_joins_by_arrival_until_one_is_of_another_kind() -> None:
    tasks = [job(A, arrived=0.0), job(A, arrived=1.0), job(B, arrived=2.0), job(A, arrived=3.0)]
    assert [call.task for call in fifo(queued(tasks), 9.0, up_to(8), EVEN)] == tasks[:2]
    tasks[0].begun = tasks[1].begun = True
    assert [call.task for call in fifo(queued(tasks), 9.0, up_to(8), EVEN)] == tasks[:2]


def test_fifo_holds_all_up_behind_one_for_which_there_is_no_room() -> None:
    tasks = [job(rows=2, arrived=0.0), job(rows=3, arrived=1.0), job(rows=1, arrived=2.0)]
    assert [call.task for call in fifo(queued(tasks), 9.0, up_to(4), EVEN)] == tasks[:1]


def test_under_fifo_a_job_waits_for_the_batch_before_it_to_end() -> None:
    ends = play([job(A, 10), job(B, 2, arrived=0.5), job(A, 2, arrived=0.6)], fifo, EVEN, up_to(8))
    assert ends == pytest.approx([10, 12, 14])
    ends = play([job(A, 10), job(A, 2, arrived=0.5), job(B, 2, arrived=0.6)], fifo, EVEN, up_to(8))
    assert ends == pytest.approx([10, 3, 12])


def test_under_keyed_fifo_jobs_of_the_oldest_ones_key_pass_others() -> None:
    ends = play([job(A, 10), job(B, 2, arrived=0.5), job(A, 2, arrived=0.6)], keyed_fifo, EVEN, up_to(8))
    assert ends == pytest.approx([10, 12, 3])


def test_under_round_robin_keys_take_turns() -> None:
    tasks = [job(A, 3), job(B, 3, arrived=0.1), job(A, 3, arrived=0.2)]
    assert play(tasks, round_robin, EVEN, up_to(8)) == pytest.approx([5, 6, 7])
    assert play([job(A, 3), job(A, 3, arrived=0.1)], round_robin, EVEN, up_to(1)) == pytest.approx([3, 6])


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
        one = task(cost, Load(key, rows), count=steps, arrived=arrived, priority=priority, deadline=deadline)
        one.begun, one.opened = begun, begun and opened
        tasks.append(one)
    queues = queued(tasks)
    before = {key: list(queue) for key, queue in queues.items()}
    picked = POLICIES[name](queues, now, up_to(most), cost)
    assert picked
    assert len(set(map(id, picked))) == len(picked)
    queue = queues[picked[0].key]
    assert all(call in queue for call in picked)
    assert len(picked) == 1 or sum(call.rows for call in picked) <= most
    assert queues == before, "a policy is a pure function"
    assert picked == POLICIES[name](queues, now, up_to(most), cost)


# Starvation is bounded

PATIENCE, PATIENCE_SOLO = 60.0, 4.0  # as docs/scheduling.md states them


class Witness:
    """What each job's bound is made of, noted as it is seen from outside."""

    def __init__(self, tasks: Sequence[Task], cost: CostModel, cap: policy.Cap) -> None:
        self._cost, self._cap = cost, cap
        self._own = {one: self._full(one) for one in tasks}
        loads = [
            load for one in tasks for part in (one.demand.before, one.demand.step, one.demand.after) for load in part
        ]
        self._longest = max(self._group(load) for load in loads)
        self.before: dict[Task, float] = {}  # seconds of those ahead, as of when patience ran out

    def watch(self, now: float, inside: Sequence[Task]) -> None:
        for one in inside:
            if one not in self.before and one.lost(now) > max(PATIENCE, PATIENCE_SOLO * one.solo):
                ahead = (other for other in inside if other is not one and other.arrived <= one.arrived)
                self.before[one] = sum(map(self._full, ahead))

    def bound(self, one: Task) -> float:
        """When a job ends at the latest: its patience, what was ahead of it then, its own work and a forward that was running."""
        patience = max(PATIENCE, PATIENCE_SOLO * one.solo)
        return one.arrived + patience + self.before.get(one, 0.0) + self._own[one] + self._longest

    def _full(self, one: Task) -> float:
        """Seconds of what is left of a job if each of its forwards takes as long as that of a full group."""
        demand = one.demand
        before, step, after = (
            sum(load.calls * self._group(load) for load in part) for part in (demand.before, demand.step, demand.after)
        )
        return (0 if one.opened else before) + one.left * step + after

    def _group(self, load: Load) -> float:
        return self._cost.seconds(load.key, max(load.rows, self._cap(Call(load.key, load.rows, load.key, Task()))))


def overdue(tasks: Sequence[Task], cost: CostModel, cap: policy.Cap) -> tuple[list[Task], int]:
    """Jobs that end after their bound under the default policy; how many ran out of patience."""
    witness = Witness(tasks, cost, cap)
    ends = play(tasks, aged_remaining, cost, cap, watch=witness.watch)
    late = [one for one, end in zip(tasks, ends, strict=True) if end > witness.bound(one) * (1 + 1e-9)]
    return late, len(witness.before)


JOBS = st.lists(
    st.tuples(
        st.floats(0, 12),  # after the one before, seconds
        st.sampled_from((A, B, C)),
        st.integers(0, 8),  # steps
        st.integers(1, 3),  # rows
        st.integers(1, 2),  # calls of a step
        st.booleans(),  # with an encoder and a decoder
        st.sampled_from(Priority),
        st.none() | st.floats(0, 300),  # deadline, seconds after it came
    ),
    min_size=1,
    max_size=25,
)
FIXED, SLOPES = st.floats(0.0, 8.0), st.floats(0.01, 3.0)


@settings(max_examples=150, deadline=None)
@given(JOBS, st.lists(st.tuples(FIXED, SLOPES), min_size=5, max_size=5), st.integers(1, 4))
def test_every_job_ends_within_its_bound(
    jobs: list[tuple[float, Key, int, int, int, bool, Priority, float | None]],
    curves: list[tuple[float, float]],
    most: int,
) -> None:
    keys = (A, B, C, ENCODER, DECODER)
    cost = CostModel.of(
        {key: {1: base + slope, 4: base + 4 * slope} for key, (base, slope) in zip(keys, curves, strict=True)}
    )
    tasks, now = [], 0.0
    for after, key, steps, rows, calls, whole, priority, deadline in jobs:
        now += after
        tasks.append(
            task(
                cost,
                Load(key, rows, calls),
                count=steps,
                before=[Load(ENCODER, rows)] if whole else (),
                after=[Load(DECODER, 1)] if whole or not steps else (),
                arrived=now,
                priority=priority,
                deadline=None if deadline is None else now + deadline,
            )
        )
    late, impatient = overdue(tasks, cost, up_to(most))
    event(f"ran out of patience: {min(impatient, 5)}")
    assert not late, [(one.arrived, one.demand, one.priority, one.deadline) for one in late]


def crowd(key: Key, seconds: float, steps: int, number: int, **options: object) -> list[Task]:
    """Jobs that come as fast as they can be served one by one."""
    every = steps * seconds
    return [job(key, steps, arrived=i * every, **options) for i in range(number)]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("what", ["class", "deadline", "age"])
def test_without_patience_the_bound_would_not_hold(what: str, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not holds:
        monkeypatch.setattr(policy, "PATIENCE", math.inf)
    if what == "class":
        tasks = [job(B, 5, priority=Priority.LOW), *crowd(A, 1.0, 5, 60, priority=Priority.NORMAL)]
    elif what == "deadline":
        tasks = [job(B, 5), *crowd(A, 1.0, 5, 60)]
        for one in tasks[1:]:
            one.deadline = one.arrived + 50
    else:
        tasks = [job(B, 50, priority=Priority.LOW, deadline=20.0), *crowd(A, 1.0, 2, 200, priority=Priority.LOW)]
    late, impatient = overdue(tasks, EVEN, up_to(1))
    assert impatient
    assert (late == []) == holds


def test_brief_calls_do_not_starve_a_long_one_either() -> None:
    long = task(COSTS, Load(B, 1), count=5)
    decoded = [task(COSTS, Load(A, 1), count=0, after=[Load(DECODER, 1, 10)], arrived=i * 0.9) for i in range(200)]
    late, _ = overdue([long, *decoded], COSTS, up_to(1))
    assert not late
