"""The capacity test: its schedule, its arguments, and runs in a process of its own (Locust must not
meet torch)."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.locust.arguments import parse
from benchmarks.locust.page import page
from benchmarks.locust.plot import chart
from benchmarks.locust.report import Outcome, samples_needed, summarise, times_alone
from benchmarks.locust.schedule import Arrival, Kind, Stage, alone, digest, schedule
from benchmarks.locust.summary import sentence, sustained_rate
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


def test_by_default_a_stage_lasts_long_enough_for_p95() -> None:
    stages = schedule([0.5, 1, 2, 4, 100], None, 1, SIZES, STEPS)
    assert [stage.seconds for stage in stages] == [300, 150, 75, 37.5, 30]
    assert all(len(stage.arrivals) >= samples_needed(95) for stage in stages)


def test_each_kind_of_the_mix_is_sent_alone_once_a_round() -> None:
    rounds = alone(7, SIZES, [*STEPS, 4], 3)
    kinds = [Kind(size, steps) for size in SIZES for steps in STEPS]
    assert [[arrival.kind for arrival in requests] for requests in rounds] == [kinds] * 3
    assert rounds == alone(7, SIZES, STEPS, 3) != alone(8, SIZES, STEPS, 3)
    assert len({arrival.body["seed"] for requests in rounds for arrival in requests}) == 24


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--rates", value) for value in ("0", "-1", "nan", "inf", "", "1,,2", "fast")),
        *(
            (name, value)
            for name in ("--seconds", "--target", "--drain")
            for value in ("0", "-1", "nan", "x")
        ),
        *(
            ("--host", value)
            for value in ("localhost:3000", "http://", "http://localhost:x", "ftp://localhost")
        ),
        ("--seed", "-1"),
        ("--sizes", "64"),
        ("--steps", "0"),
        ("--max-in-flight", "0"),
        ("--alone", "0"),
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


SMALL, LARGE = Kind("64x64", 4), Kind("128x128", 30)


def stage_of(kinds: Sequence[Kind], rate: float = 4, seconds: float = 50) -> Stage:
    """A stage of these kinds, whose requests arrive evenly."""
    return Stage(
        rate,
        seconds,
        tuple(
            Arrival(
                seconds * n / len(kinds), {"size": kind.size, "num_inference_steps": kind.steps}
            )
            for n, kind in enumerate(kinds)
        ),
    )


def test_the_time_alone_is_the_median_and_its_multiple_the_target() -> None:
    assert times_alone({SMALL: [0.3, 0.1, 0.2], LARGE: [2.0, 2.5]}, 4) == [
        {"size": "64x64", "steps": 4, "seconds": 0.2, "target_seconds": 0.8,
         "samples": [0.3, 0.1, 0.2]},
        {"size": "128x128", "steps": 30, "seconds": 2.25, "target_seconds": 9.0,
         "samples": [2.0, 2.5]},
    ]  # fmt: skip


def test_the_figures_of_a_stage_follow_from_its_outcomes() -> None:
    # a success takes 1 to 100 times its kind's time alone, 0.5 and 2 seconds
    times = times_alone({SMALL: [0.5], LARGE: [2.0]}, 10)
    kinds = [SMALL, LARGE] * 50 + [SMALL] * 100
    outcomes = [
        Outcome("succeeded", lag=0.001, latency=multiple * (0.5 if kind is SMALL else 2.0))
        for multiple, kind in enumerate(kinds[:100], 1)
    ]
    outcomes += [Outcome("refused", lag=0.001, latency=0.01)] * 20
    outcomes += [Outcome("failed", lag=0.3, latency=0.02, reason="HTTP 500 internal_error")] * 10
    outcomes += [Outcome("unfinished", lag=0.001)] * 30 + [Outcome("dropped")] * 40
    figures = summarise(stage_of(kinds), outcomes, 80, times, target=10)
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
    assert (figures["offered_rate"], figures["arrival_rate"], figures["seconds"]) == (4, 4, 50)
    # of the 50 seconds in which requests arrived, not of the 130 until the last answer
    assert figures["succeeded_rate"] == 100 / 50 and figures["lost_rate"] == 100 / 50
    assert figures["good_rate"] == 10 / 50  # 10 times the time alone is still good
    assert figures["slowdown"] == pytest.approx(
        {"mean": 50.5, "p50": 50.5, "p95": 95.05, "p99": None}
    )
    assert figures["latency_seconds"]["mean"] == pytest.approx((2500 * 0.5 + 2550 * 2) / 100)
    # successes that ended late, and all that are unfinished
    late = sum(50 * n / 200 + float(outcomes[n].latency or 0) > 50 for n in range(100))
    assert late and figures["backlog_at_end"] == late + 30
    assert figures["drain_seconds"] == 80
    assert figures["send_lag_seconds"] == {"max": 0.3, "late": 10}
    assert figures["failures"] == {"HTTP 500 internal_error": 10}
    assert figures["verdict"] == "not sustained"
    assert figures["reasons"] == [
        "100 of 200 requests got no image",
        "the last answer came 80.0 s after the last arrivals (limit 20.0 s)",
        "p95 was 95 times the time alone",
    ]


@pytest.mark.parametrize(
    ("samples", "given"),
    [(9, ""), (10, "p50"), (99, "p50"), (100, "p50 p95"), (499, "p50 p95"), (500, "p50 p95 p99")],
)
def test_a_percentile_is_given_from_five_samples_beyond_it(samples: int, given: str) -> None:
    outcomes = [Outcome("succeeded", lag=0.0, latency=1.0)] * samples
    stage = stage_of([SMALL] * samples)
    figures = summarise(stage, outcomes, 0, times_alone({SMALL: [1.0]}, 5), 5)
    for spread in (figures["slowdown"], figures["latency_seconds"]):
        assert [name for name, value in spread.items() if value] == ["mean", *given.split()]
    assert figures["verdict"] == ("sustained" if "p95" in given else "too few samples")


TIMES = times_alone({SMALL: [0.5], LARGE: [2.0]}, 5)


def stage(rate: float, slowdown: float = 2.0, count: int = 120, drained: float = 1.0,
          lost: int = 0) -> dict[str, Any]:  # fmt: skip
    outcomes = [Outcome("succeeded", lag=0.0, latency=0.5 * slowdown)] * (count - lost)
    outcomes += [Outcome("refused", lag=0.0, latency=0.1)] * lost
    return summarise(stage_of([SMALL] * count, rate), outcomes, drained, TIMES, 5)


GOAL = "p95 under 5 times the time alone (2.5 to 10 s, by size and steps)"


@pytest.mark.parametrize(
    ("stages", "rate", "text"),
    [
        (
            [stage(2, 3), stage(1), stage(4, 6)],
            2,
            f"Sustains 2 requests a second at {GOAL}; measured p95: 3 times the time alone.",
        ),
        (
            [stage(1)],
            1,
            f"Sustains at least 1 request a second at {GOAL}; measured p95: 2 times the time "
            "alone.",
        ),
        # an offered rate has the worst verdict of its stages, and a failure below counts
        (
            [stage(1, lost=1), stage(2), stage(3), stage(3, 5)],
            2,
            f"Sustains 2 requests a second at {GOAL}; measured p95: 2 times the time alone. Yet 1 "
            "a second was not sustained.",
        ),
        (
            [stage(1), stage(2, count=16), stage(3, count=99)],
            1,
            f"Sustains at least 1 request a second at {GOAL}; measured p95: 2 times the time "
            "alone. Too few samples to say for 2 and 3 a second.",
        ),
        (
            [stage(8, 50, lost=3), stage(4, drained=10.1)],
            None,
            f"No offered rate was sustained at {GOAL}: at 4 requests a second, the last answer "
            "came 10.1 s after the last arrivals (limit 10.0 s).",
        ),
        (
            [stage(1, count=8), stage(2, count=16), stage(4, lost=1)],
            None,
            f"Too few samples to say whether the server sustains 1 or 2 requests a second at "
            f"{GOAL}: p95 takes 100 answers at a rate, there were at most 16. Not sustained: 4 a "
            "second.",
        ),
    ],
)  # fmt: skip
def test_the_sentence_says_the_highest_rate_that_was_sustained(
    stages: list[dict[str, Any]], rate: float | None, text: str
) -> None:
    assert sustained_rate(stages) == rate
    assert sentence(stages, TIMES, 5) == text


def test_the_sentence_of_a_single_kind_says_its_seconds() -> None:
    assert "5 times the time alone (2.5 s);" in sentence([stage(1)], TIMES[:1], 5)


def test_the_runner_imports_no_torch() -> None:
    code = (
        "import sys; from benchmarks.locust import load, plot, report;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'stepweave')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=SECONDS)


class Page(HTMLParser):
    """The cells of tables by their id, the sentence, and whether it is the first paragraph."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.paragraphs: list[str] = []
        self._rows: list[list[str]] = []
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        if tag == "table":
            self._rows = self.tables[str(dict(attrs)["id"])] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("td", "th"):
            self._rows[-1][-1] += data
        elif self._within == "p":
            self.paragraphs[-1] += data


