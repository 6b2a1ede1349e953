"""The runs: which there are, in which order, and their figures, each in a JSON file."""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ladder.contestants import OURS
from benchmarks.ladder.scenarios import OTHERS, SCENARIOS, SHORT, Kind, Scenario
from benchmarks.serving.client import BenchmarkError, Outcome
from benchmarks.serving.figures import latency_figures

LOAD = 0.8  # of a capacity, in the open loops
CLIENTS = 16  # of the closed loop
GROWTH = 1.5  # of the backlog, within the second half of a run

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One contestant in one scenario with one seed."""

    scenario: Scenario
    seed: int
    contestant: str

    @property
    def name(self) -> str:
        return f"{self.scenario.name}-{self.seed}-{self.contestant}"


def plan(
    scenarios: Sequence[Scenario], seeds: Sequence[int], contestants: Sequence[str]
) -> Iterator[Run]:
    """The runs in their order: the most important scenario first, and all contestants of one seed
    before the next seed, in an order of the seed's own."""
    for scenario in scenarios:
        for seed in seeds:
            order = list(contestants)
            random.Random(f"{scenario.name} {seed}").shuffle(order)
            yield from (Run(scenario, seed, contestant) for contestant in order)


class Store:
    """A folder with a file for each finished run, the settings of all, and the rates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs = folder / "runs"

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of the runs. Raises BenchmarkError if the folder has runs with
        others: these could not be compared."""
        path = self.folder / "settings.json"
        if path.exists():
            kept = json.loads(path.read_text())
            changed = [name for name in settings if kept.get(name) != settings[name]]
            if changed:
                raise BenchmarkError(
                    f"the runs in {self.folder} were made with other settings ("
                    + ", ".join(f"{name} {kept.get(name)}" for name in changed)
                    + "): use these, or another folder (--out)"
                )
        _write(path, settings)

    def keep(self, name: str, content: Any) -> None:
        _write(self.folder / f"{name}.json", content)

    def kept(self, name: str) -> Any:
        """What was kept; an empty object if nothing was."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def has(self, run: Run) -> bool:
        return self._path(run).exists()

    def add(self, run: Run, figures: Mapping[str, Any]) -> None:
        record = {"scenario": run.scenario.name, "seed": run.seed, "contestant": run.contestant}
        _write(self._path(run), {**record, **figures})

    def records(self) -> list[Record]:
        return [json.loads(path.read_text()) for path in sorted(self._runs.glob("*.json"))]

    def rate(self, scenario: Scenario) -> float | None:
        """Arrivals per second of an open loop: a share of the median capacity in the closed loop
        of the same mix. Once worked out it is kept, so that all runs have the same. None if there
        is no run of the closed loop."""
        rates = self.kept("rates")
        if scenario.name not in rates:
            capacity = capacities(self.records(), scenario.mix)
            others = [value for name, value in capacity.items() if name != OURS]
            known = [capacity[OURS]] if OURS in capacity else []
            choice = others if scenario.capacity_of == OTHERS else known
            if not choice:
                return None
            rates[scenario.name] = LOAD * max(choice)
            self.keep("rates", rates)
        rate: float = rates[scenario.name]
        return rate

    def _path(self, run: Run) -> Path:
        return self._runs / f"{run.name}.json"


def capacities(records: Sequence[Record], mix: str) -> dict[str, float]:
    """Each contestant's median throughput in the closed loop of a mix, of runs without failures."""
    found: dict[str, list[float]] = {}
    for record in records:
        scenario = SCENARIOS[record["scenario"]]
        if scenario.mix == mix and scenario.capacity_of is None and not record["failed"]:
            found.setdefault(record["contestant"], []).append(record["throughput"])
    return {name: statistics.median(values) for name, values in found.items()}


def figures(outcomes: Sequence[Outcome], window: float | None) -> Record:
    """The figures of a run. Latencies are in seconds, of requests answered with an image;
    throughput is in images per second until the last one.

    Args:
        window: seconds of arrivals in an open loop; None for a closed loop.
    """
    latencies = [outcome.latency for outcome in outcomes if outcome.latency is not None]
    short = [
        outcome.latency
        for outcome in outcomes
        if outcome.latency is not None and _kind(outcome).steps == SHORT
    ]
    elapsed = max(
        (outcome.finish for outcome in outcomes if outcome.latency is not None), default=0
    )
    all_of_them, of_short = latency_figures(latencies), latency_figures(short)
    return {
        "sent": len(outcomes),
        "failed": len(outcomes) - len(latencies),
        "codes": sorted({attempt.code for one in outcomes for attempt in one.attempts} - {""}),
        **{name: all_of_them[name] for name in ("mean", "p50", "p95")},
        "short mean": of_short["mean"],
        "short p95": of_short["p95"],
        "throughput": len(latencies) / elapsed if elapsed else 0.0,
        "overloaded": window is not None and overloaded(outcomes, window),
        "late sending": max((outcome.lag for outcome in outcomes), default=None),
        "requests": [
            [
                *_kind(outcome),
                round(outcome.request.offset, 4),
                None if outcome.latency is None else round(outcome.latency, 4),
            ]
            for outcome in outcomes
        ],
    }


def overloaded(outcomes: Sequence[Outcome], window: float) -> bool:
    """Whether a server could not keep up in an open loop: requests were unfinished or refused, or
    the backlog grew through the second half of the window to more than the closed loop's
    clients."""
    if any(outcome.status in ("unfinished", "refused") for outcome in outcomes):
        return True
    middle, end = (
        backlog(outcomes, share * window, (share + 0.25) * window) for share in (0.25, 0.75)
    )
    return end > CLIENTS and end > GROWTH * middle


def backlog(outcomes: Sequence[Outcome], start: float, end: float) -> float:
    """The mean number of requests that had arrived and were not answered, between two times."""
    waits = (min(one.finish, end) - max(one.request.offset, start) for one in outcomes)
    return sum(wait for wait in waits if wait > 0) / (end - start)


def _kind(outcome: Outcome) -> Kind:
    return Kind(*outcome.request.kind)  # type: ignore[call-arg]


def _write(path: Path, content: Any) -> None:
    """Write a file so that an interrupted benchmark leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content) + "\n")
    os.replace(unfinished, path)
