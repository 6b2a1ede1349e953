"""Admission over HTTP: classes, deadlines, waits, and places that are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from stepweave.errors import Refused
from tests.conftest import InProcess
from tests.waiting import SECONDS, wait_until

Make = Callable[..., InProcess]


def in_background(app: InProcess, count: int, **fields: Any) -> tuple[list[threading.Thread], list[httpx.Response]]:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(app.post(**fields))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def learn(app: InProcess, pause: float) -> None:
    """Let the server see how long steps take."""
    app.pipeline.record.pause = pause
    for _ in range(9):
        assert app.post(num_inference_steps=2).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline_ms": -5}, "deadline_ms"),
        ({"deadline_ms": 1.5}, "deadline_ms"),
        ({"deadline_ms": 10**12}, "deadline_ms"),
    ],
)
def test_bad_classes_and_deadlines_are_400(in_process: Make, fields: dict[str, Any], param: str) -> None:
    response = in_process().post(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert str(next(iter(fields.values()))) in error["message"]


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_runs_nothing(in_process: Make) -> None:
    app = in_process()
    learn(app, 0.01)
    ran = app.pipeline.record.steps_run
    refused = app.post(num_inference_steps=100, deadline_ms=100)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert error["code"] == "deadline"
    assert "deadline_ms is 100" in error["message"]
    assert int(refused.headers["Retry-After"]) >= 1
    assert app.pipeline.record.steps_run == ran
    assert app.metric("stepweave_refused_total", reason="deadline") == 1
    assert app.post(num_inference_steps=10, deadline_ms=60_000).status_code == 200
    assert app.metric("stepweave_deadline_missed_total") == 0


def test_a_deadline_that_was_missed_is_504_and_counted(in_process: Make) -> None:
    app = in_process(warmup=False)
    app.pipeline.record.pause = 0.05  # of which nothing is known yet
    late = app.post(num_inference_steps=100, deadline_ms=200)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert "0.2 s" in late.json()["error"]["message"]
    assert app.pipeline.record.steps_run < 20
    app.until_metric(1, "stepweave_deadline_missed_total")
    app.until_metric(1, "stepweave_requests_total", outcome="late")
    assert app.metric("stepweave_requests_total", outcome="failed") == 0


def test_too_long_a_wait_is_refused_with_the_time_to_come_back(in_process: Make) -> None:
    app = in_process(max_wait=0.5)
    learn(app, 0.02)
    app.pipeline.record.gated = True
    threads, answers = in_background(app, 1, num_inference_steps=100)
    app.until_metric(1, "stepweave_requests_in_flight")
    wait_until(lambda: app.pipeline.record.running)
    refused = app.post(num_inference_steps=200)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "wait"
    assert "the limit is 0.5 s" in refused.json()["error"]["message"]
    assert app.metric("stepweave_refused_total", reason="wait") == 1
    assert (app.metric("stepweave_backlog_seconds") or 0.0) > 0.5
    app.pipeline.record.pause = 0.0
    app.pipeline.record.release.set()
    for thread in threads:
        thread.join(SECONDS)
    assert [answer.status_code for answer in answers] == [200]
    app.until_metric(0, "stepweave_backlog_seconds")
    app.until_metric(10, "stepweave_queue_duration_seconds_count")
    app.until_metric(10, "stepweave_eta_error_seconds_count")


def test_a_place_is_kept_for_one_who_waits_as_told(in_process: Make) -> None:
    """The same request finds the place, others that come in between do not."""
    app = in_process(max_queue=1)
    app.pipeline.record.gated = True
    threads, answers = in_background(app, 2)
    app.until_metric(2, "stepweave_requests_in_flight")
    told = app.post(prompt="mine")
    assert told.status_code == 429
    assert told.json()["error"]["code"] == "queue_full"
    admission = app.server._admission
    assert admission is not None
    now = admission._clock()
    admission._clock = lambda: now + int(told.headers["Retry-After"])
    admission._taken -= 1  # one has left
    assert app.post(prompt="another's").status_code == 429
    more, mine = in_background(app, 1, prompt="mine")
    app.until_metric(2, "stepweave_requests_in_flight")
    admission._taken += 1
    app.pipeline.record.release.set()
    for thread in threads + more:
        thread.join(SECONDS)
    assert [answer.status_code for answer in answers + mine] == [200, 200, 200]


def test_a_refusal_takes_no_time_of_the_model_and_hardly_any_of_the_servers(in_process: Make) -> None:
    """With as many in flight as are let in by default."""
    app = in_process()
    assert app.post().status_code == 200
    app.pipeline.record.gated = True
    engine, admission = app.server.engine, app.server._admission
    assert engine is not None
    assert admission is not None
    call = app.server.model.call(app.server.model.resolve(prompt="x"))  # type: ignore[union-attr]
    jobs = [engine.submit(**call) for _ in range(admission.limit)]
    admission._taken = admission.limit
    ran = app.pipeline.record.steps_run
    seconds = []
    for i in range(200):
        began = time.perf_counter()
        with pytest.raises(Refused):
            admission.enter(i, lambda: engine.outlook(**call))
        seconds.append(time.perf_counter() - began)
    assert app.pipeline.record.steps_run <= ran + 1
    print(f"a refusal: {sorted(seconds)[100] * 1e3:.3f} ms")  # noqa: T201
    for job in jobs:
        job.cancel()
    admission._taken = 0