def lines_of(figure: Figure) -> dict[str, dict[float, float]]:
    """What a chart shows: the points of each line, by its name in the legend, without gaps."""
    return {
        str(line.get_label()): {
            x: y for x, y in np.asarray(line.get_xydata()).tolist() if not math.isnan(y)
        }
        for axes in figure.axes
        for line in axes.get_lines()
    }


def check_agreement(out: Path, stdout: str) -> dict[str, Any]:
    """All outputs say the same sentence and the same figures. Returns report.json."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    stages = report["stages"]
    assert next(iter(report)) == "summary"
    assert report["summary"] == sentence(stages, report["alone"], report["arguments"]["target"])
    assert report["sustained_rate"] == sustained_rate(stages)
    assert stdout.splitlines()[-1] == report["summary"]
    html = (out / "report.html").read_text()
    for row in check_top(html, report):
        assert row == stdout_row(stdout, row)
    check_locusts_part(html, stages)
    check_chart(report)
    with Image.open(out / "report.png") as image:
        assert image.format == "PNG" and min(image.size) >= 600
        assert image.info["Description"] == report["summary"]
        assert len(image.convert("RGB").getcolors(2**20) or []) > 10
    return report


def check_top(html: str, report: dict[str, Any]) -> list[list[str]]:
    """The top of the page has the figures of the report. Returns the cells of its stages."""
    top = Page(html)
    assert top.paragraphs[0] == report["summary"]
    headings, *stages = top.tables["stages"]
    for stage, row in zip(report["stages"], stages, strict=True):
        cells = dict(zip(headings, row, strict=True))
        assert float(cells["offered/s"]) == stage["offered_rate"]
        assert int(cells["arrived"]) == stage["count"]
        assert int(cells["backlog"]) == stage["backlog_at_end"]
        assert float(cells["succeeded/s"]) == pytest.approx(stage["succeeded_rate"], abs=0.005)
        assert float(cells["good/s"]) == pytest.approx(stage["good_rate"], abs=0.005)
        assert float(cells["drain s"]) == pytest.approx(stage["drain_seconds"], abs=0.05)
        assert cells["verdict"] == stage["verdict"]
        for name, value in (
            *((name, stage["slowdown"][name]) for name in ("p50", "p95", "p99")),
            ("p95 s", stage["latency_seconds"]["p95"]),
        ):
            assert (
                cells[name] == "-"
                if value is None
                else float(cells[name]) == pytest.approx(value, rel=0.006)
            )
        assert [int(cells[name]) for name in ("refused", "failed", "unfinished", "dropped")] == [
            stage["counts"][name] for name in ("refused", "failed", "unfinished", "dropped")
        ]
    headings, *rows = top.tables["alone"]
    for entry, row in zip(report["alone"], rows, strict=True):
        assert row[:2] == [entry["size"], str(entry["steps"])]
        assert float(row[2]) == pytest.approx(entry["seconds"], rel=0.006)
        assert float(row[3]) == pytest.approx(entry["target_seconds"], rel=0.006)
    return stages


def check_chart(report: dict[str, Any]) -> None:
    """The chart shows the figures of the report, and nothing else."""
    stages = report["stages"]
    figure = chart(report)
    try:
        assert figure.get_suptitle().replace("\n", " ") == report["summary"]
        shown = lines_of(figure)
        target = f"{report['arguments']['target']:g} times"
        for label, name in (
            ("arrived", "arrival_rate"),
            ("succeeded", "succeeded_rate"),
            (f"good (within {target} the time alone)", "good_rate"),
            ("refused, failed, unfinished or dropped", "lost_rate"),
            ("until the last answer", "drain_seconds"),
        ):
            assert shown.pop(label) == {stage["offered_rate"]: stage[name] for stage in stages}
        for name in ("p50", "p95", "p99"):
            values = {
                stage["offered_rate"]: stage["slowdown"][name]
                for stage in stages
                if stage["slowdown"][name] is not None
            }
            assert shown.pop(name, {}) == values
        assert set(shown.pop(f"target, {target}").values()) == {report["arguments"]["target"]}
        ((_, limit),) = shown.items()
        assert set(limit.values()) == {max(entry["target_seconds"] for entry in report["alone"])}
        texts = {text.get_text() for axes in figure.axes for text in axes.texts}
        assert texts == {f"{stage['backlog_at_end']} open" for stage in stages}
    finally:
        pyplot.close(figure)


def stdout_row(stdout: str, row: list[str]) -> list[str]:
    """The line of the console's table of stages that begins like this row."""
    table = stdout.partition("Stages;")[2].splitlines()
    (line,) = (line for line in table if line.split()[:3] == row[:3])
    return re.split(r"  +", line.strip())


