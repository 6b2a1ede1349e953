"""The comparison with other servers, less these: its requests, runs, clients and tables."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from benchmarks.ladder import __main__ as ladder
from benchmarks.ladder.arguments import parse
from benchmarks.ladder.client import Sender, closed_loop, open_loop
from benchmarks.ladder.contestants import (
    BATCHING,
    NO_CHECKOUT,
    contestants,
    environment_of,
)
from benchmarks.ladder.floor import Forwards, floor
from benchmarks.ladder.images import References, difference
from benchmarks.ladder.runs import LOAD, Run, Store, figures, plan
from benchmarks.ladder.scenarios import (
    MIXED,
    SCENARIOS,
    Kind,
    Scenario,
    closed,
    poisson,
    warm_up,
)
from benchmarks.ladder.tables import parts
from benchmarks.measure import Row, Spread
from benchmarks.serving.client import Attempt, BenchmarkError, Outcome, connect
from benchmarks.serving.mix import Request
from tests.support.command_line import refusal
from tests.support.environment import ROOT
from tests.support.waiting import SECONDS

EQUAL, MIX = SCENARIOS["equal-closed"], SCENARIOS["mixed-closed"]
OPEN = SCENARIOS["mixed-open-others"]
SHORT = Kind("64x64", 6, 2.0)


def png(colour: tuple[int, int, int], side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def record(name: str, seed: int, scenario: Scenario = EQUAL, **changes: Any) -> dict[str, Any]:
    """The figures of a run, as they are kept."""
    return {
        "scenario": scenario.name, "seed": seed, "contestant": name, "sent": 10, "failed": 0,
        "mean": 2.0, "p50": 2.0, "p95": 3.0, "short mean": 1.0, "short p95": 1.5, "throughput": 4.0,
        "overloaded": False, "wrong": 0, "checked": 5, "load_average": 0.5, "cpu": 0.2,
    } | changes  # fmt: skip


def answered(offset: float, seconds: float, kind: Kind = SHORT, lag: float = 0.0) -> Outcome:
    request = Request(offset, kind, None, b"")  # type: ignore[arg-type]
    return Outcome(request, [Attempt("answered", offset + lag, seconds)])


def rows(found: dict[str, Any], name: str) -> dict[str, Row]:
    (table,) = found[name].tables
    return {str(row["contestant"]): row for row in table}


# Requests


def test_the_same_seed_gives_the_same_requests_and_a_rate_changes_only_their_offsets() -> None:
    slow, fast = poisson(OPEN, 1, 2, 30), poisson(OPEN, 1, 4, 30)
    assert slow == poisson(OPEN, 1, 2, 30)
    assert [one.body for one in slow] == [one.body for one in fast][: len(slow)]
    assert slow[5].offset == pytest.approx(2 * fast[5].offset)
    bodies = [
        {one.body for one in closed(scenario, seed, 50)}
        for scenario in SCENARIOS.values()
        for seed in (1, 2)
    ]
    assert len(set().union(*bodies)) == 50 * len(bodies), "no run sends another's requests"


def test_kinds_are_dealt_evenly_and_bodies_say_what_they_are() -> None:
    requests = closed(MIX, 1, 4 * len(MIXED))
    assert set(Counter(one.kind for one in requests).values()) == {4}
    for one in requests:
        body = json.loads(one.body)
        kind = Kind(body["size"], body["num_inference_steps"], body["guidance_scale"])
        assert kind == one.kind
    assert {one.kind for one in closed(EQUAL, 1, 30)} == {Kind("64x64", 20, 2.0)}
    burst = warm_up(0, 4)
    assert {one.offset for one in burst} == {0.0} and {one.kind.steps for one in burst} == {6}
    assert set(Counter(one.kind for one in burst).values()) == {4}


# Clients


def test_every_form_of_an_answer_is_read_and_every_form_of_a_request_is_sent() -> None:
    image = png((1, 2, 3))
    text = base64.b64encode(image).decode()
    sent: dict[str, Any] = {}
    answers: dict[str, Callable[[], httpx.Response]] = {
        "litserve": lambda: httpx.Response(200, json={"data": [{"b64_json": text}]}),
        "bentoml-batches": lambda: httpx.Response(200, json=[text]),
        "diffusers-server": lambda: httpx.Response(200, json={"data": [{"url": "/a.png"}]}),
        "diffusers-server-async": lambda: httpx.Response(200, json={"response": ["/a.png"]}),
        "off": lambda: httpx.Response(200, content=image, headers={"Content-Type": "image/png"}),
    }
    everyone = contestants(Path("python"), ROOT, {})
    (request,) = closed(EQUAL, 1, 1)
    body = json.loads(request.body)

    async def run(name: str) -> tuple[Outcome, dict[bytes, bytes]]:
        def handle(asked: httpx.Request) -> httpx.Response:
            if asked.url.path == "/a.png":
                return httpx.Response(200, content=image)
            sent[name] = json.loads(asked.content)
            return answers[name]()

        send = Sender(everyone[name], frozenset([request.body]))
        async with connect("http://fake", 5, httpx.MockTransport(handle)) as client:
            (outcome,) = await closed_loop(
                client, [request], lambda: None, send, clients=2, limit=SECONDS
            )
        return outcome, send.images

    for name in answers:
        outcome, images = asyncio.run(run(name))
        assert (outcome.status, images) == ("answered", {request.body: image}), name
    assert sent["off"] == sent["litserve"] == body
    assert sent["bentoml-batches"] == {"requests": [body]}
    assert json.loads(sent["diffusers-server-async"]["prompt"]) == body
    assert sent["diffusers-server-async"]["num_inference_steps"] == 20


def test_failed_refused_and_unfinished_requests_are_told_apart() -> None:
    requests = closed(EQUAL, 1, 5)
    number = {one.body: i for i, one in enumerate(requests)}

    async def handle(asked: httpx.Request) -> httpx.Response:
        match number[asked.content]:
            case 0:
                return httpx.Response(500, text="broken")
            case 1:
                return httpx.Response(429)
            case 2:
                return httpx.Response(200, json={"data": []})
            case 3:
                raise httpx.ReadError("gone")
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> list[Outcome]:
        send = Sender(contestants(None, None, {})["off"])
        async with connect("http://fake", 5, httpx.MockTransport(handle)) as client:
            sent = [dataclasses.replace(one, offset=0.0) for one in requests]
            return await open_loop(client, sent, lambda: None, send, drain=1)

    outcomes = asyncio.run(run())
    assert [one.status for one in outcomes] == [
        "failed", "refused", "failed", "failed", "unfinished"
    ]  # fmt: skip
    found = figures(outcomes, 1.0)
    assert (found["sent"], found["failed"], found["overloaded"]) == (5, 5, True)
    assert "HTTP 500: broken" in found["codes"] and found["mean"] is None


def test_a_closed_loop_has_no_more_requests_in_flight_than_clients() -> None:
    running, most = 0, 0

    async def handle(asked: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return httpx.Response(200, json=["AAAA"])

    async def run() -> list[Outcome]:
        send = Sender(contestants(None, None, {})["off"])
        async with connect("http://fake", 5, httpx.MockTransport(handle)) as client:
            return await closed_loop(
                client, closed(EQUAL, 1, 20), lambda: None, send, clients=4, limit=SECONDS
            )

    outcomes = asyncio.run(run())
    assert (len(outcomes), most) == (20, 4)
    assert all(one.latency == pytest.approx(one.attempts[0].seconds, abs=0.05) for one in outcomes)


# Figures


def test_latency_counts_from_the_intended_arrival_and_short_requests_are_reported_apart() -> None:
    long = Kind("64x64", 50, 2.0)
    found = figures([answered(0, 1, lag=0.5), answered(1, 3, long), answered(2, 2)], None)
    assert found["mean"] == pytest.approx((1.5 + 3 + 2) / 3)
    assert found["short mean"] == pytest.approx((1.5 + 2) / 2)
    assert found["throughput"] == pytest.approx(3 / 4)
    assert found["requests"][1] == ["64x64", 50, 2.0, 1, 3]


def test_a_growing_backlog_is_an_overload_and_a_steady_one_is_not() -> None:
    arrivals = [i / 10 for i in range(400)]
    steady = [answered(at, 2.0) for at in arrivals]
    growing = [answered(at, 2.0 + 0.5 * at) for at in arrivals]
    few = [answered(at, 0.02 * at) for at in arrivals]
    large = [answered(at, 5.0) for at in arrivals]
    found = [figures(outcomes, 40.0)["overloaded"] for outcomes in (steady, growing, few, large)]
    assert found == [False, True, False, False]
    assert figures(growing, None)["overloaded"] is False, "a closed loop has no backlog"


# Runs


def test_the_most_important_scenario_is_first_and_all_contestants_meet_in_each_seed() -> None:
    names = list("abcdefgh")
    runs = list(plan([EQUAL, MIX, OPEN], [1, 2, 3], names))
    groups = [runs[i : i + len(names)] for i in range(0, len(runs), len(names))]
    assert [(group[0].scenario.name, group[0].seed) for group in groups] == [
        (scenario.name, seed) for scenario in (EQUAL, MIX, OPEN) for seed in (1, 2, 3)
    ]
    assert all(sorted(run.contestant for run in group) == names for group in groups)
    assert len({tuple(run.contestant for run in group) for group in groups}) > 5, "shuffled"
    assert runs == list(plan([EQUAL, MIX, OPEN], [1, 2, 3], names))
    assert [scenario for scenario in SCENARIOS][:3] == [EQUAL.name, MIX.name, OPEN.name]


def test_a_rate_is_a_share_of_the_best_capacity_and_stays_once_it_is_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ours = SCENARIOS["mixed-open-ours"]
    assert store.rate(OPEN) is None
    for seed, throughput in ((1, 2.0), (2, 4.0), (3, 3.0)):
        store.add(Run(MIX, seed, "litserve"), record("litserve", seed, MIX, throughput=throughput))
        store.add(Run(MIX, seed, "step"), record("step", seed, MIX, throughput=9.0))
    store.add(Run(MIX, 1, "failing"), record("failing", 1, MIX, throughput=8.0, failed=1))
    assert store.rate(OPEN) == pytest.approx(LOAD * 3.0)
    assert store.rate(ours) == pytest.approx(LOAD * 9.0)
    store.add(Run(MIX, 4, "off"), record("off", 4, MIX, throughput=20.0))
    assert Store(tmp_path).rate(OPEN) == pytest.approx(LOAD * 3.0)


def test_runs_with_other_settings_are_refused(tmp_path: Path) -> None:
    Store(tmp_path).keep_settings({"requests": 96, "threads": 2})
    Store(tmp_path).keep_settings({"requests": 96, "threads": 2})
    with pytest.raises(BenchmarkError, match="other settings \\(threads 2\\)"):
        Store(tmp_path).keep_settings({"requests": 96, "threads": 4})


class Answers:
    """A transport that answers for a server, and counts."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.count = 0

    def __call__(self, asked: httpx.Request) -> httpx.Response:
        self.count += 1
        return httpx.Response(200, content=self.image, headers={"Content-Type": "image/png"})


