"""The picture of a comparison of policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.measure import Spread
from benchmarks.simulation.figures import WITHIN

PANELS = {
    "mean": "Mean latency (s)",
    "p99": "99th percentile of latency (s)",
    "within": f"Share within {WITHIN}x the time alone",
}


def draw(
    loads: Sequence[float],
    found: Mapping[str, Mapping[str, Sequence[Spread]]],
    bounds: Sequence[Spread],
    title: str,
    path: Path,
) -> None:
    """`found`: by policy and figure, one value for each load; bars are quartiles over the seeds."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(4.5 * len(PANELS), 4.2), layout="constrained")
    places = range(len(loads))
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        lines = {policy: figures[name] for policy, figures in found.items()}
        if name == "mean":
            lines["no schedule can beat"] = bounds
        for number, (policy, spreads) in enumerate(lines.items()):
            middles = [spread.median for spread in spreads]
            bars = [
                [spread.median - spread.q1 for spread in spreads],
                [spread.q3 - spread.median for spread in spreads],
            ]
            shifted = [place + 0.04 * (number - len(lines) / 2) for place in places]
            style = "k:" if spreads is bounds else "o-"
            axes.errorbar(shifted, middles, yerr=bars, fmt=style, capsize=2, markersize=4, label=policy)
        if name != "within":
            axes.set_yscale("log")
        axes.set(xlabel="Load (share of the best possible throughput)", ylabel=label, xticks=places)
        axes.set_xticklabels([f"{load:g}" for load in loads])
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