def check_locusts_part(html: str, stages: list[dict[str, Any]]) -> None:
    """Locust's tables give rates over the stages, and no percentiles."""
    arguments = json.loads(
        html.partition("window.templateArgs = ")[2].partition("\n")[0].rstrip("; ")
    )
    assert arguments["response_time_statistics"] == []
    assert arguments["percentiles_to_chart"] == [0.5]
    rows = {row["name"]: row for row in arguments["requests_statistics"]}
    assert "percentile_0.9" not in json.dumps(arguments)
    for number, stage in enumerate(stages, 1):
        row = rows[f"stage {number}: {stage['offered_rate']:g}/s"]
        counts = stage["counts"]
        assert row["num_requests"] == counts["succeeded"] + counts["failed"]
        assert row["num_failures"] == counts["failed"]
        assert row["total_rps"] - row["total_fail_per_sec"] == pytest.approx(
            stage["succeeded_rate"]
        )
    total = sum(row["num_requests"] for name, row in rows.items() if name != "Aggregated")
    assert rows["Aggregated"]["num_requests"] == total
    assert rows["Aggregated"]["total_rps"] == pytest.approx(
        total / sum(stage["seconds"] for stage in stages)
    )


def test_page_and_chart_tell_unequal_figures_apart() -> None:
    """In runs against fast servers, many of the figures are equal."""
    slow = [Outcome("succeeded", lag=0.0, latency=0.02 * n) for n in range(1, 601)]
    others = [Outcome("refused", lag=0.0, latency=0.1)] * 7
    others += [Outcome("failed", lag=0.0, latency=0.1)] * 5 + [Outcome("unfinished", lag=0.0)] * 3
    others += [Outcome("dropped")] * 2
    stages = [
        summarise(stage_of([SMALL] * 617, 12, 40), slow + others, 12.5, TIMES, 5),
        stage(2, slowdown=3),
        stage(1, slowdown=7, count=20),
    ]
    assert stages[0]["slowdown"]["p99"] and 0 < stages[0]["good_rate"] < stages[0]["succeeded_rate"]
    report = {
        "summary": sentence(stages, TIMES, 5),
        "date": "2026-01-31T12:00:00+00:00",
        "arguments": {"target": 5, "sizes": ["64x64"], "steps": [4], "seed": 1},
        "models": {"data": [{"id": "<&>"}]},
        "alone": TIMES,
        "stages": stages,
    }
    locust = (
        '<body>\nwindow.templateArgs = {"requests_statistics": [], "host": "</script>"}\n</body>'
    )
    html = page(locust, report)
    check_top(html, report)
    check_chart(report)
    assert html.count("</script>") == 0  # would end the page's script
    with pytest.raises(ValueError, match="not as expected"):
        page("<body></body>", report)


