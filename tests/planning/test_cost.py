"""The cost model: what it may predict, whatever it saw, and that it is right on a published
curve."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepweave.planning.cost import KEYS, CostModel, PriceList
from stepweave.scheduling.task import Key, Load
from tests.support import waiting
from tests.support.simulated_engine import LARGE, QWEN, SMALL

KEY = Key("transformer", 64)
ROWS = st.integers(1, 64)
SECONDS = st.floats(1e-6, 1e4)
SEEN = st.lists(
    st.tuples(st.sampled_from((64, 16, 256, 0)), ROWS, SECONDS), min_size=1, max_size=40
)


def learnt(points: dict[int, float], times: int = 9, key: Key = KEY) -> CostModel:
    model = CostModel()
    for _ in range(times):
        for rows, seconds in points.items():
            model.observe(key, rows, seconds)
    return model


def test_scheduling_planning_and_admission_import_no_torch() -> None:
    modules = ("scheduling", "planning.estimates", "serving.admission")
    imports = ", ".join(f"stepweave.{module}" for module in modules)
    code = f"import sys, {imports}; assert not {{'torch', 'numpy', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=waiting.SECONDS)


@given(SEEN)
@example([(64, 4, 1.0), (64, 2, 2.0), (16, 2, 5.0)])
@example([(64, 2, 1.0), (64, 4, 1.0), (64, 8, 9.0), (64, 8, 0.5)])
def test_more_rows_never_cost_less(seen: list[tuple[int, int, float]]) -> None:
    model = CostModel()
    for size, rows, seconds in seen:
        model.observe(Key("transformer", size), rows, seconds)
    for size in (0, 16, 64, 100, 256):
        times = [model.seconds(Key("transformer", size), rows) for rows in range(1, 130)]
        assert all(0 < time < math.inf for time in times)
        assert all(fewer <= more * (1 + 1e-9) for fewer, more in pairwise(times)), (size, times)


@given(SEEN, st.integers(1, 100), st.sampled_from((16, 64, 256, 1000)))
def test_the_knee_is_a_number_of_rows_that_may_run(
    seen: list[tuple[int, int, float]], most: int, size: int
) -> None:
    model = CostModel()
    for observed, rows, seconds in seen:
        model.observe(Key("transformer", observed), rows, seconds)
    assert 1 <= model.knee(Key("transformer", size), most) <= most


@given(st.dictionaries(ROWS, st.floats(1e-3, 10.0), min_size=1), st.floats(0.5, 2.0))
def test_what_was_seen_is_predicted(points: dict[int, float], factor: float) -> None:
    rising = dict(zip(sorted(points), sorted(points.values()), strict=True))
    model = CostModel.of({KEY: rising})
    for rows, seconds in rising.items():
        assert model.seconds(KEY, rows) == pytest.approx(seconds)
    for _ in range(9):
        for rows, seconds in rising.items():
            model.observe(KEY, rows, factor * seconds)
    for rows, seconds in rising.items():
        # the old ones are forgotten
        assert model.seconds(KEY, rows) == pytest.approx(factor * seconds)


def test_between_row_counts_it_interpolates() -> None:
    model = CostModel.of({KEY: {2: 1.0, 6: 3.0}})
    assert [model.seconds(KEY, rows) for rows in (2, 3, 4, 5, 6)] == pytest.approx(
        [1.0, 1.5, 2.0, 2.5, 3.0]
    )


def test_beyond_the_ends_it_goes_on_as_there_and_never_below_a_share_of_the_first() -> None:
    model = CostModel.of({KEY: {2: 3.0, 4: 4.0, 8: 6.0}})
    assert model.seconds(KEY, 12) == pytest.approx(8.0)
    assert model.seconds(KEY, 1) == pytest.approx(2.5)
    steep = CostModel.of({KEY: {4: 1.0, 5: 3.0}})
    assert steep.seconds(KEY, 1) == pytest.approx(0.25)


def test_violations_are_shared_among_those_that_violate() -> None:
    model = CostModel.of({KEY: {1: 1.0, 2: 3.0, 4: 2.0, 8: 5.0}})
    assert [model.seconds(KEY, rows) for rows in (1, 2, 4, 8)] == pytest.approx(
        [1.0, 2.5, 2.5, 5.0]
    )


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_a_compilation_does_not_move_a_prediction(place: int) -> None:
    times = [0.2, 0.21, 0.2, 0.19, 0.2]
    times[place] = 20.0
    model = CostModel()
    for seconds in times:
        model.observe(KEY, 4, seconds)
    assert model.seconds(KEY, 4) == pytest.approx(0.2, rel=0.06)


def test_a_few_of_many_slow_forwards_do_not_either() -> None:
    model = CostModel()
    for i in range(60):
        model.observe(KEY, 4, 20.0 if i % 3 == 0 else 0.2)
    assert model.seconds(KEY, 4) == pytest.approx(0.2)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_compilation_for_a_new_number_of_rows_does_not_move_what_is_known_of_others(
    rows: int,
) -> None:
    points = {2: 0.2, 4: 0.3, 8: 0.5}
    model = learnt(points)
    model.observe(KEY, rows, 100 * model.seconds(KEY, rows))
    assert [model.seconds(KEY, known) for known in points] == pytest.approx(
        list(points.values()), rel=0.1
    )


def test_a_compilation_for_a_new_number_of_rows_does_not_move_the_knee() -> None:
    model = learnt({rows: 0.1 + 0.05 * rows for rows in (1, 2, 4, 8)})
    assert model.knee(KEY, 8) == 8
    model.observe(KEY, 3, 30.0)
    assert model.knee(KEY, 8) == 8


def test_it_follows_a_change() -> None:
    model = learnt({4: 0.2})
    for _ in range(9):
        model.observe(KEY, 4, 0.5)
    assert model.seconds(KEY, 4) == pytest.approx(0.5)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_not_learnt(seconds: float) -> None:
    model = CostModel()
    model.observe(KEY, 1, seconds)
    assert not model.known(KEY)
    assert model.curves() == {}


def test_a_module_that_never_ran_costs_nothing_and_is_not_held_back() -> None:
    model = learnt({4: 0.2})
    other = Key("vae", 64)
    assert (model.seconds(other, 3), model.knee(other, 7), model.known(other)) == (0.0, 7, False)
    assert model.known(Key("transformer", 1))


def test_forwards_with_adapters_have_a_price_of_their_own() -> None:
    adapted, twice = KEY._replace(adapters=1), KEY._replace(adapters=2)
    model = learnt({1: 1.0, 2: 1.5, 4: 2.5, 8: 4.5})
    assert model.seconds(adapted, 4) == model.seconds(KEY, 4), "until one has run"
    for _ in range(3):
        model.observe(adapted, 2, 1.8)
    assert model.seconds(KEY, 2) == pytest.approx(1.5)
    for rows, seconds in ((1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)):
        assert model.seconds(adapted, rows) == pytest.approx(1.2 * seconds)
        assert model.seconds(twice, rows) == model.seconds(adapted, rows), "the nearest number"
    assert model.seconds(adapted._replace(size=128), 4) == pytest.approx(1.2 * 4.5)
    assert model.alone([Load(KEY, 1), Load(adapted, 1, 2)]) == pytest.approx(3.4)


def test_a_forward_with_adapters_does_not_change_what_others_are_thought_to_take() -> None:
    small, large = Key("transformer", 1024), Key("transformer", 4096)
    model = CostModel.of(
        {
            small: {rows: 0.1 + 0.01 * rows for rows in (1, 2, 4, 8)},
            large: {rows: 0.1 + 0.04 * rows for rows in (1, 2, 4, 8, 32)},
        }
    )
    before = [model.seconds(small, rows) for rows in (8, 16, 24, 32)]
    model.observe(small._replace(adapters=1), 1, 0.12)
    assert [model.seconds(small, rows) for rows in (8, 16, 24, 32)] == before


def test_rows_that_pay_are_not_tried_again_with_adapters() -> None:
    curve = {1: 1.0, 2: 1.02, 4: 1.05, 8: 2.1, 16: 4.2}
    model, adapted = learnt(curve), KEY._replace(adapters=1)
    knee = model.knee(KEY, 64)
    assert knee == 4
    assert model.knee(adapted, 64) == knee, "before one has run"
    model.observe(adapted, 1, 1.1)
    assert model.knee(adapted, 64) == knee


def test_the_knee_on_the_published_curve() -> None:
    model = CostModel.of(QWEN)
    assert (model.knee(SMALL, 16), model.knee(LARGE, 3)) == (8, 1)
    assert model.knee(LARGE, 16) == 1  # 4 to 6 rows are told from the small size's curve
    assert (model.knee(SMALL, 8), model.knee(SMALL, 4), model.knee(SMALL, 1)) == (
        6,
        3,
        1,
    )  # of fewer rows, the best is less


@pytest.mark.parametrize("key", QWEN)
def test_the_knee_is_the_fewest_rows_beyond_which_none_bring_five_percent_more(key: Key) -> None:
    rates = {rows: rows / seconds for rows, seconds in QWEN[key].items()}
    best = max(rates.values())
    assert CostModel.of(QWEN).knee(key, max(rates)) == min(
        rows for rows in rates if best < 1.05 * rates[rows]
    )


def test_rows_that_pay_are_explored_by_doubling() -> None:
    model, bounds = CostModel(), []
    for rows in (1, 2, 4, 8, 16):
        for _ in range(3):
            model.observe(KEY, rows, 1 + 0.01 * rows)
        bounds.append(model.knee(KEY, 20))
    assert bounds == [2, 4, 8, 16, 20]


def test_exploration_ends_where_rows_do_not_pay() -> None:
    model, rows = CostModel(), 1
    for _ in range(12):
        for _ in range(3):
            model.observe(KEY, rows, max(1.0, rows / 4))  # from 4 rows on each costs the same
        rows = model.knee(KEY, 64)
    assert rows == 4
    assert max(model.curves()[KEY]) <= 16


def test_a_slow_first_forward_does_not_end_exploration() -> None:
    model = CostModel()
    for rows in (1, 2, 4):
        for _ in range(3):
            model.observe(KEY, rows, 1 + 0.01 * rows)
    model.observe(KEY, 8, 100.0)
    assert model.knee(KEY, 64) >= 8


def test_larger_sizes_are_foretold_from_a_smaller_ones_curve_by_their_tokens() -> None:
    model = CostModel.of({SMALL: QWEN[SMALL]})
    for rows, seconds in QWEN[LARGE].items():  # 1.01, 1.12 and 1.13 times too low
        assert seconds / 1.2 < model.seconds(LARGE, rows) < seconds * 1.2


def test_smaller_sizes_are_foretold_from_a_larger_ones_curve_where_that_tells_anything() -> None:
    """What a forward costs however few its tokens cannot be seen in a size that fills the device
    with one row."""
    model = CostModel.of({LARGE: QWEN[LARGE]})
    for rows, seconds in QWEN[SMALL].items():
        assert seconds / 2.5 < model.seconds(SMALL, rows) < seconds * 1.3
        if rows >= 4:
            assert seconds / 1.2 < model.seconds(SMALL, rows) < seconds * 1.2


def test_one_row_of_a_size_calibrates_what_the_other_size_tells() -> None:
    model = CostModel.of({SMALL: QWEN[SMALL]})
    for _ in range(3):
        model.observe(LARGE, 1, 2 * QWEN[LARGE][1])  # twice as dear as told
    for rows, seconds in QWEN[LARGE].items():
        assert 2 * seconds / 1.2 < model.seconds(LARGE, rows) < 2 * seconds * 1.2


def test_of_several_sizes_the_nearest_tells() -> None:
    far, near, asked = Key("transformer", 16), Key("transformer", 200), Key("transformer", 100)
    model = CostModel.of({far: {1: 100.0}, near: {1: 2.0}})
    assert model.seconds(asked, 2) == pytest.approx(2.0)


def test_modules_tell_nothing_of_each_other() -> None:
    model = CostModel.of({KEY: {1: 5.0}})
    assert model.seconds(Key("vae", 64), 1) == 0.0


def test_the_number_of_keys_is_bounded_and_the_least_recently_used_goes() -> None:
    model = CostModel()
    first = Key("transformer", 1)
    model.observe(first, 2, 0.7)
    for size in range(2, KEYS + 50):
        model.observe(first, 1, 0.5)
        model.observe(Key("transformer", size), 1, 1.0)
    assert len(model.curves()) == KEYS
    assert model.curves()[first] == {1: 0.5, 2: 0.7}
    assert Key("transformer", 2) not in model.curves()
    assert model.seconds(Key("transformer", 2), 1) > 0  # told from others


def test_a_module_whose_keys_all_went_is_as_one_that_never_ran() -> None:
    model = CostModel()
    model.observe(Key("vae", 64), 1, 1.0)
    for size in range(1, KEYS + 1):
        model.observe(Key("transformer", size), 1, 1.0)
    gone = Key("vae", 64)
    assert (model.seconds(gone, 1), model.known(gone), model.knee(gone, 100)) == (0.0, False, 100)


def test_the_error_is_the_median_of_the_last_predictions() -> None:
    model = CostModel.of({KEY: {1: 1.0}})
    assert model.error == 0.0
    for _ in range(3):
        model.observe(KEY, 1, 1.1)
    assert model.error == pytest.approx(0.1)
    for _ in range(100):
        model.observe(KEY, 1, 1.1)
    assert model.error == pytest.approx(0.0)


def test_calls_alone_add_up() -> None:
    model = CostModel.of({KEY: {1: 1.0, 2: 1.5}, Key("vae", 64): {1: 0.25}})
    assert model.alone((Load(KEY, 2, 3), Load(Key("vae", 64), 1))) == pytest.approx(4.75)
    assert model.alone(()) == 0.0


def test_a_price_list_keeps_its_prices() -> None:
    model = CostModel.of({KEY: {1: 1.0}})
    prices, loads = PriceList(model), (Load(KEY, 1, 2),)
    assert prices.alone(loads) == 2.0
    for _ in range(9):
        model.observe(KEY, 1, 7.0)
    assert prices.alone(loads) == 2.0
    assert PriceList(model).alone(loads) == 14.0


def test_a_price_list_has_what_has_become_known_since() -> None:
    """Else a job that comes next would be taken for the shortest of all, and nothing be told of its
    end."""
    cost = CostModel()
    prices, loads = PriceList(cost), (Load(Key("transformer", 64), 1, 3),)
    assert prices.alone(loads) == 0
    cost.observe(loads[0].key, 1, 0.5)
    assert prices.alone(loads) == pytest.approx(1.5)
    for _ in range(9):
        cost.observe(loads[0].key, 1, 5.0)
    assert prices.alone(loads) == pytest.approx(1.5), "equal jobs have equal prices"
