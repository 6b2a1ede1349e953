"""The load: a Locust user per arrival, started when it is due.

Importing Locust patches the standard library for gevent, so this module is imported before anything
that uses sockets or TLS, and never in a process that has imported torch or diffusers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import gevent
from locust import FastHttpUser, task
from locust.contrib.fasthttp import FastHttpSession, ResponseContextManager
from locust.env import Environment
from locust.event import EventHook
from locust.exception import StopUser
from locust.runners import LocalRunner
from locust.stats import stats_history

from benchmarks.locust.page import stage_name
from benchmarks.locust.report import Outcome, Status
from benchmarks.locust.schedule import Arrival, Kind, Stage

PATH = "/v1/images/generations"
PNG = "iVBORw0KGgo"  # the first bytes of every PNG file, in base64
PROBE_SECONDS = 10
ALONE_SECONDS = 600  # timeout of a request to the idle server; the first may compile


class NotReady(Exception):
    """The server is not reachable or not ready for work."""


class Visitor(FastHttpUser):
    """One arrival: sends its request over a new connection and stops."""

    concurrency = 1

    def __init__(
        self, environment: Environment, arrival: Arrival, due: float, name: str, outcome: Outcome
    ) -> None:
        super().__init__(environment)
        self.arrival = arrival
        self.due = due
        self.name = name
        self.outcome = outcome

    @task
    def visit(self) -> None:
        outcome = self.outcome
        outcome.lag = time.perf_counter() - self.due
        with self.client.post(
            PATH, json=self.arrival.body, name=self.name, catch_response=True
        ) as response:
            outcome.latency = time.perf_counter() - self.due
            outcome.status, outcome.reason = judge(response)
            # Locust's own statistics count from the scheduled arrival too, and keep refusals apart
            response.request_meta["response_time"] = outcome.latency * 1000
            if outcome.status == "failed":
                response.failure(outcome.reason)
            else:
                response.success()
            if outcome.status == "refused":
                response.request_meta["name"] += ", refused (429)"
        raise StopUser

    def on_stop(self) -> None:
        self.client.client.close()


def judge(response: ResponseContextManager) -> tuple[Status, str]:
    """The status of an answer, and the reason of a failure in words that are the same for all
    requests."""
    if response.status_code == 429:
        return "refused", ""
    error = response.request_meta["exception"]
    if not response.status_code:
        return "failed", type(error).__name__
    reason = f"HTTP {response.status_code}"
    if response.status_code == 200 and error:
        return "failed", f"{reason} with a broken body"
    try:
        body = response.json()
        if response.status_code == 200:
            if body["data"][0]["b64_json"].startswith(PNG):
                return "succeeded", ""
            return "failed", f"{reason} without a PNG image"
        reason += f" {body['error']['code']}"
        if body["error"]["param"]:
            reason += f" ({body['error']['param']})"
    except (ValueError, LookupError, TypeError, AttributeError):
        reason += " with an unexpected body"
    return "failed", reason


def require_ready(host: str) -> dict[str, Any]:
    """The server's answer to `GET /v1/models`. Raises NotReady unless it is ready for work."""
    session = _session(host, PROBE_SECONDS)
    for path in ("/readyz", "/v1/models"):
        response = session.get(path)
        if not response.status_code:
            raise NotReady(f"{host} is not reachable: {getattr(response, 'error', 'no answer')}")
        if response.status_code != 200:
            raise NotReady(
                f"{host} is not ready: {path} answered {response.status_code}: "
                f"{(response.text or '')[:300]}"
            )
    try:
        answer: dict[str, Any] = response.json()
        _ = [str(model["id"]) for model in answer["data"]]
    except (ValueError, LookupError, TypeError):
        raise NotReady(
            f"{host} is not an image server: /v1/models answered {(response.text or '')[:300]}"
        ) from None
    return answer


def time_alone(host: str, rounds: Sequence[Sequence[Arrival]]) -> dict[Kind, list[float]]:
    """Seconds of each kind, of requests sent one at a time over new connections. The first round is
    discarded: it warms the server up. Raises NotReady if a request gets no image."""
    taken: dict[Kind, list[float]] = {}
    for number, requests in enumerate(rounds):
        for arrival in requests:
            session = _session(host, ALONE_SECONDS)
            start = time.perf_counter()
            with session.post(PATH, json=arrival.body, catch_response=True) as response:
                seconds = time.perf_counter() - start
                status, reason = judge(response)
            session.client.close()
            if status != "succeeded":
                raise NotReady(
                    f"cannot measure the time alone of {arrival.kind}: "
                    f"{reason or 'refused with 429, is the server idle?'}"
                )
            if number:
                taken.setdefault(arrival.kind, []).append(seconds)
    return taken


def _session(host: str, timeout: float) -> FastHttpSession:
    return FastHttpSession(
        host,
        request_event=EventHook(),
        user=None,
        connection_timeout=timeout,
        network_timeout=timeout,
    )


def run(
    host: str,
    stages: Sequence[Stage],
    *,
    max_in_flight: int,
    drain: float,
    finished: Callable[[Stage, list[Outcome], float], None],
) -> Environment:
    """Run the stages one after the other, and call `finished` with each one's outcomes and the
    seconds that its drain took. Returns the environment with Locust's statistics.

    A stage begins when the one before has drained, so that they do not influence each other.
    Requests without an answer `drain` seconds after their stage's end are aborted, as unfinished.
    """
    # sockets must not time out before the drain ends a request
    Visitor.network_timeout = Visitor.connection_timeout = 2 * (
        max(stage.seconds for stage in stages) + drain
    )
    environment = Environment(
        user_classes=[Visitor], host=host, locustfile="benchmarks/locust", catch_exceptions=False
    )
    runner = environment.create_local_runner()
    runner.start(0, spawn_rate=1)  # no users of its own: the arrivals are the users
    gevent.wait([runner.spawning_greenlet])
    charts = gevent.spawn(stats_history, runner)
    try:
        for number, stage in enumerate(stages, 1):
            start = time.perf_counter()
            outcomes = _offer(runner, stage, start, stage_name(number, stage.rate), max_in_flight)
            runner.user_greenlets.join(timeout=drain)
            runner.user_greenlets.kill()
            finished(stage, outcomes, max(0.0, time.perf_counter() - start - stage.seconds))
    finally:
        charts.kill()
        runner.quit()
    return environment


def _offer(
    runner: LocalRunner, stage: Stage, start: float, name: str, max_in_flight: int
) -> list[Outcome]:
    """Start each arrival when it is due, in its own greenlet; returns at the stage's end, while
    some may still run."""
    outcomes: list[Outcome] = []
    for arrival in stage.arrivals:
        due = start + arrival.offset
        gevent.sleep(max(0.0, due - time.perf_counter()))
        outcome = Outcome()
        outcomes.append(outcome)
        if runner.user_count >= max_in_flight:
            outcome.status = "dropped"
        else:
            Visitor(runner.environment, arrival, due, name, outcome).start(runner.user_greenlets)
    gevent.sleep(max(0.0, start + stage.seconds - time.perf_counter()))
    return outcomes