def started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fakes: dict[str, Answers], *arguments: str
) -> list[dict[str, Any]]:
    """Run the benchmark with servers and references that are fakes."""

    def connected(url: str, seconds: float) -> Any:
        fake = fakes[httpx.URL(url).host]
        return connect(url, seconds, httpx.MockTransport(fake))

    def make(self: References, bodies: list[bytes]) -> None:
        for body in bodies:
            self.path(body).parent.mkdir(exist_ok=True)
            self.path(body).write_bytes(png((0, 0, 200)))

    monkeypatch.setattr("benchmarks.ladder.fleet.connect", connected)
    monkeypatch.setattr(References, "make", make)
    urls = [f"--url={name}=http://{name}" for name in fakes]
    common = [f"--out={folder}", "--contestants", ",".join(fakes), "--requests=4", "--checks=2"]
    monkeypatch.setattr(sys, "argv", ["ladder", *common, *urls, *arguments])
    assert ladder.main() == 0
    return Store(folder).records()


def test_a_second_start_runs_only_what_is_missing_and_a_wrong_image_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = {"right": Answers(png((0, 0, 201))), "wrong": Answers(png((0, 9, 200)))}
    scenario = "--scenarios=equal-closed"
    records = started(tmp_path, monkeypatch, fakes, scenario, "--seeds=1")
    assert [(one["contestant"], one["wrong"], one["checked"]) for one in records] == [
        ("right", 0, 2), ("wrong", 2, 2)
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "| wrong (WRONG IMAGES) | 1 |" in out and "| right | 1 |" in out
    counts = {name: fake.count for name, fake in fakes.items()}
    assert min(counts.values()) > 4
    again = started(tmp_path, monkeypatch, fakes, scenario, "--seeds=1")
    assert {name: fake.count for name, fake in fakes.items()} == counts and again == records
    more = started(tmp_path, monkeypatch, fakes, scenario, "--seeds=1,2")
    assert len(more) == 4 and [one for one in more if one["seed"] == 1] == records
    counts = {name: fake.count for name, fake in fakes.items()}
    assert started(tmp_path, monkeypatch, fakes, scenario, "--tables") == more
    assert {name: fake.count for name, fake in fakes.items()} == counts
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["arguments"]["versions"]["own"]["torch"]
    assert len(summary["parts"]["equal-closed"]["runs"]) == 4
    assert all(one["environment"]["cpus"] and "load_average" in one for one in more)


def test_no_run_starts_once_the_time_is_over_and_a_broken_contestant_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = {"right": Answers(png((0, 0, 200))), "broken": Answers(b"")}
    arguments = ("--scenarios=equal-closed", "--seeds=1,2")
    assert started(tmp_path, monkeypatch, fakes, *arguments, "--hours=1e-9") == []
    assert "4 runs missing" in capsys.readouterr().err
    records = started(tmp_path, monkeypatch, fakes, *arguments)
    assert {one["contestant"] for one in records} == {"right"} and len(records) == 2
    assert "| broken | the server at http://broken | not run: broken: warm-up failed" in (
        capsys.readouterr().out
    )


# Tables


def test_ratios_are_paired_by_seed_with_median_and_extremes() -> None:
    records = [
        *(record("step", seed, mean=mean) for seed, mean in ((1, 1.0), (2, 4.0), (3, 3.0))),
        *(record("litserve", seed, mean=mean) for seed, mean in ((1, 2.0), (2, 5.0), (3, 6.0))),
        record("bentoml", 2, mean=8.0, throughput=1.0),
    ]
    found = rows(parts(records, {}, {}, {}), "equal-closed")
    assert list(found) == ["step", "litserve", "bentoml"], "ours, then the fastest first"
    assert found["litserve"]["ratio of mean"] == Spread.of([0.5, 0.8, 0.5])
    assert found["bentoml"]["ratio of mean"] == Spread.of([0.5])
    assert found["bentoml"]["ratio of throughput"] == Spread.of([4.0])
    assert found["step"]["ratio of mean"] is None
    assert "short mean s" not in found["step"]


def test_a_seed_in_which_a_contestant_or_step_is_overloaded_has_no_times_and_no_ratio() -> None:
    records = [
        *(record("step", seed, OPEN) for seed in (1, 2)),
        record("litserve", 1, OPEN, mean=4.0),
        record("litserve", 2, OPEN, mean=100.0, overloaded=True),
        *(record("bentoml", seed, OPEN, overloaded=True) for seed in (1, 2)),
    ]
    found = parts(records, {}, {OPEN.name: 2.5}, {})
    assert "2.5 requests per second" in found[OPEN.name].about
    table = rows(found, OPEN.name)
    assert [table[name]["overloaded"] for name in ("step", "litserve", "bentoml")] == [
        "0 of 2", "1 of 2", "2 of 2",
    ]  # fmt: skip
    assert table["litserve"]["mean s"] == Spread.of([4.0])
    assert table["litserve"]["ratio of mean"] == Spread.of([records[0]["mean"] / 4.0])
    names = [name for name in table["bentoml"] if name.startswith("ratio") or name[-2:] == " s"]
    assert len(names) == 10 and all(table["bentoml"][name] is None for name in names)
    records[0] |= {"overloaded": True}
    table = rows(parts(records, {}, {}, {}), OPEN.name)
    assert table["litserve"]["ratio of mean"] is None
    assert table["litserve"]["mean s"] == Spread.of([4.0])


def test_a_contestant_that_cannot_run_is_listed_with_the_reason() -> None:
    everyone = contestants(None, None, {"other": "http://x"})
    failures = {"bentoml": "has ended", "off": "has ended"}
    records = [record("step", 1), record("off", 1)]
    found = rows(parts(records, everyone, {}, failures), "contestants")
    assert found["off"]["runs"] == "1, then not run: has ended"
    assert found["step"]["runs"] == "1" and found["other"]["runs"] == "not run yet"
    assert found["diffusers-server"]["runs"] == f"not run: {NO_CHECKOUT}"
    assert "no environment with LitServe" in str(found["litserve"]["runs"])
    assert found["bentoml"]["runs"] == "not run: has ended"


# Contestants


def test_all_servers_have_the_same_threads_and_no_settings_of_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWEAVE_MAX_ROWS", "1")
    everyone = contestants(Path("python"), ROOT, {})
    for name, contestant in everyone.items():
        environment = environment_of(contestant, 3, tmp_path)
        assert {environment[key] for key in ("OMP_NUM_THREADS", "LADDER_THREADS")} == {"3"}
        assert environment["OMP_WAIT_POLICY"] == "passive"
        assert "STEPWEAVE_MAX_ROWS" not in environment
        assert environment.get("STEPWEAVE_BATCHING", name) == name
        assert contestant.command[-1] == "--port" and contestant.stepweave == (name in BATCHING)


def test_forwards_are_counted_since_a_run_began(tmp_path: Path) -> None:
    log = tmp_path / "forwards.txt"
    none = Forwards(log)
    log.write_text("transformer 1024 32\n")
    forwards = Forwards(log)
    with log.open("a") as more:
        more.write("vae.decode 1024 4\ntransformer 1024 32\ntransformer 1024 32\n")
    assert forwards.counts() == {("vae.decode", 1024, 4): 1, ("transformer", 1024, 32): 2}
    assert none.counts().total() == 4


def test_the_floor_is_that_of_all_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        assert json.loads(options["input"]) == [["a", 1, 2], ["b", 1, 4]]
        return subprocess.CompletedProcess(command, 0, "[[0.5, 0.25], [2, 1]]", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert floor(Counter({("a", 1, 2): 10, ("b", 1, 4): 1}), 2) == (7.0, 3.5)


def test_only_ours_has_a_floor() -> None:
    records = [record("step", 1, floor=0.9), record("step", 2, floor=0.8), record("litserve", 1)]
    found = rows(parts(records, contestants(None, None, {}), {}, {}), EQUAL.name)
    assert str(found["step"]["floor / time"]) == "0.85 (0.8 to 0.9)"
    assert found["litserve"]["floor / time"] is None


def test_images_differ_by_their_samples_and_not_by_their_files(tmp_path: Path) -> None:
    assert difference(png((0, 0, 0)), png((3, 0, 0))) == 1.0
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 90, 90)).save(jpeg, "JPEG")
    assert difference(jpeg.getvalue(), png((90, 90, 90))) < 1
    assert difference(png((0, 0, 0)), png((0, 0, 0), 16)) == float("inf")
    assert difference(b"no image", png((0, 0, 0))) == float("inf")


@pytest.mark.parametrize(
    "argument", ["--scenarios=all", "--requests=0", "--url=http://x", "--diffusers-checkout=docs"]
)
def test_a_bad_argument_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    assert argument.partition("=")[0] in refusal(parse, argument, capsys)


def test_an_unknown_contestant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ladder", f"--out={tmp_path}", "--contestants=step,nobody"])
    assert ladder.main() == 1
    assert "has nobody; allowed are step, request" in capsys.readouterr().err


def test_the_benchmarks_own_process_imports_no_torch() -> None:
    code = (
        "import sys; import benchmarks.ladder.__main__;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'bentoml')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=SECONDS)


def test_the_help_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SCENARIOS)
