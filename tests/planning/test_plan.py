"""A plan that is kept: that it has the forecast's ends, and that what comes later is told about
what a new forecast would."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepweave.planning.cost import CostModel
from stepweave.planning.forecast import ORDERS, RUN, by_arrival, forecast, in_order, step_seconds
from stepweave.planning.plan import Plan
from stepweave.scheduling.policy import rank
from stepweave.scheduling.task import Key, Load, Priority, Task
from tests.support.simulated_engine import task

A, B = Key("transformer", 64), Key("transformer", 256)
COST = CostModel.of({A: {1: 0.10, 2: 0.12, 4: 0.2, 8: 0.36}, B: {1: 0.2, 4: 0.7, 8: 1.4}})
ROWS = 8


def jobs(dice: random.Random, count: int) -> list[Task]:
    found = []
    for i in range(count):
        one = task(COST, Load(dice.choice((A, B)), dice.choice((1, 2))), count=dice.randint(2, 40))
        one.arrived = i * 1e-3
        one.priority = dice.choice(list(Priority))
        found.append(one)
    return found


def own(one: Task) -> float:
    """Seconds that it takes in full company."""
    return one.before + one.left * step_seconds(one.demand, ROWS, COST) + one.after


def plan_of(tasks: list[Task], order: object = rank, now: float = 1.0) -> tuple[Plan, list[float]]:
    ends = forecast(tasks, now, COST, lambda demand: ROWS, order)  # type: ignore[arg-type]
    return Plan(now, [str(i) for i in range(len(tasks))], tasks, ends, order), ends  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 7))
def test_ranks_are_put_in_order_however_long_the_runs(numbers: list[int], run: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepweave.planning.forecast.RUN", run)
        found = in_order([(float(number),) for number in numbers])
    assert found == sorted(range(len(numbers)), key=lambda i: numbers[i])
    assert RUN > 7


def test_it_tells_what_was_forecast() -> None:
    dice = random.Random(1)
    tasks = jobs(dice, 60)
    for one in tasks[:5]:
        one.begun = True
    plan, ends = plan_of(tasks)
    assert [plan.eta(str(i), 1.0) for i in range(60)] == ends
    assert plan.backlog(1.0) == max(ends)
    assert plan.backlog(1.0 + 1e6) == 0
    assert plan.predicts()
    assert plan.eta("9", 1.5) == pytest.approx(ends[9] - 0.5)
    assert plan.eta("9", 1e6) == 0
    assert plan.eta("60", 1.0) is None
    assert len(plan) == 60


@pytest.mark.parametrize("order", [*ORDERS.values(), by_arrival])
@pytest.mark.parametrize("seed", range(3))
def test_what_comes_is_fitted_in_about_where_a_new_forecast_has_it(
    order: object, seed: int
) -> None:
    dice = random.Random(seed)
    tasks = jobs(dice, 600)
    plan, _ = plan_of(tasks, order)
    errors = []
    for one in jobs(dice, 30):
        one.arrived = 1.0
        exact = plan_of([*tasks, one], order)[1][-1]
        errors.append(abs(plan.finish(one, own(one), 1.0) - exact) / exact)
    assert median(errors) < 0.05
    assert sorted(errors)[23] < 0.25


def test_those_that_came_count_for_the_next() -> None:
    dice = random.Random(7)
    tasks, later = jobs(dice, 200), jobs(dice, 60)
    plan, _ = plan_of(tasks)
    for i, one in enumerate(later):
        one.arrived = 1.0 + 1e-3 * i
        plan.add(f"later {i}", one, own(one), 1.0)
    whole, ends = plan_of([*tasks, *later])
    assert plan.eta("later 59", 1.0) == pytest.approx(ends[259], rel=0.15)
    told = plan.eta("later 0", 1.0)
    assert told is not None and plan.eta("later 0", 1.25) == pytest.approx(told - 0.25)
    assert plan.backlog(1.0) == pytest.approx(max(ends), rel=0.15)
    one = task(COST, Load(A, 1), count=41)
    one.arrived, one.priority = 9.0, Priority.LOW
    told, exact = plan.finish(one, own(one), 1.0), whole.finish(one, own(one), 1.0)
    assert told == pytest.approx(exact, rel=0.15)
    assert told > plan_of(tasks)[0].finish(one, own(one), 1.0)


def test_jobs_of_which_nothing_is_known() -> None:
    plan, _ = plan_of([])
    assert (plan.backlog(1.0), len(plan), plan.predicts()) == (0.0, 0, True)
    plan.add("x", Task(arrived=1.0), 0.0, 1.0)
    assert (len(plan), plan.eta("x", 2.0)) == (1, None)
    assert not plan.predicts()
    assert plan_of([Task()])[0].eta("0", 1.0) is None


def test_a_plan_that_was_never_made_foretells_nothing() -> None:
    plan = Plan(-math.inf, (), (), (), rank)
    plan.add("x", jobs(random.Random(1), 1)[0], 1.0, 5.0)
    assert plan.eta("x", 6.0) is None


@given(st.integers(0, 40), st.randoms(use_true_random=False), st.floats(0, 100))
def test_nobody_is_told_to_end_before_it_would_alone(
    count: int, dice: random.Random, later: float
) -> None:
    tasks = jobs(dice, count)
    plan, _ = plan_of(tasks)
    one = jobs(dice, 1)[0]
    told = plan.finish(one, own(one), 1.0 + later)
    assert told >= one.solo * (1 - 1e-9)
    plan.add("one", one, own(one), 1.0 + later)
    assert plan.eta("one", 1.0 + later) == pytest.approx(told)
