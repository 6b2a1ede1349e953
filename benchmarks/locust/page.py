"""The HTML report: Locust's page with the figures of report.json at the top."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.locust.report import PERCENTILES, samples_needed
from benchmarks.locust.table import ALONE, STAGES, alone_cells, stage_cells

ARGUMENTS = "window.templateArgs = "  # of Locust's page: JSON until the end of the line
BODY = "<body>"
STYLE = (
    "<style>#stepweave{font-family:sans-serif;max-width:1200px;margin:2em auto;padding:0 24px;"
    "overflow-x:auto}"
    "#stepweave table{border-collapse:collapse;margin:1em 0;font-size:.85em}"
    "#stepweave td,#stepweave th{border:1px solid #ccc;padding:.3em .5em;text-align:right}"
    "#stepweave .summary{font-size:1.3em;font-weight:600}</style>"
)


def stage_name(number: int, rate: float) -> str:
    """The name of a stage's requests in Locust's statistics; numbers count from 1."""
    return f"stage {number}: {rate:g}/s"


def page(locust: str, report: Mapping[str, Any]) -> str:
    """Locust's page, with our figures above it, and changed where it would contradict them.

    Raises ValueError if it is not like the pages of the tested version of Locust."""
    head, found, rest = locust.partition(ARGUMENTS)
    if not found or BODY not in head:
        raise ValueError("report.html is not as expected of Locust's page")
    arguments, newline, tail = rest.partition("\n")
    changed = _over_windows(json.loads(arguments), report["stages"])
    text = json.dumps(changed).replace("<", "\\u003c").replace("&", "\\u0026")
    return head.replace(BODY, BODY + _section(report), 1) + ARGUMENTS + text + newline + tail


def _over_windows(arguments: dict[str, Any], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of Locust's page, with rates per second of the stages instead of the whole run,
    and without its percentiles: they would be of any number of samples, and all kinds together."""
    seconds = {
        stage_name(number, stage["offered_rate"]): stage["seconds"]
        for number, stage in enumerate(stages, 1)
    }
    for row in arguments["requests_statistics"]:
        window = seconds.get(row["name"].partition(",")[0], sum(seconds.values()))
        row["total_rps"] = row["num_requests"] / window
        row["total_fail_per_sec"] = row["num_failures"] / window
    return {**arguments, "response_time_statistics": []}


def _section(report: Mapping[str, Any]) -> str:
    needed = ", ".join(f"p{p} from {samples_needed(p)}" for p in PERCENTILES)
    parts = [
        STYLE,
        '<section id="stepweave"><h1>Open-loop load test</h1>',
        f'<p class="summary">{escape(report["summary"])}</p>',
        _table("stages", STAGES, report["stages"], stage_cells),
        "<p>Rates are of the requests that arrived in a stage, per second of the stage, the drain "
        "after it excluded. p50, p95 and p99 are multiples of the time alone, of successful "
        f"requests; percentiles are given where there are enough samples ({needed}). The backlog "
        "is what had no answer yet when the stage ended; the drain is how long its answers then "
        "took. The time alone is the median of a few requests sent one at a time before the "
        "stages:</p>",
        _table("alone", ALONE, report["alone"], alone_cells),
        "<p>Below is Locust's own page. Its RPS and Failures/s are changed to answers of requests "
        "that arrived in a stage, per second of the stage; answers include failures, and refusals "
        "have rows of their own. Its average, minimum and maximum are of all answers of a row, "
        "failures included. Its charts show the whole run, drains included, with the rates and the "
        "median latency of the answers of the last seconds, however few.</p></section>",
    ]
    return "".join(parts)


def _table(
    name: str,
    headings: Iterable[str],
    rows: Iterable[Mapping[str, Any]],
    cells: Callable[[Mapping[str, Any]], list[str]],
) -> str:
    lines = [f"<tr>{_cells('th', headings)}</tr>"]
    lines += [f"<tr>{_cells('td', cells(row))}</tr>" for row in rows]
    return f'<table id="{name}">{"".join(lines)}</table>'


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
