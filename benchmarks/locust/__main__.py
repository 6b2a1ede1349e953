"""Runs the test and writes report.html (Locust's own), report.json and report.png."""

from __future__ import annotations

import json
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from locust.html import get_html_report  # Locust first: it patches sockets and TLS

from benchmarks.locust import load
from benchmarks.locust.arguments import parse
from benchmarks.locust.plot import draw
from benchmarks.locust.report import HEADER, Outcome, line, summarise
from benchmarks.locust.schedule import Stage, digest, schedule

LATE = 0.1  # seconds


def main() -> int:
    arguments = parse()
    stages = schedule(
        arguments.rates, arguments.seconds, arguments.seed, arguments.sizes, arguments.steps
    )
    if not any(stage.arrivals for stage in stages):
        return _fail("--rates and --seconds are too low: no request would be sent")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        models = load.require_ready(arguments.host)
    except (OSError, load.NotReady) as error:
        return _fail(str(error))

    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": {**vars(arguments), "out": str(arguments.out)},
        "schedule_sha256": digest(stages),
        "locust": version("locust"),
        "models": models,
        "goodput": 0.0,
        "stages": [],
    }

    def finished(stage: Stage, outcomes: list[Outcome], elapsed: float) -> None:
        report["stages"].append(summarise(stage, outcomes, elapsed, arguments.target))
        print(line(report["stages"][-1]), flush=True)

    print(HEADER, flush=True)
    environment = load.run(
        arguments.host,
        stages,
        max_in_flight=arguments.max_in_flight,
        drain=arguments.drain,
        finished=finished,
    )
    report["goodput"] = max(stage["goodput"] for stage in report["stages"])
    (arguments.out / "report.html").write_text(
        get_html_report(environment, show_download_link=False)
    )
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    draw(report, arguments.out / "report.png")
    print(
        f"highest goodput {report['goodput']:.2f}/s within {arguments.target:g} s; reports in "
        f"{arguments.out}/"
    )

    if any((stage["send_lag_seconds"]["p99"] or 0) > LATE for stage in report["stages"]):
        print(
            f"warning: some requests were sent more than {LATE} s late: the client has too little "
            "CPU time",
            file=sys.stderr,
        )
    failures: Counter[str] = sum(
        (Counter(stage["failures"]) for stage in report["stages"]), Counter()
    )
    if failures:
        print(
            "failures:",
            "; ".join(f"{reason} x{n}" for reason, n in failures.most_common(5)),
            file=sys.stderr,
        )
    if not any(stage["counts"]["succeeded"] for stage in report["stages"]):
        return _fail("no request succeeded")
    return 0


def _fail(message: str) -> int:
    print(f"benchmarks.locust: {message}", file=sys.stderr)
    return 1


sys.exit(main())
