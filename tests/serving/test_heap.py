"""The heap."""

from __future__ import annotations

import gc
from unittest.mock import Mock, patch

import pytest

from stepweave.serving import heap
from stepweave.serving.heap import Heap
from tests.support.asgi import started


def test_it_is_trimmed_when_it_has_grown_and_not_again_while_that_is_in_use() -> None:
    made, trims = Heap(), []
    # bytes: the trims leave 360, 120 and 380
    resident = iter([100, 90, 400, 360, 390, 700, 120, 390, 380])
    made._process = Mock(memory_info=lambda: Mock(rss=next(resident)))
    made._trim = lambda size: trims.append(size.value)
    made._least = 100
    with patch.object(heap, "SLACK_BYTES", 200):
        for expected in (0, 0, 1, 1, 2, 3):
            made.look()
            assert len(trims) == expected


def test_memory_that_was_freed_is_given_back() -> None:
    made = Heap()
    with patch.object(heap, "SLACK_BYTES", 0):
        made._least = 0
        made.look()  # the real one raises nothing


@pytest.mark.anyio
async def test_a_warm_model_is_not_searched_for_garbage_until_the_server_closes() -> None:
    async with started(warmup=True) as app:
        assert gc.get_freeze_count() > 10_000
        assert app.server.status.ready
    assert gc.get_freeze_count() == 0
