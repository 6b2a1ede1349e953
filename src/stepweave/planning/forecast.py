"""Predicts when jobs will be done, by a simulation with the policy's order and the cost model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import islice

from stepweave.planning.cost import CostModel
from stepweave.scheduling.policy import Rank, srpt
from stepweave.scheduling.task import Demand, Task

Order = Callable[[Task, float], Rank]
RowCap = Callable[[Demand], int]  # the most rows of a step that such jobs share; 0: none do

RUN = 2000  # ranks that are sorted at a time
BREATH = 16  # jobs between pauses, for less than 1 ms; a pause may take 0.1 ms


def running_first(order: Order) -> Order:
    """An order for whole calls: those that run come first, since they are not interrupted."""
    return lambda task, now: (not task.begun, *order(task, now))


def in_order(ranks: Sequence[Rank], pause: Callable[[], object] = lambda: None) -> list[int]:
    """The indices of ranks, lowest first. Python's sort blocks all threads, so it sorts runs of
    RUN, with pauses, and merges them at the end."""
    runs: list[int] = []
    for begin in range(0, len(ranks), RUN):
        runs += sorted(range(begin, min(begin + RUN, len(ranks))), key=ranks.__getitem__)
        pause()
    return sorted(runs, key=ranks.__getitem__)


def forecast(
    tasks: Sequence[Task],
    now: float,
    cost: CostModel,
    cap: RowCap,
    order: Order = srpt.rank,
    pause: Callable[[], object] = lambda: None,
) -> list[float]:
    """Predict the seconds from now until each task is done, if no others arrive.

    The order is that of now. The first task runs with the following ones that share its steps, up
    to the cap, until one of them is done; then the group is filled again. O(tasks x rows of a
    step). `pause` is called regularly, to let other threads run.
    """
    ordered = in_order([order(task, now) for task in tasks], pause)
    # copied, since the engine's thread may change the tasks
    demands = [task.demand for task in tasks]
    adapters = [max((load.key.adapters for load in one.step), default=0) for one in demands]
    left = [task.left for task in tasks]
    joined = [task.opened for task in tasks]
    ends = [0.0] * len(tasks)
    queues: dict[Hashable, list[int]] = {}
    least: dict[Hashable, int] = {}  # the fewest rows of a task, by kind
    for i in ordered:
        kind = demands[i].kind
        queues.setdefault(kind, []).append(i)
        least[kind] = min(demands[i].rows, least.get(kind, demands[i].rows))
    time = 0.0
    for number, first in enumerate(ordered):
        if number % BREATH == 0:
            pause()
        demand = demands[first]
        queue, most, smallest = queues[demand.kind], cap(demand), least[demand.kind]
        while not ends[first]:
            group, rows = _group(queue, demands, most, smallest)
            for i in group:
                if not joined[i]:
                    joined[i] = True
                    time += tasks[i].before
            steps = min(left[i] for i in group)
            if steps:
                dearest = demands[max(group, key=adapters.__getitem__)]
                time += steps * step_seconds(dearest, rows, cost)
            for i in group:
                left[i] -= steps
                if left[i] <= 0:
                    time += tasks[i].after
                    ends[i] = max(time, 1e-9)
                    queue.remove(i)
    return ends


def _group(
    queue: Sequence[int], demands: Sequence[Demand], most: int, smallest: int
) -> tuple[list[int], int]:
    group, rows = [queue[0]], demands[queue[0]].rows
    for i in islice(queue, 1, None):
        if rows + smallest > most:
            break
        if rows + demands[i].rows <= most:
            group.append(i)
            rows += demands[i].rows
    return group, rows


def step_seconds(demand: Demand, rows: int, cost: CostModel) -> float:
    """Seconds of a step with this many rows in total; a job's calls in a step run one after
    another, each shared."""
    return sum(
        load.calls * cost.seconds(load.key, max(1, rows * load.rows // demand.rows))
        for load in demand.step
    )
