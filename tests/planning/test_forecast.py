"""The forecast: that it says what the policy then does, and that no work is lost or made."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policies import aged, keyed_fifo
from stepweave.planning.cost import CostModel, PriceList
from stepweave.planning.forecast import Order, forecast
from stepweave.scheduling.policy import Policy, srpt
from stepweave.scheduling.task import Demand, Key, Load, Priority, Task
from tests.support.simulated_engine import LARGE, QWEN, SMALL, Call, play, task

A, B = Key("transformer", 64), Key("transformer", 256)
ENCODER, DECODER = Key("text_encoder", 8), Key("vae", 64)
COST = CostModel.of(
    {A: {1: 0.10, 2: 0.12, 4: 0.2}, B: {1: 0.2, 4: 0.7}, ENCODER: {1: 0.05}, DECODER: {1: 0.3}}
)  # seconds such that 15 jobs end before any has waited for a minute
KNEES = {SMALL: 8, LARGE: 1}  # of the published curve
PROGRESS = st.tuples(
    st.sampled_from((A, B)), st.integers(1, 12), st.integers(1, 3), st.integers(0, 11)
)  # key, steps, rows, done


def both(rows: int) -> tuple[Callable[[Demand], int], Callable[[Call], int]]:
    """The same cap, as the forecast and as a policy ask for it."""
    return lambda demand: rows, lambda call: rows


def job(key: Key, steps: int, rows: int, done: int = 0, calls: int = 1, **options: object) -> Task:
    made = task(COST, Load(key, rows, calls), count=steps, **options)  # type: ignore[arg-type]
    made.opened = made.begun = done > 0
    made.done = min(done, steps - 1)
    return made


# It says what the policy does


@given(st.lists(PROGRESS, min_size=1, max_size=10), st.integers(1, 2), st.integers(0, 6))
def test_by_arrival_it_is_what_keyed_fifo_does(
    jobs: list[tuple[Key, int, int, int]], calls: int, most: int
) -> None:
    tasks = [job(*one, calls, arrived=-1.0 * i) for i, one in enumerate(jobs)]
    asked, capped = both(most)
    told = forecast(tasks, 0.0, COST, asked, keyed_fifo.rank)
    assert told == pytest.approx(play(tasks, keyed_fifo, COST, capped))


def by_rank(dice: random.Random, tasks: list[Task]) -> list[Task]:
    """Of all classes, some late, some with all the time in the world: ranks that do not change but
    as the jobs get on."""
    for i, one in enumerate(tasks):
        one.priority = dice.choice(list(Priority))
        one.deadline = dice.choice([None, -1.0, 1e6])
        one.arrived = -0.1 - 1e-6 * i
    dice.shuffle(tasks)
    return tasks


@given(st.lists(PROGRESS, min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_by_rank_it_is_what_the_default_does_if_none_share(
    jobs: list[tuple[Key, int, int, int]], dice: random.Random
) -> None:
    tasks = by_rank(dice, [job(*one) for one in jobs])
    asked, capped = both(0)
    told = forecast(tasks, 0.0, COST, asked)
    assert told == pytest.approx(play(tasks, srpt, COST, capped))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 29)), min_size=1, max_size=10),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_by_rank_it_is_what_the_default_does_if_all_are_of_a_kind(
    jobs: list[tuple[int, int]], most: int, dice: random.Random
) -> None:
    tasks = by_rank(dice, [job(A, steps, 1, done) for steps, done in jobs])
    asked, capped = both(most)
    told = forecast(tasks, 0.0, COST, asked)
    assert told == pytest.approx(play(tasks, srpt, COST, capped))


@given(
    st.lists(PROGRESS, min_size=1, max_size=9), st.integers(0, 6), st.randoms(use_true_random=False)
)
def test_by_deadline_it_is_what_the_aged_policy_does(
    jobs: list[tuple[Key, int, int, int]], most: int, dice: random.Random
) -> None:
    """Deadlines that all can meet: an order that does not change as the jobs get on."""
    tasks = [
        job(*one, deadline=1000.0 + i, priority=dice.choice(list(Priority)), arrived=-0.1)
        for i, one in enumerate(jobs)
    ]
    dice.shuffle(tasks)
    asked, capped = both(most)
    told = forecast(tasks, 0.0, COST, asked, aged.rank)
    assert told == pytest.approx(play(tasks, aged, COST, capped))


@pytest.mark.parametrize(
    ("chosen", "order", "near", "mean", "least", "most"),
    [(srpt, srpt.rank, 0.85, 0.9, 0.75, 1.15), (aged, aged.rank, 0.95, 1.0, 0.97, 1.25)],
    ids=["srpt", "aged"],
)
def test_with_kinds_mixed_it_is_near_what_the_policy_does(
    chosen: Policy, order: Order, near: float, mean: float, least: float, most: float
) -> None:
    """The order is taken as it is now, but jobs change places as they get on, and the default lets
    some wait that would waste much: it tells those too little, a tenth in the mean. A few jobs are
    off by much, most are not. That work takes as long in any order is exact."""
    apart: list[float] = []
    means: list[float] = []
    for seed in range(60):
        tasks, cost = published_mix(random.Random(seed), 8)
        told = forecast(tasks, 0.0, cost, lambda demand: KNEES[demand.step[0].key], order)
        ends = play(tasks, chosen, cost, lambda call: KNEES[call.key])
        assert max(told) == pytest.approx(max(ends))
        apart += [abs(a - b) / max(ends) for a, b in zip(told, ends, strict=True)]
        means.append(sum(told) / sum(ends))
    assert median(apart) < 0.01
    assert sum(one < 0.2 for one in apart) > near * len(apart)
    assert median(means) == pytest.approx(mean, abs=0.03)
    assert least < min(means) and max(means) < most


def published_mix(dice: random.Random, number: int) -> tuple[list[Task], CostModel]:
    """Jobs of issue 6's mix, up to 20 s old, some of them begun."""
    cost, tasks = CostModel.of(QWEN), []
    for _ in range(number):
        key, steps = dice.choices(
            [(SMALL, 4), (SMALL, 28), (LARGE, 28), (LARGE, 50)], [15, 35, 35, 15]
        )[0]
        one = task(cost, Load(key, 1), count=steps, arrived=-dice.uniform(0, 20))
        if dice.random() < 0.3:
            one.opened, one.done = True, dice.randrange(steps)
        tasks.append(one)
    return tasks, cost


