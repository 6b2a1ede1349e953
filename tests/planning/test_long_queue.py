"""Thousands of jobs that wait: the event loop is never held up by forecasts of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from stepweave import StepEngine
from stepweave.planning import forecaster
from tests.support.asgi import serving
from tests.support.fake_pipeline import FakePipeline
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.anyio

MANY = 5000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Forecasts:
    """The forecasts that are made: of how many jobs, on which threads, and how many at a time.
    Those of many wait for `go`."""

    def __init__(self, forecast: Callable[..., Any]) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()  # one of many
        self.made: list[tuple[int, int]] = []
        self.most = 0
        self._running = 0
        self._forecast = forecast

    def __call__(self, tasks: Any, *args: Any) -> Any:
        self.made.append((len(tasks), threading.get_ident()))
        if len(tasks) <= 2 * forecaster.FEW:
            return self._forecast(tasks, *args)
        self._running += 1
        self.most = max(self.most, self._running)
        self.begun.set()
        assert self.go.wait(SECONDS)
        self._running -= 1
        return self._forecast(tasks, *args)

    def inline(self) -> int:
        """Jobs of the largest one that was made on this thread."""
        return max(
            (jobs for jobs, thread in self.made if thread == threading.get_ident()), default=0
        )


@pytest.fixture
def forecasts(monkeypatch: pytest.MonkeyPatch) -> Forecasts:
    found = Forecasts(forecaster.forecast)  # type: ignore[attr-defined]
    monkeypatch.setattr(forecaster, "forecast", found)
    return found


def call(steps: int = 4) -> dict[str, Any]:
    return {
        "prompt": "x",
        "height": 64,
        "width": 64,
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(1)],
    }


@contextmanager
def engine_of(waiting: int) -> Iterator[tuple[StepEngine, list[Any]]]:
    """An engine that knows what a job takes, and holds so many."""
    pipeline = FakePipeline()
    pipeline.record.pause = 0.001
    with StepEngine(pipeline, "off") as engine:
        for steps in (4, 4):
            engine.submit(**call(steps)).result(SECONDS)
        pipeline.record.gated = True
        jobs = [engine.submit(**call(4 + i % 5)) for i in range(waiting)]
        try:
            yield engine, jobs
        finally:
            for job in jobs:
                job.cancel()
            pipeline.record.release.set()


async def test_the_loop_goes_on_while_many_jobs_are_forecast(forecasts: Forecasts) -> None:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0)

    with engine_of(MANY) as (engine, jobs):
        beating = asyncio.create_task(beat())
        try:
            engine.queue_position(jobs[0].id)
            await asyncio.to_thread(forecasts.begun.wait, SECONDS)
            for _ in range(50):  # all that a server asks on its loop, while the forecast hangs
                before = beats
                engine.estimate(**call())
                assert engine.queue_position(jobs[-1].id) is not None
                engine.drain()
                engine.stats()
                await asyncio.sleep(0)
                assert beats > before
            assert engine.estimate(**call()) is None, "nothing is told before the first forecast"
            forecasts.go.set()
            async with asyncio.timeout(SECONDS):
                while engine.estimate(**call()) is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        finally:
            beating.cancel()
        assert forecasts.inline() <= 2 * forecaster.FEW
        assert forecasts.most == 1, "one forecast at a time, for all who ask"
        ends = engine.queue_positions()
        assert len(ends) == MANY
        assert sorted(one.position for one in ends.values()) in (
            list(range(MANY)),
            list(range(1, MANY + 1)),
        )
        waiting = [(one.position, one.eta) for one in ends.values() if one.position]
        assert waiting == sorted(waiting), (
            "one at a time, nobody is done before those whose turn is first"
        )
        first, *_, last = (id for id, one in ends.items() if one.position)
        job = next(one for one in jobs if one.id == first)
        job.cancel()
        assert job.exception(SECONDS) is not None
        moved = engine.queue_position(last)
        assert moved is not None and moved.position == ends[last].position - 1, (
            "at once, without another forecast"
        )
        estimate = engine.estimate(**call())
        assert estimate is not None
        # the shortest go first, and it is the last of these
        alike = [engine.queue_position(job.id) for job in jobs[5::5]]
        assert estimate.finish == pytest.approx(
            max(one.eta or 0.0 for one in alike if one is not None), rel=0.5
        )


async def test_a_job_that_comes_during_a_forecast_is_not_lost(forecasts: Forecasts) -> None:
    with engine_of(3 * forecaster.FEW) as (engine, jobs):
        engine.queue_position(jobs[0].id)
        await asyncio.to_thread(forecasts.begun.wait, SECONDS)
        later = [engine.submit(**call(50)) for _ in range(2 * forecaster.FEW)]
        jobs += later
        places = [engine.queue_position(job.id) for job in later]
        assert None not in places
        forecasts.go.set()
        wait_until(lambda: engine.estimate(**call()) is not None)
        found = [engine.queue_position(job.id) for job in later]
        assert [one.position for one in found if one is not None] == sorted(
            one.position for one in found if one
        )
        assert len({one.position for one in found if one is not None}) == len(later)


async def test_a_forecast_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    forecast, failed = forecaster.forecast, threading.Event()  # type: ignore[attr-defined]

    def fail(*args: Any) -> Any:
        if failed.is_set():
            return forecast(*args)
        failed.set()
        raise ZeroDivisionError

    with engine_of(3 * forecaster.FEW) as (engine, _):
        monkeypatch.setattr(forecaster, "forecast", fail)
        wait_until(lambda: engine.estimate(**call()) is not None)
        assert failed.is_set()
        assert len(engine.queue_positions()) == 3 * forecaster.FEW


async def test_jobs_that_nobody_asks_about_leave_nothing_behind() -> None:
    with StepEngine(FakePipeline(), "off") as engine:
        for _ in range(20):
            for job in [engine.submit(**call(1)) for _ in range(50)]:
                job.result(SECONDS)
        assert len(engine._planner.forecaster._plan) <= 2 * (forecaster.FEW + 50) + 1
        wait_until(lambda: engine.queue_positions() == {})


async def test_no_more_are_let_in_than_may_be_however_many_wait() -> None:
    async with serving(max_queue=2 * forecaster.FEW) as app:
        await app.post().done()
        app.record.gated = True
        posts = [app.post(seed=i) for i in range(2 * forecaster.FEW + 60)]
        await app.until(lambda: sum(post.task.done() for post in posts) == 59)
        assert app.metric("stepweave_requests_in_flight") == 2 * forecaster.FEW + 1
        refused = [post for post in posts if post.task.done()]
        assert {post.status for post in refused} == {429}
        assert {post.error["code"] for post in refused} == {"queue_full"}
        assert all(int(post.headers["Retry-After"]) >= 1 for post in refused)
        app.record.release.set()
        for post in posts:
            await post.done()
        assert [post.status for post in posts if post not in refused] == [200] * (
            2 * forecaster.FEW + 1
        )
