"""The benchmark of the real server, less the server: arrivals, clients against a transport that
answers as told, figures."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from benchmarks.locust.schedule import Kind
from benchmarks.measure import Part, Report, Row, Spread
from benchmarks.serving import parts
from benchmarks.serving.__main__ import parse, scale_of
from benchmarks.serving.client import Attempt, BenchmarkError, Outcome, connect, offer, saturate
from benchmarks.serving.contestants import CONTESTANTS, DEFAULT, POLICY, Served
from benchmarks.serving.figures import (
    IN_FLIGHT,
    eta_counts,
    eta_figures,
    interval,
    over_seeds,
    over_time,
    ratios,
    returned,
    summarise,
)
from benchmarks.serving.first import Contestant, Known, Scale, measure_first, warm_up
from benchmarks.serving.mix import DEADLINE, KINDS, Request, endless, poisson
from benchmarks.serving.report import Recorder
from benchmarks.simulation.arrivals import read_trace
from tests.support.command_line import refusal
from tests.support.environment import ROOT
from tests.support.waiting import SECONDS

T = TypeVar("T")
SOLO = {kind: 0.01 * kind.steps for kind in KINDS}
SHORT, LONG = KINDS[0], KINDS[-1]
IMAGE = {"data": [{"b64_json": "/9j/4AAQ"}]}
MODELS = {
    "data": [
        {
            "stepweave": {
                "certificates": [{"call": "transformer", "sample": "16", "state": "certified"}]
            }
        }
    ]
}


def alive() -> None:
    pass


class Fake:
    """Answers by the request's body; keeps the bodies it was sent."""

    def __init__(
        self, answer: Callable[[dict[str, Any], int], httpx.Response], seconds: float = 0.0
    ) -> None:
        self.answer = answer
        self.seconds = seconds
        self.bodies: list[bytes] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=exposition(len(self.bodies)))
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=MODELS)
        self.bodies.append(request.content)
        again = self.bodies.count(request.content)
        await asyncio.sleep(self.seconds)
        return self.answer(json.loads(request.content), again)


def exposition(count: int) -> str:
    """A histogram in which a quarter of the errors is between -1 and 1 second, the others between 1
    and 2."""
    name = "stepweave_eta_error_seconds"
    counts = {"-1.0": 0, "1.0": count / 4, "2.0": count, "+Inf": count}
    buckets = "".join(f'{name}_bucket{{le="{bound}"}} {n}\n' for bound, n in counts.items())
    return f"# TYPE {name} histogram\n{buckets}{name}_count {count}\n"


def image_answer(body: dict[str, Any], again: int) -> httpx.Response:
    return httpx.Response(200, json=IMAGE)


def error(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "param": None}}, headers=headers)


