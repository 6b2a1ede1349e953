"""The image of a comparison of policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.measure import Spread
from benchmarks.simulation.figures import WITHIN

PANELS = {
    "mean": "Mean latency (s)",
    "p99": "99th percentile of latency (s)",
    "within": f"Share within {WITHIN}x the time alone",
}


def draw(
    loads: Sequence[float],
    by_policy: Mapping[str, Mapping[str, Sequence[Spread]]],
    bounds: Sequence[Spread],
    title: str,
    path: Path,
) -> None:
    """Draw figures `by_policy` and name, with a value for each load; bars are quartiles over the
    seeds. The first policy is emphasised."""
    figure, panels = plt.subplots(
        1, len(PANELS), figsize=(4.2 * len(PANELS), 3.9), layout="constrained"
    )
    places = range(len(loads))
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        lines = {policy: figures[name] for policy, figures in by_policy.items()}
        if name == "mean":
            lines["lower bound"] = bounds
        for number, (policy, spreads) in enumerate(lines.items()):
            middles = [spread.median for spread in spreads]
            bars = [
                [spread.median - spread.q1 for spread in spreads],
                [spread.q3 - spread.median for spread in spreads],
            ]
            shifted = [place + 0.04 * (number - (len(lines) - 1) / 2) for place in places]
            style = "k:" if spreads is bounds else "o-"
            width, order = (2.5, 3) if number == 0 else (1.2, 2)
            axes.errorbar(
                shifted,
                middles,
                bars,
                fmt=style,
                capsize=2,
                markersize=4,
                linewidth=width,
                zorder=order,
                label=policy,
            )
        if name != "within":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="Load (of the highest throughput)", ylabel=label, xticks=places)
        axes.set_xticklabels([f"{load:.0%}" for load in loads])
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)
