"""Draws from the default random generators are attributed to the thread that makes them."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from stepweave.certification.random_states import RandomStates
from tests.support.toy import honest, others, serve
from tests.support.waiting import SECONDS

DRAWS: list[Callable[[], object]] = [
    random.random,
    lambda: random.random(),
    lambda: random.getrandbits(64),
    lambda: random.choice("ab"),
    lambda: np.random.rand(),
    lambda: np.random.shuffle([1, 2, 3]),
    lambda: torch.rand(1),
]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Another thread draws from the default generators all the time, as if it served requests."""
    ended, began = threading.Event(), threading.Event()

    def draw() -> None:
        while not ended.is_set():
            random.getrandbits(64)
            np.random.rand()
            began.set()

    thread = threading.Thread(target=draw)
    thread.start()
    began.wait(SECONDS)
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("draw", DRAWS)
def test_own_draws_are_found(draw: Callable[[], object]) -> None:
    with RandomStates() as states:
        assert not states.changed()
        draw()
        assert states.changed()


@pytest.mark.parametrize("draw", DRAWS[1:])
def test_own_draws_are_found_among_those_of_others(draw: Callable[[], object]) -> None:
    with drawing(), RandomStates() as states:
        draw()
        assert states.changed()


def test_draws_of_others_are_not_ones_own() -> None:
    with RandomStates() as states:
        with drawing():
            pass
        assert not states.changed()


def test_functions_are_as_before_afterwards() -> None:
    before = dict(vars(random)), dict(vars(np.random))
    with RandomStates(), RandomStates():
        assert random.random is not before[0]["random"]
    assert (dict(vars(random)), dict(vars(np.random))) == before


def slow(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)  # in which other threads run
    return honest(x)


def noisy(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return slow(self, x) + 0 * random.random()


def test_draws_of_other_threads_do_not_cost_a_module_its_certificate() -> None:
    """Tracing draws numbers for each request: in a busy server, during every forward."""
    with drawing():
        served = serve(slow, others())
    served.check()
    assert served.state == "certified"


def test_a_module_that_draws_runs_alone_also_while_others_draw() -> None:
    with drawing():
        served = serve(noisy, others())
    assert served.state == "failed" and served.certificate["reason"] == "it draws random numbers"