def drive(fake: Fake, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with connect("http://fake", 5, httpx.MockTransport(fake)) as client:
            return await work(client)

    return asyncio.run(run())


def burst(count: int, kind: Kind = SHORT, deadline: float | None = None) -> list[Request]:
    bodies = [
        json.dumps({"seed": i, "num_inference_steps": kind.steps, "size": kind.size}).encode()
        for i in range(count)
    ]
    return [Request(0.01 * i, kind, deadline, body) for i, body in enumerate(bodies)]


def outcome(
    status: str, *, kind: Kind = SHORT, offset: float = 0.0, seconds: float = 1.0, **fields: Any
) -> Outcome:
    request = Request(offset, kind, fields.pop("deadline", None), b"")
    return Outcome(request, [Attempt(status, offset, seconds, **fields)])  # type: ignore[arg-type]


# Arrivals


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    first = poisson(5, 30, 1, SOLO, 0.3)
    assert first == poisson(5, 30, 1, SOLO, 0.3)
    assert [one.body for one in first] != [one.body for one in poisson(5, 30, 2, SOLO, 0.3)]
    assert len({one.body for one in first}) == len(first)


def test_bodies_say_what_the_request_is_and_kinds_are_dealt_evenly() -> None:
    requests = poisson(100, 24, 3, SOLO, 0.3)
    counts = Counter(request.kind for request in requests)
    assert set(counts) == set(KINDS) and max(counts.values()) - min(counts.values()) <= 4
    for request in requests:
        body = json.loads(request.body)
        assert Kind(body["size"], body["num_inference_steps"]) == request.kind
        assert body["output_format"] == "jpeg"
        if request.deadline is None:
            assert "deadline_ms" not in body
        else:
            assert request.deadline == body["deadline_ms"] / 1000
            assert request.deadline == pytest.approx(DEADLINE * SOLO[request.kind], abs=0.001)
    assert sum(request.deadline is not None for request in requests) / len(
        requests
    ) == pytest.approx(0.3, abs=0.04)
    assert all(request.deadline is None for request in islice(endless(1), 100))


# Clients


def test_arrivals_do_not_wait_for_answers() -> None:
    fake = Fake(image_answer, seconds=3)
    outcomes = drive(fake, lambda client: offer(client, burst(10), alive, drain=SECONDS))
    assert [one.status for one in outcomes] == ["answered"] * 10
    assert max(one.attempts[0].began for one in outcomes) < 3
    assert all(one.latency is not None and one.latency >= 2.99 for one in outcomes)
    assert [one.lag >= 0 for one in outcomes] == [True] * 10


def test_every_contestant_is_sent_the_very_same_bodies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = {"srpt": Fake(image_answer), "fifo": Fake(image_answer, seconds=0.02)}
    scale = Scale(loads=(0.5, 1.0), seeds=(1, 2), seconds=0.5, deadlines=0.3, drain=60)
    report = Recorder(tmp_path / "out.json")

    async def run() -> None:
        contestants = [
            Contestant(
                name,
                httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(fake)),
                alive,
            )
            for name, fake in fakes.items()
        ]
        await parts.policies(contestants, scale, Known(SOLO, 20), report)

    asyncio.run(run())
    assert fakes["srpt"].bodies == fakes["fifo"].bodies != []
    content = json.loads((tmp_path / "out.json").read_text())["parts"]["policies"]
    runs = {(one["load"], one["contestant"]): one["runs"] for one in content["runs"]}
    assert set(runs) == {(load, name) for load in (0.5, 1.0) for name in fakes} and all(
        len(r) == 2 for r in runs.values()
    )
    assert [one["sent"] for one in runs[1.0, "srpt"]] == [one["sent"] for one in runs[1.0, "fifo"]]
    [forecasts] = content["sections"][-1]["tables"]
    assert [row["within 1 s"] for row in forecasts] == [0.25] * 4
    assert sum(row["jobs"] for row in forecasts) == 2 * len(fakes["srpt"].bodies)
    lines = [
        json.loads(line) for line in (tmp_path / "out.requests.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 2 * len(fakes["srpt"].bodies)
    assert "| fifo / srpt |" in capsys.readouterr().out


def test_each_answer_is_counted_as_what_it_is() -> None:
    answers = {
        0: httpx.Response(200, json=IMAGE),
        1: httpx.Response(200, json={"data": []}),
        2: error(429, "queue_full", **{"Retry-After": "7"}),
        3: error(504, "deadline_exceeded"),
        4: error(500, "internal_error"),
        5: httpx.Response(502, text="bad gateway"),
    }

    def answer(body: dict[str, Any], again: int) -> httpx.Response:
        if body["seed"] == 6:
            raise httpx.ReadError("gone")
        return answers[body["seed"]]

    outcomes = drive(Fake(answer), lambda client: offer(client, burst(7), alive, drain=60))
    found = [(one.status, one.attempts[-1].code, one.attempts[-1].retry_after) for one in outcomes]
    assert found == [
        ("answered", "", None),
        ("failed", "HTTP 200 without an image", None),
        ("refused", "queue_full", 7),
        ("missed", "deadline_exceeded", None),
        ("failed", "HTTP 500 internal_error", None),
        ("failed", "HTTP 502 with an unexpected body", None),
        ("failed", "ReadError", None),
    ]


def test_a_refused_client_waits_as_told_and_sends_the_same_body_again() -> None:
    def answer(body: dict[str, Any], again: int) -> httpx.Response:
        """The first is let in at its second try, the second one at its third, the third never."""
        return (
            image_answer(body, again)
            if again > body["seed"] + 1
            else error(429, "queue_full", **{"Retry-After": "0.1"})
        )

    fake = Fake(answer)
    outcomes = drive(fake, lambda client: offer(client, burst(3), alive, drain=60, returns=2))
    assert [[attempt.status for attempt in one.attempts] for one in outcomes] == [
        ["refused", "answered"],
        ["refused", "refused", "answered"],
        ["refused", "refused", "refused"],
    ]
    for one in outcomes:
        gaps = [
            b.began - a.began - a.seconds
            for a, b in zip(one.attempts, one.attempts[1:], strict=False)
        ]
        assert min(gaps) >= 0.1
    assert outcomes[1].latency == outcomes[1].finish - outcomes[1].request.offset >= 0.2
    row = returned(outcomes, "queue_full", 2)
    assert (row["clients"], row["succeeded by return 1"], row["succeeded by return 2"]) == (
        3,
        1 / 3,
        2 / 3,
    )


def test_what_has_no_answer_in_time_is_cut_off() -> None:
    outcomes = drive(
        Fake(image_answer, seconds=30), lambda client: offer(client, burst(3), alive, drain=0.2)
    )
    assert [one.status for one in outcomes] == ["unfinished"] * 3
    assert summarise(outcomes, SOLO, 1)["unfinished"] == 1


def test_a_server_that_dies_ends_the_run_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("first\nSegmentation fault\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
    served = Served("fifo", "http://fake", process, log)
    began = time.monotonic()
    with pytest.raises(
        BenchmarkError, match=r"'fifo' has ended with status 3.*\n.*first\nSegmentation fault"
    ):
        drive(
            Fake(image_answer, 3 * SECONDS),
            lambda client: offer(client, burst(3), served.check, drain=2 * SECONDS),
        )
    with pytest.raises(BenchmarkError, match="status 3"):
        drive(
            Fake(image_answer, 3 * SECONDS),
            lambda client: saturate(
                client, endless(1), served.check, solo=SOLO, clients=2, ramp=0, seconds=2 * SECONDS
            ),
        )
    assert time.monotonic() - began < SECONDS


def test_a_worker_that_dies_is_noticed_though_the_server_starts_another(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("Killed\n")
    command = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as server,
        subprocess.Popen(command, stdin=subprocess.PIPE) as worker,
    ):
        served = Served("fifo", "http://fake", server, log, [psutil.Process(worker.pid)])
        served.check()
        worker.kill()
        worker.wait()
        with pytest.raises(BenchmarkError, match="'fifo' has lost a worker.*\n.*Killed"):
            served.check()
        server.kill()


def test_the_closed_loop_counts_the_answers_after_its_ramp() -> None:
    fake = Fake(image_answer, seconds=0.05)
    rate = drive(
        fake,
        lambda client: saturate(
            client, endless(1), alive, solo=SOLO, clients=4, ramp=0.2, seconds=0.5
        ),
    )
    work = max(SOLO.values()) / (sum(SOLO.values()) / len(SOLO))  # of the dearest kind
    assert 0 < rate <= work * 4 * (0.5 / 0.05 + 1) / 0.5
    shorts = burst(8, SHORT) * 4
    among = {SHORT: 1.0, LONG: 3.0}
    rate = drive(
        fake,
        lambda client: saturate(
            client, iter(shorts), alive, solo=among, clients=4, ramp=0, seconds=2
        ),
    )
    assert rate == 32 * 0.5 / 2
    with pytest.raises(BenchmarkError, match="refused: queue_full"):
        drive(
            Fake(lambda body, again: error(429, "queue_full")),
            lambda client: saturate(
                client, endless(1), alive, solo=SOLO, clients=4, ramp=0, seconds=2
            ),
        )


def test_what_comes_first_warms_both_sizes_up_and_finds_solo_times_and_capacity(
    tmp_path: Path,
) -> None:
    fake = Fake(image_answer, seconds=0.01)
    scale = Scale((0.8,), (1,), 1, 0, ramp=0.05, capacity_seconds=0.2, solo_repeats=2)

    async def run(client: httpx.AsyncClient) -> Known:
        contestant = Contestant("srpt", client, alive)
        await warm_up(contestant)
        assert {json.loads(body)["size"] for body in fake.bodies} == {kind.size for kind in KINDS}
        return await measure_first(contestant, scale, Report(tmp_path / "out.json"))

    known = drive(fake, run)
    assert set(known.solo) == set(KINDS) and all(seconds >= 0.01 for seconds in known.solo.values())
    assert known.capacity > 1


def test_overload_and_trace_are_reported(tmp_path: Path) -> None:
    """A server with three places and ten images a second each; the trace is one that the
    simulator reads."""
    busy = 0

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal busy
        if request.url.path == "/metrics":
            return httpx.Response(200, text=f"# TYPE {IN_FLIGHT} gauge\n{IN_FLIGHT} {busy}\n")
        if busy == 3:
            return error(429, "queue_full", **{"Retry-After": "0.1"})
        busy += 1
        try:
            await asyncio.sleep(0.1)
            return httpx.Response(200, json=IMAGE)
        finally:
            busy -= 1

    scale = Scale((0.8,), (1,), 1, 0.3, overload_seconds=1.2, trace_seconds=0.5, drain=60)
    report = Recorder(tmp_path / "out.json")

    async def run() -> None:
        async with connect("http://fake", 5, httpx.MockTransport(serve)) as client:
            contestant = Contestant("srpt", client, alive)
            known = Known({kind: 1.0 for kind in KINDS}, 30)
            await parts.overload(contestant, scale, known, report)
            await parts.trace(contestant, scale, known, report, tmp_path / "trace.json")

    asyncio.run(run())
    content = json.loads((tmp_path / "out.json").read_text())["parts"]
    about, leaving, coming, codes = [
        section["tables"][0] for section in content["overload"]["sections"]
    ]
    assert [row["refusals"] > 0 for row in about] == [True, True]
    assert len(leaving) == len(coming) == 6
    assert about[1]["answered"] > about[0]["answered"]
    assert codes[0]["refused with"] == "queue_full"
    assert 0 < codes[0]["succeeded by return 1"] <= codes[0]["succeeded by return 2"] <= 1
    written = json.loads((tmp_path / "trace.json").read_text())
    requests = poisson(
        parts.TRACE_LOAD * 30, 0.5, parts.TRACE_SEED, {kind: 1.0 for kind in KINDS}, 0.3
    )
    assert [one["steps"] for one in written] == [request.kind.steps for request in requests]
    assert {*written[0]} >= {"offset", "size", "steps", "deadline", "priority", "latency"}
    assert len(read_trace(tmp_path / "trace.json")) == len(requests) > 3


# Figures


def test_what_is_refused_or_missed_counts_against_a_contestant() -> None:
    outcomes = [
        outcome("answered", seconds=3 * SOLO[SHORT], deadline=1.0),
        outcome("answered", seconds=2.0, deadline=1.0),
        outcome("answered", kind=LONG, seconds=3.1 * SOLO[LONG]),
        outcome("refused", seconds=0.001, deadline=1.0),
        outcome("missed", seconds=1.0, deadline=1.0),
        outcome("failed", seconds=0.1),
        outcome("refused", seconds=0.001),
        Outcome(Request(9.0, SHORT, 1.0, b"")),
    ]
    found = summarise(outcomes, SOLO, 10)
    assert found["sent"] == 8
    assert found["mean"] == pytest.approx((0.12 + 2.0 + 0.93) / 3) and found[
        "p50"
    ] == pytest.approx(0.93)
    assert found["within 3x solo"] == 1 / 8
    assert found["deadline hits"] == 1 / 5
    shares = {
        name: found[name] for name in ("answered", "refused", "missed", "failed", "unfinished")
    }
    assert shares == {
        "answered": 3 / 8,
        "refused": 2 / 8,
        "missed": 1 / 8,
        "failed": 1 / 8,
        "unfinished": 1 / 8,
    }
    assert found["throughput"] == 3 / 10
    assert summarise([outcome("answered", offset=9, seconds=11)], SOLO, 10)["throughput"] == 1 / 20


def test_latency_counts_from_the_scheduled_arrival() -> None:
    late = Outcome(Request(1.0, SHORT, 0.5, b""), [Attempt("answered", 1.4, 0.2)])
    assert (
        late.latency == pytest.approx(0.6) and late.lag == pytest.approx(0.4) and not late.on_time
    )


def test_figures_of_a_run_without_answers_are_left_out_of_medians() -> None:
    runs: Sequence[dict[str, float | None]] = [{"mean": None}, {"mean": 2.0}, {"mean": 4.0}]
    assert over_seeds(runs, "mean") == Spread.of([2.0, 4.0])
    assert over_seeds([{"mean": None}], "mean") is None
    empty = summarise([], SOLO, 10)
    assert (empty["sent"], empty["mean"], empty["refused"], empty["throughput"]) == (
        0,
        None,
        None,
        0,
    )


def test_ratios_are_paired_by_seed() -> None:
    """The medians' ratio would be 2; seed by seed it is 1, 3 and 1."""
    above, below = [
        [{"mean": mean} for mean in means] for means in ((2.0, 3.0, 10.0), (2.0, 1.0, 10.0))
    ]
    assert ratios(above, below, "mean") == Spread.of([1.0, 3.0, 1.0])
    assert ratios([{"mean": None}], [{"mean": 1.0}], "mean") is None
    with pytest.raises(ValueError):
        ratios(above, below[:2], "mean")


def test_the_interval_of_ratios_is_of_their_logarithms() -> None:
    """t(0.975, 2) is 4.303; the logarithms of 1, 2 and 4 have the standard error ln 2 / sqrt 3."""
    above = [{"mean": 1.0}, {"mean": 2.0}, {"mean": 4.0}, {"mean": None}]
    below = [{"mean": 1.0}] * 4
    found = interval(above, below, "mean")
    assert found is not None and found.count == 3
    reach = 4.30265 * math.log(2) / math.sqrt(3)
    assert found.mean == pytest.approx(2.0)
    assert found.low == pytest.approx(2 * math.exp(-reach), rel=1e-4)
    assert found.high == pytest.approx(2 * math.exp(reach), rel=1e-4)
    assert interval(above[:1], below[:1], "mean") is None


def test_goodput_over_time_leaves_out_what_was_late() -> None:
    outcomes = [
        outcome("answered", offset=0, seconds=5),
        outcome("answered", offset=1, seconds=5, deadline=2.0),
        outcome("refused", offset=12, seconds=0.01),
        outcome("answered", offset=13, seconds=4),
    ]
    first, second = over_time(outcomes, 20, 10, capacity=0.1)
    assert first == {
        "seconds": "0 to 10",
        "sent / capacity": 2.0,
        "goodput / capacity": 1.0,
        "refused / capacity": 0.0,
        "longest wait s": 5,
    }
    assert (second["goodput / capacity"], second["refused / capacity"]) == (1.0, 1.0)


def test_the_error_of_forecasts_is_read_from_the_histogram() -> None:
    counts = Counter(eta_counts(exposition(40)))
    counts.subtract(eta_counts(exposition(20)))
    assert eta_figures(counts) == {
        "jobs": 20,
        "p5 s": pytest.approx(-0.6),
        "p50 s": pytest.approx(4 / 3),
        "p95 s": pytest.approx(1 + 14 / 15),
        "within 1 s": 0.25,
    }
    assert eta_counts("# TYPE other gauge\nother 1\n") == {}
    assert eta_figures({}) == {} == eta_figures(eta_counts(exposition(0)))
    assert eta_figures({-1.0: 4.0, 1.0: 4.0, math.inf: 8.0}) == {
        "jobs": 8, "p5 s": -1, "p50 s": -1, "p95 s": 1, "within 1 s": 0
    }  # fmt: skip


# The command line, and what it needs


def test_a_spread_says_extremes_of_few_values_and_quartiles_of_more() -> None:
    shown = [
        str(Spread.of(values))
        for values in ([2.0, 3.0, 10.0], [1.0, 2.0, 3.0, 4.0, 10.0], [3.0, 3.0])
    ]
    assert shown == ["3 (2 to 10)", "3 (2 to 4)", "3"]
    assert Spread.known([None, 3.0]) == Spread.of([3.0]) and Spread.known([None]) is None


def test_a_table_leaves_a_cell_empty_where_nothing_is_known_and_an_empty_one_out() -> None:
    rows: Sequence[Row] = [
        {"name": "a", "x": 1.23456, "y": None},
        {"name": "b", "x": None, "y": Spread.of([1.0, 1.0, 2.0])},
    ]
    assert Part("About.", ([], rows)).markdown().splitlines() == [
        "About.",
        "",
        "| name | x | y |",
        "| --- | --- | --- |",
        "| a | 1.23 |  |",
        "| b |  | 1 (1 to 2) |",
    ]


@pytest.mark.parametrize(
    "argument",
    [
        "--parts=all",
        "--contestants=fifo",
        "--contestants=srpt,lifo",
        "--loads=0",
        "--deadlines=2",
        "--seconds=x",
    ],
)
def test_a_bad_argument_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    assert argument.partition("=")[0] in refusal(parse, argument, capsys)


def test_a_quick_run_is_small_and_the_default_one_has_every_policy_and_mode() -> None:
    quick, whole = scale_of(parse(["--quick"])), scale_of(parse([]))
    assert (
        len(quick.loads) * len(quick.seeds) == 1 and quick.overload_seconds < whole.overload_seconds
    )
    assert (whole.loads, len(whole.seeds)) == ((0.6, 0.8), 3)
    assert next(iter(CONTESTANTS)) == DEFAULT and set(parse([]).contestants) == set(CONTESTANTS)
    assert all(
        settings.keys() <= {"STEPWEAVE_BATCHING", POLICY} for settings in CONTESTANTS.values()
    )


def test_the_client_imports_no_torch() -> None:
    code = (
        "import sys; import benchmarks.serving.__main__;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'locust')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=SECONDS)
