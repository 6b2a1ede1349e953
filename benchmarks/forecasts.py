"""How long forecasts of many jobs take, and how long they hold up an event loop: `python -m
benchmarks.forecasts`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial

from stepweave.planning.cost import CostModel
from stepweave.planning.forecast import forecast, step_seconds
from stepweave.planning.plan import Plan
from stepweave.scheduling.policy import srpt
from stepweave.scheduling.task import Demand, Key, Load, Task
from stepweave.threads import DaemonExecutor, on_thread

COUNTS = (64, 128, 1000, 5000, 20_000)
ROWS = 32
KEYS = Key("transformer", 64), Key("transformer", 256)
COST = CostModel.of(
    {
        KEYS[0]: {1: 0.1, 2: 0.12, 4: 0.2, 8: 0.35, 16: 0.6, 32: 1.2},
        KEYS[1]: {1: 0.2, 4: 0.7, 8: 1.4},
    }
)


def jobs(count: int, seed: int = 1) -> list[Task]:
    """Of two sizes, of 4 to 50 steps, with guidance."""
    dice = random.Random(seed)
    made = []
    for i in range(count):
        key = dice.choice(KEYS)
        made.append(
            Task(
                Demand(dice.randint(4, 50), step=(Load(key, 2),), group=key.size), arrived=i * 1e-6
            )
        )
        made[-1].price(COST)
    return made


def plan_of(tasks: list[Task]) -> Plan:
    def pause() -> None:
        time.sleep(0)

    ends = forecast(tasks, 1.0, COST, lambda demand: ROWS, srpt.rank, pause)
    return Plan(1.0, [str(i) for i in range(len(tasks))], tasks, ends, srpt.rank, pause=pause)


async def held(work: Callable[[], object]) -> float:
    """Seconds for which the loop was away at most while a thread did the work."""
    thread, most = DaemonExecutor(1, "forecast"), 0.0
    working = asyncio.ensure_future(on_thread(thread, work))
    while not working.done():
        before = time.perf_counter()
        await asyncio.sleep(0)
        most = max(most, time.perf_counter() - before)
    thread.shutdown()
    return most


def main() -> None:
    """Print a table, in milliseconds."""
    print(
        "| jobs | forecast | the loop is away at most | without it | one fitted in | its error, "
        "median |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for count in COUNTS:
        tasks, later = jobs(count), jobs(20, seed=2)
        for one in later:
            one.arrived = 1.0
        own = [
            one.before + one.left * step_seconds(one.demand, ROWS, COST) + one.after
            for one in later
        ]
        began = time.perf_counter()
        plan = plan_of(tasks)
        whole = time.perf_counter() - began
        began = time.perf_counter()
        told = [plan.finish(one, seconds, 1.0) for one, seconds in zip(later, own, strict=True)]
        fitted = (time.perf_counter() - began) / len(later)
        exact = [forecast([*tasks, one], 1.0, COST, lambda demand: ROWS)[-1] for one in later[:5]]
        errors = sorted(abs(a - b) / b for a, b in zip(told, exact, strict=False))
        away = asyncio.run(held(partial(plan_of, tasks)))
        otherwise = asyncio.run(held(partial(time.sleep, whole)))
        print(
            f"| {count} | {1e3 * whole:.1f} | {1e3 * away:.1f} | {1e3 * otherwise:.1f} | "
            f"{1e3 * fitted:.3f} | {errors[2]:.1%} |"
        )


if __name__ == "__main__":
    main()
