"""The image of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(report: dict[str, Any], path: Path) -> None:
    """Latency percentiles above, requests per second below, both against the offered rate."""
    stages = sorted(report["stages"], key=lambda stage: stage["offered_rate"])
    arguments = report["arguments"]
    rates = [stage["offered_rate"] for stage in stages]
    figure, (latency, flow) = plt.subplots(2, 1, sharex=True, figsize=(8, 8), layout="constrained")

    for name, colour in (("p50", "#2a9d8f"), ("p95", "#e9a03b"), ("p99", "#c8553d")):
        values = [stage["latency_seconds"][name] for stage in stages]  # None leaves a gap
        latency.plot(
            rates,
            [float("nan") if value is None else value for value in values],
            "o-",
            color=colour,
            label=name,
        )
    latency.axhline(
        arguments["target"], color="grey", linestyle=":", label=f"target, {arguments['target']:g} s"
    )
    latency.set(ylabel="Latency of successes (s)", ylim=(0, None))

    flow.plot(
        rates, [stage["arrival_rate"] for stage in stages], ".--", color="grey", label="arrived"
    )
    flow.plot(
        rates, [stage["throughput"] for stage in stages], "s-", color="#8fb8de", label="succeeded"
    )
    flow.plot(
        rates,
        [stage["goodput"] for stage in stages],
        "o-",
        color="#1d4e89",
        label=f"goodput (within {arguments['target']:g} s)",
    )
    lost = [stage["arrival_rate"] * (1 - stage["share"]["succeeded"]) for stage in stages]
    flow.plot(rates, lost, "x-", color="#c8553d", label="refused, failed, unfinished or dropped")
    flow.set(
        xlabel="Offered rate (requests/s)", ylabel="Requests/s", ylim=(0, None), xlim=(0, None)
    )

    for axes in (latency, flow):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    figure.suptitle(
        f"Open-loop capacity of {', '.join(model['id'] for model in report['models']['data'])}, "
        f"Poisson arrivals\n"
        f"{', '.join(arguments['sizes'])} pixels; {', '.join(map(str, arguments['steps']))} steps; "
        f"{arguments['seconds']:g} s per rate, seed {arguments['seed']}; {report['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