@pytest.mark.full
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
        "--alone",
        "2",
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

    report = check_agreement(out, result.stdout)
    stages = schedule([1, 2], 2, 4, SIZES, [2, 4])
    assert report["schedule_sha256"] == digest(stages)
    assert report["arguments"]["rates"] == [1, 2] and report["arguments"]["host"] == served.url
    assert report["models"]["data"][0]["id"] == "shapes"
    assert [(entry["size"], entry["steps"]) for entry in report["alone"]] == [
        (size, steps) for size in SIZES for steps in (2, 4)
    ]
    for entry in report["alone"]:
        assert len(entry["samples"]) == 2
        assert entry["seconds"] == pytest.approx(sum(entry["samples"]) / 2)
        assert entry["target_seconds"] == pytest.approx(5 * entry["seconds"])
    assert [stage["offered_rate"] for stage in report["stages"]] == [1, 2]
    for stage, figures in zip(stages, report["stages"], strict=True):
        count = len(stage.arrivals)
        assert 0 < count < 10
        assert figures["count"] == figures["counts"]["succeeded"] == count
        assert figures["share"] == {
            "succeeded": 1,
            "refused": 0,
            "failed": 0,
            "unfinished": 0,
            "dropped": 0,
        }
        for spread in (figures["slowdown"], figures["latency_seconds"]):
            assert spread["mean"] > 0
            assert (spread["p50"], spread["p95"], spread["p99"]) == (None, None, None)
        assert figures["succeeded_rate"] == figures["arrival_rate"] == count / 2
        assert figures["good_rate"] <= figures["succeeded_rate"]


