"""How many rows a forward may have."""

from __future__ import annotations

import pytest

from stepweave.planning.cost import CostModel
from stepweave.planning.row_caps import RowCaps, with_rest
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
