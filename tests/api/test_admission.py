"""Admission over HTTP: classes, deadlines, waits, and places that are kept."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from stepweave.errors import AdmissionError
from tests.support.in_process import InProcess
from tests.support.resolving import resolve
from tests.support.waiting import SECONDS, wait_until

Make = Callable[..., InProcess]


def in_background(
    app: InProcess, count: int, **fields: Any
) -> tuple[list[threading.Thread], list[httpx.Response]]:
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(app.post(**fields))) for _ in range(count)
    ]
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
def test_bad_classes_and_deadlines_are_400(
    in_process: Make, fields: dict[str, Any], param: str
) -> None:
    response = in_process().post(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert str(next(iter(fields.values()))) in error["message"]


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_runs_nothing(
    in_process: Make,
) -> None:
    app = in_process()
    learn(app, 0.01)
    ran = app.pipeline.record.steps_run
    for _ in range(2):
        refused = app.post(num_inference_steps=100, deadline_ms=100)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("deadline_too_short", "deadline_ms")
        assert error["message"].startswith("deadline_ms is 100; the image takes ")
        assert "Retry-After" not in refused.headers
    assert app.pipeline.record.steps_run == ran
    assert app.metric("stepweave_refused_total", reason="deadline") == 2
    assert app.post(num_inference_steps=10, deadline_ms=60_000).status_code == 200
    assert app.metric("stepweave_deadline_missed_total") == 0


@pytest.mark.parametrize("batching", ["off", "threads", "request"])
def test_a_deadline_that_was_missed_is_504_and_counted(in_process: Make, batching: str) -> None:
    app = in_process(warmup=False, batching=batching)
    app.pipeline.record.pause = 0.05  # of which nothing is known yet
    late = app.post(num_inference_steps=100, deadline_ms=500)
    assert late.status_code == 504
    assert "Retry-After" not in late.headers
    assert late.headers["X-Should-Retry"] == "false", "the time is up"
    error = late.json()["error"]
    assert error["code"] == "deadline_exceeded"
    done = app.pipeline.record.steps_run
    assert error["message"].startswith("deadline_ms is 500, which has passed: ")
    reached = f"the job had done {done} of its 100 steps" if done else "none of its 100 steps"
    assert reached in error["message"]
    assert "no job of this model had been timed" in error["message"]
    assert done < 20
    app.until_metric(1, "stepweave_deadline_missed_total")
    app.until_metric(1, "stepweave_requests_total", outcome="late")
    assert app.metric("stepweave_requests_total", outcome="failed") == 0
    if done:  # from then on something is known, though no job has ever been done
        assert app.post(num_inference_steps=200, deadline_ms=500).status_code == 400
        assert app.pipeline.record.steps_run == done


def test_a_first_request_whose_deadline_could_not_be_checked_says_so(in_process: Make) -> None:
    app = in_process(warmup=False)
    unforeseen = (
        "deadline_ms was not checked at admission: no job of this model had been timed yet."
    )
    assert app.post(deadline_ms=10**7).json()["warnings"] == [unforeseen]
    assert app.post(deadline_ms=10**7).json()["warnings"] == []
    fresh = in_process(warmup=False)
    assert fresh.post().json()["warnings"] == []


def test_a_deadline_that_the_queue_is_in_the_way_of_is_told_when_to_come_back(
    in_process: Make,
) -> None:
    app = in_process()
    learn(app, 0.02)
    app.pipeline.record.gated = True
    threads, _ = in_background(app, 1, num_inference_steps=200)
    wait_until(lambda: app.pipeline.record.running)
    refused = app.post(num_inference_steps=20, deadline_ms=2000)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (429, "deadline")
    told = re.fullmatch(
        r"deadline_ms is 2000; estimated completion is ([0-9.]+) s \(([0-9.]+) s on an idle "
        r"server\)\.",
        error["message"],
    )
    assert told is not None, error["message"]
    assert float(told[1]) > 2 >= float(told[2])
    assert int(refused.headers["Retry-After"]) >= float(told[1]) - 2 - 0.1
    app.pipeline.record.pause = 0.0
    app.pipeline.record.release.set()
    for thread in threads:
        thread.join(SECONDS)


def test_a_full_server_tells_nobody_to_come_back_who_cannot_be_served_either(
    in_process: Make,
) -> None:
    app = in_process(max_queue=0)
    learn(app, 0.02)
    app.pipeline.record.gated = True
    threads, _ = in_background(app, 1)
    wait_until(lambda: app.pipeline.record.running)
    hopeless, full = (
        app.post(num_inference_steps=200, deadline_ms=50),
        app.post(num_inference_steps=5),
    )
    assert (hopeless.status_code, hopeless.json()["error"]["code"]) == (400, "deadline_too_short")
    assert "Retry-After" not in hopeless.headers
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert int(full.headers["Retry-After"]) >= 1
    app.pipeline.record.release.set()
    for thread in threads:
        thread.join(SECONDS)


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


def test_a_refusal_takes_no_time_of_the_model_and_hardly_any_of_the_servers(
    in_process: Make,
) -> None:
    """With as many in flight as are let in by default."""
    app = in_process()
    assert app.post().status_code == 200
    app.pipeline.record.gated = True
    engine, admission = app.server.engine, app.server._admission
    assert engine is not None
    assert admission is not None
    call = app.server.model.call(resolve(app.server.model, prompt="x"))  # type: ignore[union-attr]
    jobs = [engine.submit(**call) for _ in range(admission.limit)]
    admission._taken = admission.limit
    ran = app.pipeline.record.steps_run
    seconds = []
    for i in range(200):
        began = time.perf_counter()
        with pytest.raises(AdmissionError):
            admission.enter(i, lambda: engine.estimate(**call))
        seconds.append(time.perf_counter() - began)
    assert app.pipeline.record.steps_run <= ran + 1
    print(f"a refusal: {sorted(seconds)[100] * 1e3:.3f} ms")  # noqa: T201
    for job in jobs:
        job.cancel()
    admission._taken = 0
