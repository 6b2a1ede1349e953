"""Writes the reports as the section of docs/pipelines.md about the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from tests.pipelines.document import cell, percent, short
from tests.served.check import TOLERANCE, Report

HEAD = """\
## Served over HTTP

Written by `.venv/bin/python -m tests.served --write`; `.venv/bin/python -m tests.served NAME` checks the entry of that name.

Each row is an entry of the tables above whose result is an image. Its pipeline was saved to a directory and served from there, with
warm-up and with a preset of what belongs to the tiny model. Clients then asked over HTTP for the six calls, and once for every further
image, number, flag and text of the pipeline's call with a value that changes the result. Each answer was compared with a call of another
instance of the pipeline, which diffusers alone loaded from the same directory: alone, and among others that were sent at the same time.

- **Library**: whether diffusers alone loads what it saved, and runs the calls.
- **Served**: whether the server started, and every answer was right; otherwise why not.
- **Merged share**: the share of calls of the denoisers whose forward also served other requests, while the six calls ran together.
- **Error**: the largest difference of a pixel, of 255. It must not be more than {tolerance}.

"""
HEADER = "| entry | library | served | merged share | error |\n| --- | --- | --- | --- | --- |"
TAIL = """\

Not asked, since their results are no images, or since they need what requests cannot send:

| reason | entries |
| --- | --- |
"""


def section(reports: Sequence[Report], excluded: Mapping[str, str]) -> str:
    """The section, without the marks around it; `excluded` has a reason for each entry."""
    by_reason = sorted(excluded.items(), key=lambda item: (item[1].lower(), item[0]))
    groups = [
        f"| {cell(reason)} | {', '.join(f'`{name}`' for name, _ in group)} |"
        for reason, group in groupby(by_reason, key=lambda item: item[1])
    ]
    lines = [_summary(reports), "", HEADER, *map(_row, reports)]
    return HEAD.format(tolerance=TOLERANCE) + "\n".join(lines) + "\n" + TAIL + "\n".join(groups)


def share(reports: Sequence[Report]) -> float:
    """The share of entries that are served, of those that count."""
    return sum(report.right for report in reports) / max(len(reports), 1)


def _summary(reports: Sequence[Report]) -> str:
    served = sum(report.right for report in reports)
    rows = {
        "entries": len(reports),
        "served": f"{served} ({percent(share(reports))})",
        "largest error of a pixel, of 255": max((one.largest_error for one in reports), default=0),
        "further arguments asked for": sum(len(one.asked) for one in reports),
        "not asked: no effect on the plain call": sum(len(one.no_effect) for one in reports),
        "not asked: the plain call raises": sum(len(one.refused) for one in reports),
        "not asked: the plain call draws without its generator": sum(
            len(one.random) for one in reports
        ),
    }
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {rows[name]} |" for name in rows)


def _row(report: Report) -> str:
    library = f"no: {report.library}" if report.library else "yes"
    merged = "no denoiser" if report.merged_share is None else percent(report.merged_share)
    error = str(report.largest_error)
    if report.library or report.failed:
        merged = error = ""
    answer = "yes" if report.right else f"no: {_why(report)}"
    cells = [f"`{report.name}`", short(cell(library)), short(cell(answer)), merged, error]
    return f"| {' | '.join(cells)} |"


def _why(report: Report) -> str:
    if report.library or report.failed:
        return report.failed or "it is not loaded"
    if not report.wrong:
        return f"{report.errors} errors of the engine"
    first, *rest = report.wrong
    return f"{first} (and {len(rest)} more)" if rest else first
