"""A simulated engine, one forward at a time, to test policies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stepweave.planning.cost import CostModel
from stepweave.scheduling.policy import Cap, Policy
from stepweave.scheduling.task import Demand, Key, Load, Priority, Task

# called before each forward with the time and the tasks
Watch = Callable[[float, Sequence[Task]], None]

# Seconds per denoising step of Qwen-Image with CFG on one H200, published by others; issue 6
QWEN = {
    Key("transformer", 512 * 512): {1: 0.167, 2: 0.183, 3: 0.186, 4: 0.240, 8: 0.425, 16: 0.832},
    Key("transformer", 1024 * 1024): {1: 0.243, 2: 0.474, 3: 0.711},
}
SMALL, LARGE = QWEN


@dataclass(eq=False)
class Call:
    """A call that waits for a forward."""

    key: Hashable
    rows: int
    cost: Key
    task: Task
    since: float = 0.0  # when it began to wait


def task(
    cost: CostModel,
    *steps: Load,
    count: int = 1,
    before: Iterable[Load] = (),
    after: Iterable[Load] = (),
    arrived: float = 0.0,
    priority: Priority = Priority.NORMAL,
    deadline: float | None = None,
) -> Task:
    """A task of `count` steps, each with the loads `steps`."""
    demand = Demand(count, tuple(before), tuple(steps), tuple(after))
    made = Task(demand, arrived=arrived, priority=priority, deadline=deadline)
    made.price(cost)
    return made


def queued(tasks: Iterable[Task]) -> OrderedDict[Hashable, list[Call]]:
    """The tasks' next steps by key, waiting since their tasks arrived."""
    queues: OrderedDict[Hashable, list[Call]] = OrderedDict()
    for one in tasks:
        load = one.demand.step[0]
        queues.setdefault(load.key, []).append(
            Call(load.key, load.rows, load.key, one, one.arrived)
        )
    return queues


def play(
    tasks: Sequence[Task],
    policy: Policy,
    cost: CostModel,
    cap: Cap,
    *,
    start: float = 0.0,
    watch: Watch = lambda now, inside: None,
) -> list[float]:
    """The end of each task, if forwards take the seconds of the cost model."""
    coming = sorted(tasks, key=lambda one: one.arrived, reverse=True)
    calls: dict[Task, Iterator[Load]] = {}
    # the key that was served longest ago first
    queues: OrderedDict[Hashable, list[Call]] = OrderedDict()
    ends: dict[Task, float] = {}
    now = start

    def advance(one: Task, since: float) -> None:
        load = next(calls[one], None)
        if load is None:
            del calls[one]
            ends[one] = now
        else:
            queues.setdefault(load.key, []).append(Call(load.key, load.rows, load.key, one, since))

    def admit() -> None:
        while coming and coming[-1].arrived <= now:
            one = coming.pop()
            calls[one] = _calls(one)
            advance(one, one.arrived)

    while coming or queues:
        if not queues:
            now = max(now, coming[-1].arrived)
            admit()
            continue
        watch(now, list(calls))
        picked = policy.choose(queues, now, cap, cost)
        queue = queues.pop(picked[0].key)
        rest = [call for call in queue if call not in picked]
        assert picked and len(rest) == len(queue) - len(picked), "not a subset of one queue"
        if rest:
            queues[picked[0].key] = rest
        now += cost.seconds(picked[0].cost, sum(call.rows for call in picked))
        admit()
        for call in picked:
            call.task.begun = True
            advance(call.task, now)
    return [ends[one] for one in tasks]


def _calls(one: Task) -> Iterator[Load]:
    """Yield the remaining calls of a task, and update its progress."""
    if not one.opened:
        yield from _each(one.demand.before)
    one.opened = True
    while one.left:
        yield from _each(one.demand.step)
        one.done += 1
    yield from _each(one.demand.after)


def _each(loads: Iterable[Load]) -> Iterator[Load]:
    for load in loads:
        for _ in range(int(load.calls)):
            yield load
