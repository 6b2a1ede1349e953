"""Duration of forecasts of many jobs, and delays of an event loop meanwhile: `python -m
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
    """Jobs of two sizes, with 4 to 50 steps and guidance."""
    dice = random.Random(seed)
    tasks = []
    for i in range(count):
        key = dice.choice(KEYS)
        tasks.append(
            Task(
                Demand(dice.randint(4, 50), step=(Load(key, 2),), group=key.size), arrived=i * 1e-6
            )
        )
        tasks[-1].price(COST)
    return tasks


def plan_of(tasks: list[Task]) -> Plan:
    def pause() -> None:
        time.sleep(0)

    ends = forecast(tasks, 1.0, COST, lambda demand: ROWS, srpt.rank, pause)
    return Plan(1.0, [str(i) for i in range(len(tasks))], tasks, ends, srpt.rank, pause=pause)


async def held(work: Callable[[], object]) -> float:
    """The loop's longest delay in seconds while a thread does the work."""
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
        "| jobs | forecast | longest delay of the loop | delay without it | estimate of one job "
        "| its median error |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for count in COUNTS:
        tasks, later = jobs(count), jobs(20, seed=2)
        for task in later:
            task.arrived = 1.0
        solo = [
            task.before + task.left * step_seconds(task.demand, ROWS, COST) + task.after
            for task in later
        ]
        began = time.perf_counter()
        plan = plan_of(tasks)
        whole = time.perf_counter() - began
        began = time.perf_counter()
        estimates = [
            plan.finish(task, seconds, 1.0) for task, seconds in zip(later, solo, strict=True)
        ]
        fitted = (time.perf_counter() - began) / len(later)
        exact = [forecast([*tasks, task], 1.0, COST, lambda demand: ROWS)[-1] for task in later[:5]]
        errors = sorted(abs(a - b) / b for a, b in zip(estimates, exact, strict=False))
        away = asyncio.run(held(partial(plan_of, tasks)))
        otherwise = asyncio.run(held(partial(time.sleep, whole)))
        print(
            f"| {count} | {1e3 * whole:.1f} | {1e3 * away:.1f} | {1e3 * otherwise:.1f} | "
            f"{1e3 * fitted:.3f} | {errors[2]:.1%} |"
        )


if __name__ == "__main__":
    main()