class Scripted(BaseHTTPRequestHandler):
    """Answers the first `images` requests with an image, others by the number of steps asked for: 1
    with an image, 2 with 429, 3 with 500, 4 never, 5 with a broken body."""

    over: threading.Event
    ready: bool
    images: int
    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.answer(
            200 if self.ready or self.path != "/readyz" else 503, {"data": [{"id": "scripted"}]}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        match 1 if len(self.bodies) <= self.images else body["num_inference_steps"]:
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
    state = {"over": threading.Event(), "ready": True, "images": 0, "bodies": []}
    handler = type("Handler", (Scripted,), state)
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
    url, handler = scripted
    handler.images = 5 * 2  # alone: one of each kind to warm up, one that counts
    result = run(
        "--host",
        url,
        "--rates",
        "20",
        "--seconds",
        "1",
        "--alone",
        "1",
        "--sizes",
        "64x64",
        "--steps",
        "1,2,3,4,5",
        "--drain",
        "5",
        "--out",
        str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    (stage,) = schedule([20], 1, 1, ["64x64"], [1, 2, 3, 4, 5])
    steps = Counter(arrival.body["num_inference_steps"] for arrival in stage.arrivals)
    assert all(steps[n] for n in range(1, 6))
    (figures,) = check_agreement(tmp_path, result.stdout)["stages"]
    assert figures["verdict"] == "not sustained"
    assert figures["backlog_at_end"] >= steps[4] and figures["drain_seconds"] >= 5
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
    url, handler = scripted
    handler.images = 2 * 4  # alone
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
    assert figures["backlog_at_end"] == 3


@pytest.mark.full
def test_enough_samples_have_percentiles_and_all_outputs_agree(
    scripted: tuple[str, type[Scripted]], tmp_path: Path
) -> None:
    url, handler = scripted
    # a target that no answer misses, however slow this machine
    result = run(
        "--host", url, "--rates", "70,5", "--seconds", "2", "--sizes", "64x64", "--steps", "1",
        "--alone", "1", "--target", "1e6", "--drain", "1e-9", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = check_agreement(tmp_path, result.stdout)
    many, few = report["stages"]
    assert many["slowdown"]["p50"] <= many["slowdown"]["p95"] and many["slowdown"]["p99"] is None
    assert few["slowdown"]["p95"] is None
    assert (many["verdict"], few["verdict"]) == ("sustained", "too few samples")
    assert report["sustained_rate"] == 70
    assert report["summary"].startswith("Sustains at least 70 requests a second at p95 under 1e+06")
    # the requests alone came first: one for warm-up and one that counts
    sent = [(body["prompt"], body["seed"]) for body in handler.bodies]
    apart = [(b["prompt"], b["seed"]) for (a,) in alone(1, ["64x64"], [1], 2) for b in (a.body,)]
    assert sent[:2] == apart and len(sent) == 2 + many["count"] + few["count"]


def test_a_kind_that_gets_no_image_alone_ends_the_test(
    scripted: tuple[str, type[Scripted]], tmp_path: Path
) -> None:
    url, handler = scripted
    handler.images = 3
    result = run(
        "--host", url, "--sizes", "64x64", "--steps", "1,3", "--out", str(tmp_path)
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    assert (
        "cannot measure the time alone of 64x64, 3 steps: HTTP 500 internal_error" in result.stderr
    )
    assert not list(tmp_path.iterdir())


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
