"""The image of a report."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.locust.report import PERCENTILES, drain_limit

COLOURS = {50: "#2a9d8f", 95: "#e9a03b", 99: "#c8553d"}


def draw(report: dict[str, Any], path: Path) -> None:
    figure = chart(report)
    figure.savefig(path, dpi=120, metadata={"Description": report["summary"]})
    plt.close(figure)


def chart(report: dict[str, Any]) -> Figure:
    """Slowdown, requests per second and the drain, against the offered rate."""
    stages = sorted(report["stages"], key=lambda stage: stage["offered_rate"])
    arguments = report["arguments"]
    figure, (slowdown, flow, drain) = plt.subplots(
        3, 1, sharex=True, figsize=(9, 11), height_ratios=(3, 3, 2), layout="constrained"
    )
    _slowdown(slowdown, stages, arguments["target"])
    _flow(flow, stages, arguments["target"])
    _drain(drain, stages, drain_limit(report["alone"]))
    drain.set(
        xlabel="Offered rate (requests/s)", xlim=(0, 1.1 * max(s["offered_rate"] for s in stages))
    )
    for axes in (flow, drain):
        axes.margins(y=0.15)
        axes.set_ylim(0, None)
    for axes in (slowdown, flow, drain):
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="upper left")
    seconds = sorted({stage["seconds"] for stage in stages})
    figure.suptitle("\n".join(textwrap.wrap(report["summary"], 85)), fontsize=12)
    slowdown.set_title(
        f"Open loop, Poisson arrivals; {', '.join(m['id'] for m in report['models']['data'])}; "
        f"{', '.join(arguments['sizes'])} pixels; {', '.join(map(str, arguments['steps']))} steps; "
        f"{' to '.join(f'{n:g}' for n in dict.fromkeys((seconds[0], seconds[-1])))} s per rate, "
        f"seed {arguments['seed']}; {report['date'][:10]}",
        fontsize=8,
    )
    return figure


def _slowdown(axes: Axes, stages: list[dict[str, Any]], target: float) -> None:
    rates = [stage["offered_rate"] for stage in stages]
    for percentile in PERCENTILES:
        values = [stage["slowdown"][f"p{percentile}"] for stage in stages]
        if any(value is not None for value in values):
            axes.plot(
                rates,
                [math.nan if value is None else value for value in values],  # a gap
                "o-",
                color=COLOURS[percentile],
                label=f"p{percentile}",
            )
    axes.axhline(target, color="grey", linestyle=":", label=f"target, {target:g} times")
    axes.set_yscale("log")  # an overload would hide the target
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_ylabel("Latency of successes / time alone")


def _flow(axes: Axes, stages: list[dict[str, Any]], target: float) -> None:
    rates = [stage["offered_rate"] for stage in stages]
    for name, style, colour, label in (
        ("arrival_rate", "o--", "grey", "arrived"),
        ("succeeded_rate", "s-", "#8fb8de", "succeeded"),
        ("good_rate", "o-", "#1d4e89", f"good (within {target:g} times the time alone)"),
        ("lost_rate", "x-", "#c8553d", "refused, failed, unfinished or dropped"),
    ):
        values = [stage[name] for stage in stages]
        # what arrived is larger, to be seen behind an equal number of successes
        size = 11 if name == "arrival_rate" else 6
        axes.plot(rates, values, style, color=colour, label=label, markersize=size)
    axes.set_ylabel("Of the arrivals, requests/s")


def _drain(axes: Axes, stages: list[dict[str, Any]], limit: float) -> None:
    rates = [stage["offered_rate"] for stage in stages]
    seconds = [stage["drain_seconds"] for stage in stages]
    axes.plot(rates, seconds, "D-", color="#7a5195", label="until the last answer")
    for stage in stages:
        axes.annotate(
            f"{stage['backlog_at_end']} open",
            (stage["offered_rate"], stage["drain_seconds"]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.axhline(limit, color="grey", linestyle=":", label=f"keeps up within {limit:.3g} s")
    axes.set_ylabel("Drain after the stage (s)")
