"""Starvation is bounded: whoever ran out of patience is done within a time that those who come
later cannot lengthen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from stepweave.planning.cost import CostModel
from stepweave.scheduling import policy
from stepweave.scheduling.policy import Cap, Policy, aged, thrifty
from stepweave.scheduling.task import Key, Load, Priority, Task
from tests.support.simulated_engine import Call, play, task

A, B, C = Key("transformer", 64), Key("transformer", 256), Key("transformer", 1024)
ENCODER, DECODER = Key("text_encoder", 8), Key("vae", 64)
PATIENCE, PATIENCE_SOLO = 60.0, 4.0  # as the policy's docstrings state them


class Witness:
    """When each job must be done, noted as it is seen from outside.

    From the forward that begins first once a job is for good overdue, it takes at most the sum of
    what each of its own forwards that are left may take, and each of those of the jobs that came
    before it and are still there, whether they are overdue then or will be. A forward may take as
    long as that of a full group; with `thrifty` twice that, since others go first for as long, and
    the longest one of others, which may begin just before that time is over.
    """

    def __init__(self, tasks: Sequence[Task], cost: CostModel, cap: Cap, *, halved: bool) -> None:
        self._cost, self._cap, self._halved = cost, cap, halved
        loads = chain.from_iterable(
            (*one.demand.before, *one.demand.step, *one.demand.after) for one in tasks
        )
        self._longest = max(map(self._group, loads))
        self.latest: dict[Task, float] = {}

    def watch(self, now: float, inside: Sequence[Task]) -> None:
        for one in inside:
            if one.lost(now) <= max(PATIENCE, PATIENCE_SOLO * one.solo):
                # it was overdue in the midst of a step only, which is counted at its end
                self.latest.pop(one, None)
            elif one not in self.latest:
                older = (
                    other for other in inside if other is not one and other.arrived <= one.arrived
                )
                self.latest[one] = now + sum(map(self._left, (one, *older)))

    def bound(self, one: Task) -> float:
        """For those that never were overdue, by what that means: the forward that was their last
        may have been one too many."""
        patient = one.arrived + max(PATIENCE, PATIENCE_SOLO * one.solo) + one.solo + self._longest
        return self.latest.get(one, patient)

    def _left(self, one: Task) -> float:
        """Seconds that what is left of a job may take."""
        demand = one.demand
        before, step, after = (
            sum(load.calls * self._most(load) for load in part)
            for part in (demand.before, demand.step, demand.after)
        )
        return (0 if one.opened else before) + one.left * step + after

    def _most(self, load: Load) -> float:
        return 2 * self._group(load) + self._longest if self._halved else self._group(load)

    def _group(self, load: Load) -> float:
        return self._cost.seconds(
            load.key, max(load.rows, self._cap(Call(load.key, load.rows, load.key, Task())))
        )


def played(
    tasks: Sequence[Task], cost: CostModel, rows: int, chosen: Policy = thrifty
) -> tuple[list[Task], Witness, list[float]]:
    """Jobs that end after their bound; the witness; all ends."""
    witness = Witness(tasks, cost, lambda call: rows, halved=chosen is thrifty)
    ends = play(tasks, chosen, cost, lambda call: rows, watch=witness.watch)
    late = [
        one for one, end in zip(tasks, ends, strict=True) if end > witness.bound(one) * (1 + 1e-9)
    ]
    return late, witness, ends


JOBS = st.lists(
    st.tuples(
        st.floats(0, 8),  # after the one before, seconds
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
FIXED, SLOPES = st.floats(0.0, 9.0), st.floats(0.1, 4.0)


@settings(max_examples=150, deadline=None)
@given(
    JOBS,
    st.lists(st.tuples(FIXED, SLOPES), min_size=5, max_size=5),
    st.integers(1, 4),
    st.sampled_from((thrifty, thrifty, aged)),
)
def test_every_job_ends_within_its_bound(
    jobs: list[tuple[float, Key, int, int, int, bool, Priority, float | None]],
    curves: list[tuple[float, float]],
    most: int,
    chosen: Policy,
) -> None:
    keys = (A, B, C, ENCODER, DECODER)
    cost = CostModel.of(
        {
            key: {1: base + slope, 4: base + 4 * slope}
            for key, (base, slope) in zip(keys, curves, strict=True)
        }
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
    late, witness, _ = played(tasks, cost, most, chosen)
    event(f"{chosen.__name__}, ran out of patience: {min(len(witness.latest), 5)}")
    assert not late, [(one.arrived, one.demand, one.priority, one.deadline) for one in late]


# It is patience, and the share of the time, that hold the bound

EVEN = CostModel.of({key: {1: 1.0, 8: 1.0} for key in (A, B)})  # any forward takes a second


def crowd(cost: CostModel, steps: int, number: int, rows: int = 1) -> list[Task]:
    """Jobs that come as fast as they can be served one by one."""
    every = steps * cost.seconds(A, rows)
    return [task(cost, Load(A, rows), count=steps, arrived=i * every) for i in range(number)]


def starving(what: str) -> tuple[list[Task], CostModel, int]:
    """Jobs of which the first would wait for all others, the cost of forwards, and the most rows of
    one."""
    if what == "class":
        return (
            [task(EVEN, Load(B, 1), count=5, priority=Priority.LOW), *crowd(EVEN, 5, 60)],
            EVEN,
            1,
        )
    if what == "deadline":
        tasks = [task(EVEN, Load(B, 1), count=5), *crowd(EVEN, 5, 60)]
        for one in tasks[1:]:
            one.deadline = one.arrived + 10
        return tasks, EVEN, 1
    if what == "length":
        return [task(EVEN, Load(B, 1), count=50, deadline=20.0), *crowd(EVEN, 2, 200)], EVEN, 1
    assert what == "waste"  # of seven rows of eight, where theirs are full
    return [task(EVEN, Load(B, 1), count=12), *crowd(EVEN, 10, 40, rows=8)], EVEN, 8


STARVING = pytest.mark.parametrize("what", ["class", "deadline", "length", "waste"])


@STARVING
def test_nobody_starves_for_class_deadline_length_or_waste(what: str) -> None:
    tasks, cost, rows = starving(what)
    late, witness, _ = played(tasks, cost, rows)
    assert tasks[0] in witness.latest
    assert not late


@STARVING
@pytest.mark.parametrize("others", [math.inf, 9.0], ids=["no share", "a tenth"])
def test_with_less_than_half_of_the_time_the_bound_would_not_hold(
    what: str, others: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "OTHERS", others)
    tasks, cost, rows = starving(what)
    assert tasks[0] in played(tasks, cost, rows)[0]


@STARVING
def test_without_patience_the_bound_would_not_hold(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "PATIENCE", math.inf)
    tasks, cost, rows = starving(what)
    assert tasks[0] in played(tasks, cost, rows)[0]


def test_the_bound_is_reached() -> None:
    """If forwards of others take a little less than its own, two of them go before each of its
    own."""
    cost = CostModel.of({A: {1: 0.99}, B: {1: 1.0}})
    tasks = [task(cost, Load(B, 1), count=100, priority=Priority.LOW), *crowd(cost, 5, 200)]
    late, witness, ends = played(tasks, cost, 1)
    assert not late
    assert ends[0] > 0.98 * witness.bound(tasks[0])


def test_an_older_job_that_becomes_overdue_later_goes_before_too() -> None:
    """A long one has more patience, but once it has lost that, it is the oldest."""
    cost = CostModel.of({A: {1: 30.0}, B: {1: 1.0}, C: {1: 1.0}})
    long = task(cost, Load(B, 1), count=100, priority=Priority.LOW)  # may lose 400 s
    # may lose a minute
    short = task(cost, Load(C, 1), count=15, arrived=0.1, priority=Priority.LOW)
    late, _, ends = played([long, short, *crowd(cost, 1, 150)], cost, 1)
    assert not late
    # the last is its bound if none but it were overdue
    assert ends[1] > ends[0] > 60 + 100 * 31 > 90 + 15 * 32