def test_those_that_join_are_told_with_what_they_need_before_and_after() -> None:
    running = job(A, 10, 1, done=4, after=[Load(DECODER, 1)])
    joins = job(A, 10, 1, before=[Load(ENCODER, 1)], after=[Load(DECODER, 1)], arrived=1.0)
    asked, capped = both(4)
    told = forecast([running, joins], 1.0, COST, asked)
    assert told == pytest.approx([0.05 + 6 * 0.12 + 0.3, 0.05 + 6 * 0.12 + 0.3 + 4 * 0.1 + 0.3])
    ends = play([running, joins], srpt, COST, capped, start=1.0)
    assert [1 + seconds for seconds in told] == pytest.approx(
        ends, abs=0.31
    )  # the decoder of one may wait for a step of the other


# No work is lost or made

WHOLE = st.lists(
    st.tuples(
        PROGRESS,
        st.booleans(),
        st.sampled_from(Priority),
        st.none() | st.floats(-10, 100),
        st.floats(-100, 0),
    ),
    min_size=1,
    max_size=12,
)


def whole(
    jobs: list[tuple[tuple[Key, int, int, int], bool, Priority, float | None, float]],
) -> list[Task]:
    return [
        job(
            *one,
            before=[Load(ENCODER, 1)] if more else (),
            after=[Load(DECODER, 1)] if more else (),
            priority=priority,
            deadline=deadline,
            arrived=arrived,
        )
        for one, more, priority, deadline, arrived in jobs
    ]


