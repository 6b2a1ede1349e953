"""The tables of the finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.ladder.contestants import OURS, Contestant
from benchmarks.ladder.images import TOLERANCE
from benchmarks.ladder.runs import Record
from benchmarks.ladder.scenarios import SCENARIOS, SHORT, Scenario
from benchmarks.measure import Part, Row, Spread, Value
from benchmarks.serving.figures import over_seeds, ratios

COMPARED = ("throughput", "mean", "p95", "cpu")
FLOORS = ("floor", "best floor")
OVERLOADED = "overloaded"


def parts(
    records: Sequence[Record],
    contestants: Mapping[str, Contestant],
    rates: Mapping[str, float],
    failures: Mapping[str, str],
) -> dict[str, Part]:
    """A part for each scenario that has runs, by name, and one of the contestants.

    Args:
        rates: arrivals per second of the open loops, by scenario.
        failures: why contestants could not be measured.
    """
    found = {"contestants": _contestants(records, contestants, failures)}
    for scenario in SCENARIOS.values():
        of_scenario = [record for record in records if record["scenario"] == scenario.name]
        if of_scenario:
            found[scenario.name] = _scenario(scenario, of_scenario, rates.get(scenario.name))
    return found


def arrivals(rate: float | None) -> str:
    """How the requests of a scenario arrive: from a closed loop, or at a rate per second."""
    if rate is None:
        return "a closed loop: latency counts from sending"
    return (
        f"an open loop of {rate:.3g} requests per second: latency counts from the intended arrival"
    )


def _contestants(
    records: Sequence[Record], contestants: Mapping[str, Contestant], failures: Mapping[str, str]
) -> Part:
    runs = [record["contestant"] for record in records]
    rows: list[Row] = []
    for name in {**contestants, **dict.fromkeys(runs)}:
        contestant = contestants.get(name)
        why_not = failures.get(name) or (contestant.why_not if contestant else "")
        state = f"not run: {why_not}" if why_not else "not run yet"
        if count := runs.count(name):
            state = f"{count}, then not run: {why_not}" if why_not else str(count)
        rows.append(
            {
                "contestant": name,
                "what it is": contestant.about if contestant else "",
                "runs": state,
            }
        )
    return Part("The contestants.", (rows,))


def _scenario(scenario: Scenario, records: Sequence[Record], rate: float | None) -> Part:
    names = sorted({record["contestant"] for record in records}, key=lambda name: name != OURS)
    by_name = {
        name: {record["seed"]: record for record in records if record["contestant"] == name}
        for name in names
    }
    short = any(kind.steps == SHORT for kind in scenario.kinds)
    rows = [_row(name, by_name[name], by_name.get(OURS, {}), short) for name in names]
    rows[names.count(OURS) :] = sorted(
        rows[names.count(OURS) :], key=lambda row: _median(row["images/s"]), reverse=True
    )
    seeds = sorted({record["seed"] for record in records})
    loads = Spread.known(record.get("load_average") for record in records)
    about = (
        f"{scenario.name}, {arrivals(rate)}. Medians (and extremes) over seeds {_listed(seeds)}; "
        f"ratios are {OURS} / contestant, seed by seed. Seconds of answered requests. Wrong: "
        f"images whose samples differ from the pipeline's own call by more than {TOLERANCE:g} of "
        "255 on average. Floor: seconds of bare calls of the modules, in as many rows as the "
        "server's forwards had, or in those with the most rows a second. Seconds and ratios are of "
        "the seeds in which a contestant was not overloaded."
        + (f" Short: the requests of {SHORT} steps." if short else "")
        + (f" Load average before the runs: {loads}." if loads else "")
    )
    return Part(about, (rows,))


def _row(
    name: str, runs: Mapping[int, Record], ours: Mapping[int, Record], short: bool
) -> dict[str, Value]:
    records = list(runs.values())
    steady = [record for record in records if not record["overloaded"]]
    wrong, checked = (sum(record[key] for record in records) for key in ("wrong", "checked"))
    compared = (*COMPARED, "short mean") if short else COMPARED
    pairs = [
        seed
        for seed, record in runs.items()
        if name != OURS and seed in ours
        if not (record["overloaded"] or ours[seed]["overloaded"])
    ]
    shown = ("mean", "p50", "p95", "short mean", "short p95") if short else ("mean", "p50", "p95")
    return {
        "contestant": f"{name} (WRONG IMAGES)" if wrong else name,
        "seeds": len(records),
        "images/s": over_seeds(records, "throughput"),
        "CPU s per image": over_seeds(records, "cpu"),
        OVERLOADED: f"{len(records) - len(steady)} of {len(records)}",
        **{f"{key} s": over_seeds(steady, key) for key in shown},
        **{
            f"{key} / time": over_seeds([one for one in records if key in one], key)
            for key in FLOORS
        },
        "failed": _of(records, "failed", "sent"),
        "wrong": f"{wrong} of {checked}" if checked else "not checked",
        **{
            f"ratio of {key}": ratios(
                [ours[seed] for seed in pairs], [runs[seed] for seed in pairs], key
            )
            for key in compared
        },
    }


def _of(records: Sequence[Record], part: str, whole: str) -> str:
    count = sum(record[part] for record in records)
    return f"{count} of {sum(record[whole] for record in records)}"


def _median(value: Value) -> float:
    return value.median if isinstance(value, Spread) else 0.0


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
