"""Runs the test and writes report.html, report.json and report.png."""

from __future__ import annotations

import json
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from locust import stats  # Locust first: it patches sockets and TLS
from locust.html import get_html_report

from benchmarks.locust import load
from benchmarks.locust.arguments import parse
from benchmarks.locust.page import page
from benchmarks.locust.plot import draw
from benchmarks.locust.report import LATE, Outcome, drain_limit, summarise, times_alone
from benchmarks.locust.schedule import Stage, alone, digest, schedule
from benchmarks.locust.summary import sentence, sustained_rate
from benchmarks.locust.table import ALONE, STAGES, alone_cells, line, stage_cells

MAX_LATE = 0.01  # share of late requests above which the client is too slow


def main() -> int:
    arguments = parse()
    mix = arguments.sizes, arguments.steps
    stages = schedule(arguments.rates, arguments.seconds, arguments.seed, *mix)
    if not any(stage.arrivals for stage in stages):
        return _fail("--rates and --seconds are too low: no request would be sent")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        models = load.require_ready(arguments.host)
        taken = load.time_alone(
            arguments.host, alone(arguments.seed, *mix, rounds=1 + arguments.alone)
        )
    except (OSError, load.NotReady) as error:
        return _fail(str(error))

    report: dict[str, Any] = {
        "summary": "",
        "sustained_rate": None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": {**vars(arguments), "out": str(arguments.out)},
        "schedule_sha256": digest(stages),
        "locust": version("locust"),
        "models": models,
        "alone": times_alone(taken, arguments.target),
        "stages": [],
    }
    print(f"Time alone, and the target ({arguments.target:g} times as long):")
    print(line(ALONE, ALONE))
    for entry in report["alone"]:
        print(line(ALONE, alone_cells(entry)))

    def finished(stage: Stage, outcomes: list[Outcome], drained: float) -> None:
        figures = summarise(stage, outcomes, drained, report["alone"], arguments.target)
        report["stages"].append(figures)
        print(line(STAGES, stage_cells(figures)), flush=True)

    print("\nStages; p50, p95 and p99 as multiples of the time alone:")
    print(line(STAGES, STAGES), flush=True)
    # Locust's page gives percentiles of any number of samples
    stats.PERCENTILES_TO_CHART, stats.PERCENTILES_TO_STATISTICS = [0.5], []
    environment = load.run(
        arguments.host,
        stages,
        max_in_flight=arguments.max_in_flight,
        # a shorter one would abort requests that may still be good
        drain=max(arguments.drain, drain_limit(report["alone"])),
        finished=finished,
    )
    report["summary"] = sentence(report["stages"], report["alone"], arguments.target)
    report["sustained_rate"] = sustained_rate(report["stages"])
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    draw(report, arguments.out / "report.png")
    html = get_html_report(environment, show_download_link=False)
    (arguments.out / "report.html").write_text(page(html, report))

    _warn(report["stages"])
    print(f"\nReports in {arguments.out}/\n{report['summary']}")
    if not any(stage["counts"]["succeeded"] for stage in report["stages"]):
        return _fail("no request succeeded")
    return 0


def _warn(stages: list[dict[str, Any]]) -> None:
    late = sum(stage["send_lag_seconds"]["late"] for stage in stages)
    count = sum(stage["count"] for stage in stages)
    if late > MAX_LATE * count:
        print(
            f"warning: {late} of {count} requests were sent more than {LATE} s late: the client "
            "has too little CPU time",
            file=sys.stderr,
        )
    failures: Counter[str] = sum((Counter(stage["failures"]) for stage in stages), Counter())
    if failures:
        print(
            "failures:",
            "; ".join(f"{reason} x{n}" for reason, n in failures.most_common(5)),
            file=sys.stderr,
        )


def _fail(message: str) -> int:
    print(f"benchmarks.locust: {message}", file=sys.stderr)
    return 1


sys.exit(main())
