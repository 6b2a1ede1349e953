"""How many rows a forward may have."""

from __future__ import annotations

import pytest

from stepweave.planning.cost import CostModel
from stepweave.planning.row_caps import EXPLORE_EVERY, RowCaps, with_rest
from stepweave.scheduling.task import Key, Load
from tests.support.simulated_engine import Call, queued, task


@pytest.mark.parametrize(
    ("knee", "most", "waiting", "rows"),
    [
        (8, 32, 3, 8),
        (8, 32, 8, 8),
        (8, 32, 12, 12),  # four would be left
        (8, 32, 13, 8),  # five, more than half
        (8, 10, 12, 8),  # so many do not fit
        (1, 32, 2, 1),
    ],
)
def test_few_rows_are_not_left_behind(knee: int, most: int, waiting: int, rows: int) -> None:
    assert with_rest(knee, most, waiting) == rows


def test_a_forward_may_have_what_waits_beyond_the_knee_if_that_is_little() -> None:
    key = Key("transformer", 64)
    cost = CostModel.of({key: {1: 1.0, 4: 1.0, 8: 2.0, 16: 4.0}})  # no gain beyond four rows
    caps = RowCaps(cost, 16, merges=True, knee=True)
    for jobs, rows in ((3, 4), (4, 4), (5, 5), (6, 6), (7, 4)):
        queues = queued([task(cost, Load(key, 1)) for _ in range(jobs)])
        cap = caps.choosing(lambda call: 16, queues)
        assert cap(Call(key, 1, key, queues[key][0].task)) == rows


def test_jobs_before_their_first_step_count_as_waiting() -> None:
    key, encoder = Key("transformer", 64), Key("encoder", 16)
    cost = CostModel.of({key: {1: 1.0, 4: 1.0, 8: 2.0, 16: 4.0}, encoder: {1: 0.1}})
    caps = RowCaps(cost, 16, merges=True, knee=True)
    running = [task(cost, Load(key, 1), count=9) for _ in range(4)]
    for one in running:
        one.opened = True
    queues = queued(running)
    for joining, rows in ((0, 4), (2, 6), (3, 4)):
        queues[encoder] = [
            Call(encoder, 1, encoder, task(cost, Load(key, 1), before=[Load(encoder, 1)]))
            for _ in range(joining)
        ]
        assert caps.choosing(lambda call: 16, queues)(queues[key][0]) == rows


def test_rows_that_were_slow_once_are_learnt_again() -> None:
    """While another process has the machine, large forwards are slow. Afterwards only those below
    the knee run, so that nothing but tests of the knee shows that larger ones pay."""
    key, now = Key("transformer", 64), {4: 1.0, 8: 1.1, 16: 1.2}
    cost = CostModel.of({key: {4: 1.0}})
    for rows in (8, 16):
        for _ in range(9):
            cost.observe(key, rows, 5 * now[rows])
    caps = RowCaps(cost, 16, merges=True, knee=True)
    queues = queued([task(cost, Load(key, 1)) for _ in range(16)])
    call, forwards = queues[key][0], []
    while not forwards or forwards[-1] < 16:
        rows = caps.choosing(lambda call: 16, queues)(call)
        caps.chosen(key, rows, cut=rows < 16)
        caps.ran(key, rows, now[rows])
        cost.observe(key, rows, now[rows])
        forwards.append(rows)
        assert len(forwards) < 3 * EXPLORE_EVERY, forwards
    assert forwards[0] == 4  # the model was wrong
