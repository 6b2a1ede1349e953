"""The parts of the benchmark, each a coroutine that adds its tables to the report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.measure import CONFIDENCE, Interval, Part, Row, Spread
from benchmarks.serving import figures
from benchmarks.serving.client import Outcome, offer
from benchmarks.serving.figures import Value
from benchmarks.serving.first import CLIENTS, Contestant, Known, Scale, idle
from benchmarks.serving.mix import DEADLINE, endless, poisson
from benchmarks.serving.report import Recorder, progress, write_array

SHOWN = (
    "mean",
    "p50",
    "p95",
    "p99",
    "within 3x solo",
    "deadline hits",
    "refused",
    "missed",
    "failed",
    "unfinished",
    "throughput",
)
COMPARED = ("mean", "p50", "p95", "p99", "throughput")
MEANS = ("mean", "p50", "p95")  # whose ratios have a confidence interval
OVERLOAD = 1.5  # of capacity
RETURNS = 2  # retries of a refused client, as in the OpenAI client
TRACE_LOAD = 0.8
OVERLOAD_SEED, TRACE_SEED = 40_000, 50_000

Runs = Sequence[Mapping[str, Value]]
Compare = Callable[[Runs, Runs, str], Spread | Interval | None]


async def policies(
    contestants: Sequence[Contestant], scale: Scale, known: Known, report: Recorder
) -> None:
    """Run every contestant in turn, for each seed and load, with the same requests."""
    runs: dict[tuple[float, str], list[dict[str, Value]]] = {}
    etas: dict[tuple[float, str], Counter[float]] = {}
    for number, seed in enumerate(scale.seeds):
        for load in scale.loads:
            requests = poisson(
                load * known.capacity, scale.seconds, seed, known.solo, scale.deadlines
            )
            # the order changes with the seed
            for contestant in [
                *contestants[number % len(contestants) :],
                *contestants[: number % len(contestants)],
            ]:
                before = figures.eta_counts(await idle(contestant))
                outcomes = await offer(
                    contestant.client, requests, contestant.check, drain=scale.drain
                )
                after = figures.eta_counts(await idle(contestant))
                figures_of_run = figures.summarise(outcomes, known.solo, scale.seconds)
                runs.setdefault((load, contestant.name), []).append(figures_of_run)
                difference = Counter({key: value - before[key] for key, value in after.items()})
                etas.setdefault((load, contestant.name), Counter()).update(difference)
                report.record(
                    [_traced(o) for o in outcomes],
                    part="policies",
                    load=load,
                    seed=seed,
                    contestant=contestant.name,
                )
                mean = figures_of_run["mean"]
                progress(
                    f"seed {seed}, load {load:.0%}, {contestant.name}: {len(outcomes)} sent, mean "
                    f"{mean or 0:.2f} s"
                )
                _warn(contestant, outcomes)
    names = [contestant.name for contestant in contestants]

    def compared(load: float, how: Compare, keys: Sequence[str]) -> list[Row]:
        default = runs[load, names[0]]
        return [
            {
                "ratio": f"{name} / {names[0]}",
                **{key: how(runs[load, name], default, key) for key in keys},
            }
            for name in names[1:]
        ]

    tables = [
        table
        for load in scale.loads
        for table in (
            Part(
                f"Load {load:.0%} of capacity, {load * known.capacity:.3g} requests per second for "
                f"{scale.seconds:g} s, {len(scale.seeds)} seeds: medians (and extremes) over the "
                "seeds. Seconds from the scheduled arrival, of answered requests; shares of all "
                f"requests; {scale.deadlines:.0%} of them have a deadline of {DEADLINE}x the time "
                "of their kind alone.",
                (
                    [
                        {
                            "contestant": name,
                            **{key: figures.over_seeds(runs[load, name], key) for key in SHOWN},
                        }
                        for name in names
                    ],
                ),
            ),
            Part(
                f"Load {load:.0%}: relative to `{names[0]}`, seed by seed.",
                (compared(load, figures.ratios, COMPARED),),
            ),
            Part(
                f"Load {load:.0%}: geometric means of these ratios, with {CONFIDENCE:.0%} "
                "confidence intervals. What is above 1 in all of its interval is slower than "
                f"`{names[0]}`.",
                (compared(load, figures.interval, MEANS),),
            ),
        )
    ]
    forecasts: list[Row] = [
        {"contestant": name, "load": f"{load:.0%}", **errors}
        for (load, name), counts in etas.items()
        if (errors := figures.eta_figures(counts))
    ]
    tables.append(Part(f"Errors of predicted finish times (`{figures.ETA}`).", (forecasts,)))
    report.add(
        "policies",
        *tables,
        runs=[{"load": load, "contestant": name, "runs": of} for (load, name), of in runs.items()],
    )


async def overload(contestant: Contestant, scale: Scale, known: Known, report: Recorder) -> None:
    """Overload the server, first with clients that leave when refused, then with clients that
    retry after `Retry-After`."""
    seconds = scale.overload_seconds
    tables = []
    totals: list[Row] = []
    for returns in (0, RETURNS):
        fill = [
            dataclasses.replace(request, offset=0.0)
            for request in islice(endless(OVERLOAD_SEED), CLIENTS)
        ]
        requests = fill + poisson(
            OVERLOAD * known.capacity, seconds, OVERLOAD_SEED, known.solo, scale.deadlines
        )
        await idle(contestant)
        outcomes = await offer(
            contestant.client, requests, contestant.check, drain=2 * scale.drain, returns=returns
        )
        report.record([_traced(o) for o in outcomes], part="overload", returns=returns)
        _warn(contestant, outcomes)
        who = f"retry after Retry-After, at most {returns} times" if returns else "leave"
        tables.append(
            Part(
                f"Refused clients {who}.",
                (figures.over_time(outcomes, seconds, seconds / 6, known.capacity),),
            )
        )
        refusals = figures.refusals(outcomes)
        answered = [outcome for outcome in outcomes if outcome.status == "answered"]
        milliseconds = [1000 * attempt.seconds for attempt in refusals]
        totals.append(
            {
                "refused clients": who,
                "sent": len(outcomes),
                "answered": figures.share([outcome.status == "answered" for outcome in outcomes]),
                "missed": figures.share([outcome.status == "missed" for outcome in outcomes]),
                "failed or unfinished": figures.share(
                    [o.status in ("failed", "unfinished") for o in outcomes]
                ),
                "goodput / capacity": sum(o.on_time and o.finish < seconds for o in outcomes)
                / seconds
                / known.capacity,
                "longest wait s": max(
                    (outcome.attempts[-1].seconds for outcome in answered), default=None
                ),
                "refusals": len(refusals),
                "refusal ms, p50": figures.latency_figures(milliseconds)["p50"],
                "p99": figures.latency_figures(milliseconds)["p99"],
            }
        )
        if returns:
            codes = Counter(
                o.attempts[0].code
                for o in outcomes
                if o.attempts and o.attempts[0].status == "refused"
            )
            tables.append(
                Part(
                    "Clients that retried, by the code of their first refusal. Deadlines start "
                    "again with each attempt.",
                    ([figures.returned(outcomes, code, returns) for code in sorted(codes)],),
                )
            )
    about = (
        f"{OVERLOAD:.0%} of capacity for {seconds:g} s, after {CLIENTS} concurrent requests that "
        "fill the queue. Goodput: images within the deadline, if there is one. Waits are from the "
        "last attempt to the image."
    )
    report.add("overload", Part(about, (totals,)), *tables)


async def trace(
    contestant: Contestant, scale: Scale, known: Known, report: Recorder, path: Path
) -> None:
    """A run whose arrivals are written as a trace for the simulator."""
    rate = TRACE_LOAD * known.capacity
    requests = poisson(rate, scale.trace_seconds, TRACE_SEED, known.solo, scale.deadlines)
    await idle(contestant)
    outcomes = await offer(contestant.client, requests, contestant.check, drain=scale.drain)
    _warn(contestant, outcomes)
    write_array(path, [_traced(outcome) for outcome in outcomes])
    values = figures.summarise(outcomes, known.solo, scale.trace_seconds)
    report.add(
        "trace",
        Part(
            f"A recorded trace, {path.name}: load {TRACE_LOAD:.0%}, {scale.trace_seconds:g} s, "
            f"`{contestant.name}`.",
            ([{"sent": len(outcomes), **{name: values[name] for name in SHOWN}}],),
        ),
    )


def _warn(contestant: Contestant, outcomes: Sequence[Outcome]) -> None:
    codes = Counter(outcome.attempts[-1].code for outcome in outcomes if outcome.status == "failed")
    if unfinished := sum(outcome.status == "unfinished" for outcome in outcomes):
        codes["no answer in time"] = unfinished
    if codes:
        progress(
            f"{contestant.name}: " + ", ".join(f"{code} x{count}" for code, count in codes.items())
        )


def _traced(outcome: Outcome) -> dict[str, Any]:
    """A request in the format of `python -m benchmarks.simulate --trace`, and its outcome."""
    request = outcome.request
    return {
        "offset": round(request.offset, 6),
        "size": request.kind.size,
        "steps": request.kind.steps,
        "deadline": request.deadline,
        "priority": "normal",
        "latency": outcome.latency and round(outcome.latency, 6),
        "status": outcome.status,
    }
