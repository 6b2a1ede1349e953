"""The figures of stages as cells of text: the same on the console and in the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STAGES = (
    "offered/s", "seconds", "arrived", "succeeded/s", "good/s", "p50", "p95", "p99", "p95 s",
    "backlog", "drain s", "refused", "failed", "unfinished", "dropped", "verdict",
)  # fmt: skip
ALONE = ("size", "steps", "alone s", "target s")


def stage_cells(stage: Mapping[str, Any]) -> list[str]:
    """p50, p95 and p99 are of the slowdown; `p95 s` is of the latency."""
    counts = stage["counts"]
    return [
        f"{stage['offered_rate']:g}",
        f"{stage['seconds']:g}",
        str(stage["count"]),
        f"{stage['succeeded_rate']:.2f}",
        f"{stage['good_rate']:.2f}",
        *(_number(stage["slowdown"][name]) for name in ("p50", "p95", "p99")),
        _number(stage["latency_seconds"]["p95"]),
        str(stage["backlog_at_end"]),
        f"{stage['drain_seconds']:.1f}",
        *(str(counts[status]) for status in ("refused", "failed", "unfinished", "dropped")),
        stage["verdict"],
    ]


def alone_cells(entry: Mapping[str, Any]) -> list[str]:
    return [
        entry["size"],
        str(entry["steps"]),
        _number(entry["seconds"]),
        _number(entry["target_seconds"]),
    ]


def line(headings: Sequence[str], cells: Sequence[str]) -> str:
    """A row for the console, below its headings."""
    pairs = zip(headings, cells, strict=True)
    return "  ".join(f"{cell:>{max(len(heading), 7)}}" for heading, cell in pairs)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
