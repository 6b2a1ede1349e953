"""The capacity test: its schedule, its arguments, and runs in a process of its own (Locust must not
meet torch)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.locust.arguments import parse
from benchmarks.locust.report import Outcome, summarise
from benchmarks.locust.schedule import Stage, digest, schedule
from tests.support.environment import ROOT, clean_environment
from tests.support.served import Served
from tests.support.waiting import SECONDS

IMAGE = {"data": [{"b64_json": "iVBORw0KGgoAAAANSUhEUg"}]}
SIZES, STEPS = ["64x64", "128x128"], [4, 12, 20, 30]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.locust`, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.locust", *arguments],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


def test_the_same_seed_gives_the_same_requests_at_the_same_offsets() -> None:
    stages = schedule([2, 5], 10, 7, SIZES, STEPS)
    assert stages == schedule([2, 5], 10, 7, SIZES, STEPS)
    assert schedule([2, 5, 9], 10, 7, SIZES, STEPS)[:2] == stages
    assert (
        digest(stages)
        == digest(schedule([2, 5], 10, 7, SIZES, STEPS))
        != digest(schedule([2, 5], 10, 8, SIZES, STEPS))
    )


def test_arrivals_are_a_poisson_process_of_the_stated_rate() -> None:
    (stage,) = schedule([20], 500, 3, SIZES, STEPS)
    offsets = [arrival.offset for arrival in stage.arrivals]
    assert offsets == sorted(offsets) and 0 < offsets[0] and offsets[-1] < 500
    assert len(offsets) == pytest.approx(10_000, abs=400)  # four standard deviations
    # of a Poisson process, counts of a second vary as much as their mean, and gaps as much as
    # theirs
    counts = Counter(int(offset) for offset in offsets)
    assert sum((counts[second] - 20) ** 2 for second in range(500)) / 500 == pytest.approx(
        20, rel=0.25
    )
    gaps = [after - before for before, after in zip(offsets, offsets[1:], strict=False)]
    assert sum((gap - 0.05) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.05**2, rel=0.15)


def test_the_mix_is_even_and_every_prompt_of_the_grammar() -> None:
    (stage,) = schedule([20], 500, 3, SIZES, STEPS)
    bodies = [arrival.body for arrival in stage.arrivals]
    kinds = Counter((body["size"], body["num_inference_steps"]) for body in bodies)
    assert len(kinds) == 8
    assert all(n == pytest.approx(len(bodies) / 8, rel=0.15) for n in kinds.values())
    assert len({body["seed"] for body in bodies}) > 0.99 * len(bodies)
    for body in bodies:
        match = re.fullmatch(
            r"a (small|large) (\w+) \w+ on (?:a|an) (\w+) background", str(body["prompt"])
        )
        assert match and match[2] != match[3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--rates", value) for value in ("0", "-1", "nan", "inf", "", "1,,2", "fast")),
        *(
            (name, value)
            for name in ("--seconds", "--target", "--drain")
            for value in ("0", "nan", "x")
        ),
        *(
            ("--host", value)
            for value in ("localhost:3000", "http://", "http://localhost:x", "ftp://localhost")
        ),
        ("--seed", "-1"),
        ("--sizes", "64"),
        ("--steps", "0"),
        ("--max-in-flight", "0"),
        ("--rate", "1"),
    ],
)
def test_a_bad_argument_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([f"{name}={value}"])
    assert caught.value.code == 2
    assert name in capsys.readouterr().err.splitlines()[-1]


def test_a_test_without_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--rates=1,1e9", "--seconds=60"])
    assert "the limit is 100000" in capsys.readouterr().err


def test_the_figures_of_a_stage_follow_from_its_outcomes() -> None:
    outcomes = [
        Outcome("succeeded", lag=0.001, latency=float(latency)) for latency in range(1, 101)
    ]
    outcomes += [Outcome("refused", lag=0.001, latency=0.01)] * 20
    outcomes += [Outcome("failed", lag=0.003, latency=0.02, reason="HTTP 500 internal_error")] * 10
    outcomes += [Outcome("unfinished", lag=0.001)] * 30 + [Outcome("dropped")] * 40
    figures = summarise(Stage(4, 50, ()), outcomes, elapsed=80, target=10)
    assert figures["counts"] == {
        "succeeded": 100,
        "refused": 20,
        "failed": 10,
        "unfinished": 30,
        "dropped": 40,
    }
    assert figures["share"] == {
        "succeeded": 0.5,
        "refused": 0.1,
        "failed": 0.05,
        "unfinished": 0.15,
        "dropped": 0.2,
    }
    assert (figures["offered_rate"], figures["arrival_rate"]) == (4, 4)
    assert (figures["throughput"], figures["goodput"]) == (100 / 80, 10 / 80)
    assert figures["latency_seconds"] == pytest.approx(
        {"mean": 50.5, "p50": 50.5, "p95": 95.05, "p99": 99.01}
    )
    assert figures["send_lag_seconds"] == pytest.approx({"p50": 0.001, "p95": 0.003, "p99": 0.003})
    assert figures["failures"] == {"HTTP 500 internal_error": 10}


def test_the_runner_imports_no_torch() -> None:
    code = (
        "import sys; from benchmarks.locust import load, plot, report;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'stepweave')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=SECONDS)


def test_a_run_against_the_real_server_writes_its_three_reports(
    served: Served, tmp_path: Path
) -> None:
    out = tmp_path / "reports"
    result = run(
        "--host",
        served.url,
        "--rates",
        "1,2",
        "--seconds",
        "2",
        "--seed",
        "4",
        "--steps",
        "2,4",
        "--out",
        str(out),
    )
    assert result.returncode == 0, result.stderr
    assert "MonkeyPatchWarning" not in result.stderr and "Traceback" not in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "report.json",
        "report.png",
    ]

    report = json.loads((out / "report.json").read_text())
    stages = schedule([1, 2], 2, 4, SIZES, [2, 4])
    assert report["schedule_sha256"] == digest(stages)
    assert report["arguments"]["rates"] == [1, 2] and report["arguments"]["host"] == served.url
    assert report["models"]["data"][0]["id"] == "shapes"
    assert [stage["offered_rate"] for stage in report["stages"]] == [1, 2]
    for stage, figures in zip(stages, report["stages"], strict=True):
        count = len(stage.arrivals)
        assert count > 0
        assert figures["count"] == figures["counts"]["succeeded"] == count
        assert figures["share"] == {
            "succeeded": 1,
            "refused": 0,
            "failed": 0,
            "unfinished": 0,
            "dropped": 0,
        }
        latency = figures["latency_seconds"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert 0 < latency["mean"] <= latency["p99"] or count == 1
        assert figures["throughput"] == pytest.approx(count / figures["elapsed_seconds"])
        assert figures["goodput"] <= figures["throughput"] <= figures["arrival_rate"]

    html = (out / "report.html").read_text()
    statistics = json.loads(
        html.partition("window.templateArgs = ")[2].partition("\n")[0].rstrip("; ")
    )
    requests = {row["name"]: row["num_requests"] for row in statistics["requests_statistics"]}
    assert requests == {
        "stage 1: 1/s": len(stages[0].arrivals),
        "stage 2: 2/s": len(stages[1].arrivals),
        "Aggregated": sum(len(stage.arrivals) for stage in stages),
    }
    with Image.open(out / "report.png") as image:
        assert image.format == "PNG" and min(image.size) >= 600
        assert len(image.convert("RGB").getcolors(2**20) or []) > 10


class Scripted(BaseHTTPRequestHandler):
    """Answers by the number of steps asked for: 1 with an image, 2 with 429, 3 with 500, 4 never,
    5 with a broken body."""

    over: threading.Event
    ready: bool

    def do_GET(self) -> None:
        self.answer(
            200 if self.ready or self.path != "/readyz" else 503, {"data": [{"id": "scripted"}]}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        match body["num_inference_steps"]:
            case 1:
                self.answer(200, IMAGE)
            case 2:
                self.answer(429, {"error": {"code": "queue_full", "param": None}})
            case 3:
                self.answer(500, {"error": {"code": "internal_error", "param": None}})
            case 4:
                self.over.wait(SECONDS)
            case _:
                self.answer(200, IMAGE, missing=10)
                self.close_connection = True

    def answer(self, status: int, body: dict[str, Any], missing: int = 0) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) + missing))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True


@pytest.fixture
def scripted() -> Iterator[tuple[str, type[Scripted]]]:
    handler = type("Handler", (Scripted,), {"over": threading.Event(), "ready": True})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        handler.over.set()
        server.shutdown()
        thread.join()


@pytest.mark.full
def test_each_outcome_is_counted_apart(
    scripted: tuple[str, type[Scripted]], tmp_path: Path
) -> None:
    url, _ = scripted
    result = run(
        "--host",
        url,
        "--rates",
        "20",
        "--seconds",
        "1",
        "--steps",
        "1,2,3,4,5",
        "--drain",
        "5",
        "--out",
        str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    (stage,) = schedule([20], 1, 1, SIZES, [1, 2, 3, 4, 5])
    steps = Counter(arrival.body["num_inference_steps"] for arrival in stage.arrivals)
    assert all(steps[n] for n in range(1, 6))
    (figures,) = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert figures["counts"] == {
        "succeeded": steps[1],
        "refused": steps[2],
        "failed": steps[3] + steps[5],
        "unfinished": steps[4],
        "dropped": 0,
    }
    assert figures["failures"] == {
        "HTTP 500 internal_error": steps[3],
        "HTTP 200 with a broken body": steps[5],
    }
    assert f"HTTP 500 internal_error x{steps[3]}" in result.stderr


def test_arrivals_beyond_the_cap_are_dropped_and_no_success_is_an_error(
    scripted: tuple[str, type[Scripted]], tmp_path: Path
) -> None:
    url, _ = scripted
    result = run(
        "--host", url, "--rates", "20", "--seconds", "1", "--steps", "4", "--drain", "0.1",
        "--max-in-flight", "3", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 1
    assert "no request succeeded" in result.stderr
    (figures,) = json.loads((tmp_path / "report.json").read_text())["stages"]
    count = len(schedule([20], 1, 1, SIZES, [4])[0].arrivals)
    assert (figures["counts"]["unfinished"], figures["counts"]["dropped"]) == (3, count - 3)
    assert figures["latency_seconds"] == {"mean": None, "p50": None, "p95": None, "p99": None}


def test_a_server_that_is_not_ready_or_not_there_is_said_so(
    scripted: tuple[str, type[Scripted]], tmp_path: Path
) -> None:
    url, handler = scripted
    handler.ready = False
    result = run("--host", url, "--out", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert "is not ready: /readyz answered 503" in result.stderr
    result = run("--host", "http://127.0.0.1:9", "--out", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert "http://127.0.0.1:9 is not reachable" in result.stderr
    assert not list(tmp_path.iterdir())
