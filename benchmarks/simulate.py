"""Compares scheduling policies in a simulation: `python -m benchmarks.simulate`.

It is a discrete-event simulation with the real policies of `stepweave.scheduling`; seconds of
forwards come from a measured curve. All policies get the same arrivals, and ratios are taken seed
by seed. Load 1 is the rate at which every forward would need the batch with the highest throughput;
no policy sustains it.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Part, Report, Row, Spread, cpus
from benchmarks.policies import POLICIES
from benchmarks.simulation.arrivals import (
    Arrival,
    arrivals,
    capacity,
    parse_mix,
    read_trace,
    with_deadlines,
)
from benchmarks.simulation.bound import least_mean_latency
from benchmarks.simulation.curves import Curves
from benchmarks.simulation.figures import Figures
from benchmarks.simulation.plot import draw
from benchmarks.simulation.reception import Reception
from benchmarks.simulation.variants import VARIANTS
from benchmarks.simulation.world import World, fixed
from stepweave.scheduling.policy import Policy

CURVE = Path(__file__).parent / "curves" / "qwen-image-h200.json"
MIX = "512x512:4:15,512x512:28:35,1024x1024:28:35,1024x1024:50:15"
BASELINE = "fifo"
SHOWN = ("mean", "p50", "p95", "p99", "slowdown", "within", "hits", "throughput", "rows")
# figures with admission
BOUNDED = ("throughput", "refused", "retries", "kept", "told", "inside", "mean", "p99", "within")
COMPARED = ("mean", "p95", "p99", "slowdown", "within")


@dataclass(frozen=True)
class Case:
    """Arrivals, random or from a trace, to simulate once for each policy."""

    curve: Path
    mix: str
    load: float
    seed: int
    jobs: int
    burst: float = 1
    # share of jobs with a deadline, and deadlines in multiples of a job's time alone
    deadlines: tuple[float, float] = (0, 1)
    trace: Path | None = None
    limit: int | None = None  # requests in flight
    max_wait: float = float("inf")  # seconds, as STEPWEAVE_MAX_WAIT
    attempts: int = 1  # of a client, each after the Retry-After of the refusal before

    def arrivals(self, curves: Curves) -> list[Arrival]:
        if self.trace is not None:
            return read_trace(self.trace)
        mix, cost = parse_mix(self.mix), curves.model()
        drawn = arrivals(
            mix, self.load * capacity(mix, curves, cost), self.jobs, self.seed, self.burst
        )
        return with_deadlines(drawn, curves, cost, *self.deadlines, self.seed)


def policy(name: str) -> tuple[Policy, int | None]:
    """A policy and its cap, by name: `srpt` is capped at the knees, `srpt@3` at 3 rows."""
    policies = {**POLICIES, **VARIANTS}
    bare, _, cap = name.partition("@")
    if bare not in policies:
        raise SystemExit(f"there is no policy {bare!r}; choose from {', '.join(policies)}")
    return policies[bare], int(cap) if cap else None


def simulated(case: Case, names: tuple[str, ...]) -> tuple[float, dict[str, Figures]]:
    """A lower bound of the mean latency, and the figures of each policy, for the same arrivals."""
    curves = Curves.read(case.curve)
    requests = case.arrivals(curves)
    figures = {}
    for name in names:
        chosen, cap = policy(name)
        rows = fixed(cap) if cap else None
        door = Reception(curves, case.limit, chosen.rank, case.max_wait) if case.limit else None
        world = World(requests, curves, chosen, cap=rows, door=door, attempts=case.attempts)
        figures[name] = Figures.of(world.simulate(), case.max_wait)
    return least_mean_latency(requests, curves, curves.model()), figures


def spreads(runs: list[dict[str, Figures]], name: str) -> dict[str, Spread]:
    """The spread of each figure of a policy over the seeds."""
    taken = [asdict(figures[name]) for figures in runs]
    keys = [key for key in taken[0] if all(figures[key] is not None for figures in taken)]
    return {key: Spread.of([figures[key] for figures in taken]) for key in keys}


def ratios(runs: list[dict[str, Figures]], name: str, bounds: list[float]) -> Row:
    """A policy's figures relative to the baseline and to the bound, seed by seed."""
    row: Row = {"policy": name}
    for key in COMPARED:
        pairs = [(getattr(figures[name], key), getattr(figures[BASELINE], key)) for figures in runs]
        row[f"{key} / {BASELINE}"] = Spread.of([value / max(base, 1e-9) for value, base in pairs])
    means = [figures[name].mean for figures in runs]
    row["mean / bound"] = Spread.of(
        [mean / bound for mean, bound in zip(means, bounds, strict=True)]
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--curve", type=Path, default=CURVE, help="step-time curve, JSON (default: %(default)s)"
    )
    parser.add_argument(
        "--mix", default=MIX, help="jobs as size:steps:share,... (default: %(default)s)"
    )
    parser.add_argument(
        "--loads",
        default="0.6,0.8,0.9,1.5",
        help="arrival rates, relative to the highest throughput (default: %(default)s)",
    )
    parser.add_argument(
        "--policies",
        default=",".join(POLICIES),
        help="names, or name@rows for a fixed batch limit instead of the knee (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=10, help="number of seeds (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1000, help="jobs per seed (default: %(default)s)"
    )
    parser.add_argument(
        "--burst",
        type=float,
        default=1,
        help="mean number of jobs that arrive together (default: %(default)s)",
    )
    parser.add_argument(
        "--deadlines",
        default="0:1",
        help="SHARE:FACTOR, the share of jobs with a deadline, and the deadline as a multiple of "
        "the job's time alone (default: %(default)s)",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        help="file of arrivals, instead of random ones; see benchmarks/simulation/arrivals.py",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="requests in flight; further ones are refused, and retry after Retry-After (default: "
        "no limit)",
    )
    parser.add_argument(
        "--max-wait",
        type=float,
        default=600,
        help="seconds, as STEPWEAVE_MAX_WAIT; with --limit (default: %(default)s)",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        help="attempts of a client that is refused; with --limit (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/simulate"),
        help="directory of the report (default: %(default)s)",
    )
    arguments = parser.parse_args()

    names = tuple(dict.fromkeys(arguments.policies.split(",")))
    for name in names:
        policy(name)
    compared = BASELINE in names and not arguments.limit
    shown = BOUNDED if arguments.limit else SHOWN
    share, slack = map(float, arguments.deadlines.split(":"))
    loads = [1.0] if arguments.trace else [float(load) for load in arguments.loads.split(",")]
    cases = [
        Case(
            arguments.curve,
            arguments.mix,
            load,
            seed,
            arguments.jobs,
            arguments.burst,
            (share, slack),
            arguments.trace,
            arguments.limit,
            arguments.max_wait,
            arguments.attempts,
        )
        for load in loads
        for seed in range(1 if arguments.trace else arguments.seeds)
    ]
    curves = Curves.read(arguments.curve)
    report = Report(arguments.out / "simulate.json", **_shown(arguments))
    jobs = f"{arguments.jobs} jobs a seed, {arguments.seeds} seeds"
    about = f"{curves.name} ({curves.source}); mix {arguments.mix}; {jobs}."
    by_policy: dict[str, dict[str, list[Spread]]] = {name: {} for name in names}
    bounds: list[Spread] = []
    with ProcessPoolExecutor(cpus()) as pool:
        results = pool.map(simulated, cases, [names] * len(cases))
        for load in loads:
            taken = [next(results) for case in cases if case.load == load]
            least, runs = [bound for bound, _ in taken], [figures for _, figures in taken]
            bounds.append(Spread.of(least))
            every = {name: spreads(runs, name) for name in names}
            for name, figures in every.items():
                for key, spread in figures.items():
                    by_policy[name].setdefault(key, []).append(spread)
            rows: list[Row] = [
                {"policy": name, **{key: figures[key] for key in shown if key in figures}}
                for name, figures in every.items()
            ]
            ratio_rows = [ratios(runs, name, least) for name in names] if compared else []
            report.add(
                "trace" if arguments.trace else f"load {load:g}",
                Part(f"{about} No schedule has a mean below {bounds[-1]} s.", (rows, ratio_rows)),
                bounds=least,
                runs=[{name: asdict(figures) for name, figures in run.items()} for run in runs],
            )
    title = f"{curves.name}; {arguments.mix}\n{jobs}: median and quartiles"
    draw(loads, by_policy, bounds, title, arguments.out / "simulate.png")
    report.close()


def _shown(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments without paths of this machine."""
    return {
        name: str(value) for name, value in vars(arguments).items() if name not in ("curve", "out")
    }


if __name__ == "__main__":
    main()