@given(WHOLE)
def test_jobs_that_share_nothing_take_what_each_takes(
    jobs: list[tuple[tuple[Key, int, int, int], bool, Priority, float | None, float]],
) -> None:
    tasks = whole(jobs)
    told = forecast(tasks, 0.0, COST, lambda demand: 0)
    order = sorted(range(len(tasks)), key=lambda i: told[i])
    time = 0.0
    for i in order:
        time += tasks[i].remaining
        assert told[i] == pytest.approx(time)


@given(WHOLE, st.integers(1, 8))
def test_sharing_takes_no_longer_than_not_and_nobody_less_than_alone(
    jobs: list[tuple[tuple[Key, int, int, int], bool, Priority, float | None, float]], most: int
) -> None:
    tasks = whole(jobs)
    before = [(one.done, one.opened, one.begun, one.demand, one.solo) for one in tasks]
    told = forecast(tasks, 0.0, COST, lambda demand: most)
    assert len(told) == len(tasks)
    assert all(
        seconds >= one.remaining * (1 - 1e-9) for seconds, one in zip(told, tasks, strict=True)
    )
    assert max(told) <= sum(one.remaining for one in tasks) * (
        1 + 1e-9
    )  # rows beside others cost no more than by themselves
    assert before == [(one.done, one.opened, one.begun, one.demand, one.solo) for one in tasks]


def test_nobody_ends_at_once_or_never() -> None:
    unknown = Task()  # nothing is known of it
    no_steps = task(COST, Load(A, 1), count=0)
    done = job(A, 5, 1, done=4)
    done.done = 9  # of 5
    told = forecast([unknown, no_steps, done, job(B, 3, 1)], 0.0, COST, lambda demand: 4)
    assert all(0 < seconds < 2 for seconds in told)
    assert told[3] == pytest.approx(0.6)
    assert forecast([], 0.0, COST, lambda demand: 4) == []


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 4)), max_size=8),
    st.integers(-1, 4),
)
def test_it_ends_whatever_the_steps_the_rows_and_the_cap(
    jobs: list[tuple[int, int, int]], most: int
) -> None:
    tasks = [task(COST, Load(A, rows), count=steps) for steps, rows, _ in jobs]
    for one, (_, _, done) in zip(tasks, jobs, strict=True):
        one.done = done
    assert all(seconds > 0 for seconds in forecast(tasks, 0.0, COST, lambda demand: most))


def test_modules_of_a_step_are_shared_one_after_another() -> None:
    """Twice the rows of the first module, and two calls, in each of the steps of two jobs."""
    tasks = [task(COST, Load(A, 2), Load(B, 1, 2), count=3) for _ in range(2)]
    assert forecast(tasks, 0.0, COST, lambda demand: 4) == pytest.approx(
        [3 * (0.2 + 2 * COST.seconds(B, 2))] * 2
    )


def test_jobs_with_adapters_share_steps_with_others_at_the_dearer_price() -> None:
    adapted = A._replace(adapters=1)
    cost = CostModel.of({A: {1: 1.0, 2: 1.5}, adapted: {1: 1.2, 2: 1.8}})
    tasks = [Task(Demand(10, step=(Load(key, 1),))) for key in (A, adapted)]
    for one in tasks:
        one.price(PriceList(cost))
    assert [one.solo for one in tasks] == pytest.approx([10.0, 12.0])
    assert tasks[0].demand.kind == tasks[1].demand.kind
    assert forecast(tasks, 0.0, cost, lambda demand: 2) == pytest.approx([18.0, 18.0])


def test_jobs_of_other_kinds_share_nothing() -> None:
    tasks = [job(A, 2, 1), job(B, 2, 1)]
    assert forecast(tasks, 0.0, COST, lambda demand: 8) == pytest.approx([0.2, 0.6])
