"""Runs what is missing, and writes the tables."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Mapping

from benchmarks.ladder import install, tables
from benchmarks.ladder.arguments import parse
from benchmarks.ladder.client import Sender, closed_loop, open_loop
from benchmarks.ladder.contestants import OURS, Contestant, contestants, forwards_of, versions
from benchmarks.ladder.fleet import Fleet
from benchmarks.ladder.floor import Forwards, floor
from benchmarks.ladder.images import References
from benchmarks.ladder.runs import CLIENTS, Run, Store, figures, plan
from benchmarks.ladder.scenarios import SCENARIOS, closed, poisson
from benchmarks.locust.arguments import some_of
from benchmarks.measure import Report, environment, load_average
from benchmarks.serving.client import BenchmarkError
from benchmarks.serving.report import progress

SETTINGS = ("requests", "limit", "seconds", "drain", "checks", "threads")


async def measure(
    arguments: argparse.Namespace, store: Store, everyone: Mapping[str, Contestant]
) -> None:
    """Run what is missing until the time is over. A contestant that fails is left out until the
    next start; `failures.json` says why."""
    until = time.monotonic() + 3600 * arguments.hours
    references = References(store.folder / "references", arguments.threads)
    failures: dict[str, str] = {}
    store.keep("failures", failures)
    able = [name for name, contestant in everyone.items() if not contestant.why_not]
    scenarios = [SCENARIOS[name] for name in arguments.scenarios]
    missing = [run for run in plan(scenarios, arguments.seeds, able) if not store.has(run)]
    with Fleet(store.folder, arguments.threads) as fleet:
        for number, run in enumerate(missing, 1):
            if time.monotonic() > until:
                progress(f"the time is over, with {len(missing) - number + 1} runs missing")
                break
            if run.contestant in failures:
                continue
            contestant = everyone[run.contestant]
            try:
                await one(run, contestant, arguments, store, fleet, references)
            except BenchmarkError as error:
                progress(f"{run.name}: {error}")
                failures[run.contestant] = str(error).splitlines()[0]
                store.keep("failures", failures)
                fleet.drop(contestant)
            progress(f"{number} of {len(missing)} runs")


async def one(
    run: Run,
    contestant: Contestant,
    arguments: argparse.Namespace,
    store: Store,
    fleet: Fleet,
    references: References,
) -> None:
    """Measure one run, and keep its figures."""
    is_open = run.scenario.capacity_of is not None
    rate = store.rate(run.scenario) if is_open else None
    if rate is not None:
        requests = poisson(run.scenario, run.seed, rate, arguments.seconds)
    elif is_open:
        raise BenchmarkError(f"no closed loop of {run.scenario.mix} gives a rate for it")
    else:
        requests = closed(run.scenario, run.seed, arguments.requests)
    checked = [request.body for request in requests[: arguments.checks]]
    references.make(checked)
    send = Sender(contestant, frozenset(checked))
    async with fleet.turn(contestant) as turn:
        load, before = load_average(), turn.cpu()
        forwards = Forwards(forwards_of(fleet.temporary))
        outcomes = (
            await open_loop(turn.client, requests, turn.check, send, drain=arguments.drain)
            if is_open
            else await closed_loop(
                turn.client, requests, turn.check, send, clients=CLIENTS, limit=arguments.limit
            )
        )
        after = turn.cpu()
    found = figures(outcomes, arguments.seconds if is_open else None)
    done = found["sent"] - found["failed"]
    if contestant.name == OURS and done:
        same, best = floor(forwards.counts(), arguments.threads)
        elapsed = done / found["throughput"]
        found |= {"floor": same / elapsed, "best floor": best / elapsed}
    found |= {
        "rate": rate,
        "cpu": None if before is None or after is None or not done else (after - before) / done,
        "wrong": references.wrong(send.images),
        "checked": len(send.images),
        "load_average": load,
        "load_average_after": load_average(),
        "environment": environment(),
    }
    store.add(run, found)
    progress(
        f"{run.name}: {found['sent']} sent, {found['failed']} failed, {found['throughput']:.2f} "
        f"images/s, mean {found['mean'] or 0:.2f} s, {found['wrong']} wrong"
        + (", overloaded" if found["overloaded"] else "")
    )


def report(arguments: argparse.Namespace, store: Store, everyone: Mapping[str, Contestant]) -> None:
    records = store.records()
    summary = Report(
        store.folder / "summary.json",
        settings=store.kept("settings"),
        versions=store.kept("versions"),
    )
    rates = store.kept("rates")
    found = tables.parts(records, everyone, rates, store.kept("failures"))
    for name, part in found.items():
        runs = [
            {key: value for key, value in record.items() if key != "requests"}
            for record in records
            if record["scenario"] == name
        ]
        summary.add(name, part, runs=runs, rate=rates.get(name))
    summary.close()


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped
    store = Store(arguments.out)
    try:
        if arguments.install and not arguments.tables:
            install.install()
        python = arguments.environment or install.python()
        everyone = contestants(python, arguments.diffusers_checkout, dict(arguments.url))
        if not arguments.tables:
            if arguments.contestants:
                names = some_of(everyone)(",".join(arguments.contestants))
                everyone = {name: everyone[name] for name in names}
            store.keep_settings({name: getattr(arguments, name) for name in SETTINGS})
            store.keep(
                "versions",
                {"own": versions(None)} | ({"other": versions(python)} if python else {}),
            )
            asyncio.run(measure(arguments, store, everyone))
        report(arguments, store, everyone)
    except (BenchmarkError, argparse.ArgumentTypeError) as error:
        print(f"benchmarks.ladder: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.ladder: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
