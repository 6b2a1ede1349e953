"""What was tried against the default policy and lost; docs/experiments.md says by how much.

Each is the default with one rule changed: `VARIANTS` gives their names to `python -m benchmarks.simulate --policies`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepweave.scheduling.cost import CostModel
from stepweave.scheduling.policy import (
    DUE,
    FIRST,
    WASTE,
    Cap,
    Policy,
    Queues,
    Rank,
    Request,
    _fill,
    _overdue,
    _price,
    patience,
    rank,
)
from stepweave.scheduling.task import Task

Price = Callable[[Sequence[Request], int, Cap, CostModel], float]


def no_price(group: Sequence[Request], others: int, cap: Cap, cost: CostModel) -> float:
    return 1.0


def per_completion(group: Sequence[Request], others: int, cap: Cap, cost: CostModel) -> float:
    """A row's seconds in the group over its seconds alone: the lowest rank has the most completions per second."""
    return _row_seconds(group, cost) / cost.seconds(group[0].cost, 1) if _in_steps(group) else 1.0


def to_fill(group: Sequence[Request], others: int, cap: Cap, cost: CostModel) -> float:
    """A row's seconds in the group over its seconds in a full one, whether others wait or not."""
    most = max(group[0].rows, cap(group[0]))
    full = cost.seconds(group[0].cost, most) / most
    return max(1.0, _row_seconds(group, cost) / full) if _in_steps(group) else 1.0


def _row_seconds(group: Sequence[Request], cost: CostModel) -> float:
    rows = sum(request.rows for request in group)
    return cost.seconds(group[0].cost, rows) / rows


def _in_steps(group: Sequence[Request]) -> bool:
    return group[0].task.opened and group[0].task.left > 0


@dataclass(frozen=True)
class Rules:
    """What a variant minds; as they stand, the default policy."""

    price: Price = _price  # what a group's remaining work is multiplied by
    aging: float = 0  # power of 1 + age / time alone that remaining work is divided by
    sticky: float = 1  # factor of the key that ran last
    idle: float = (
        0  # with nothing else to do, a job waits so long for another to share its first step: times its time alone
    )
    brief: float = 0  # a group that takes at most this share of the one whose turn it is goes before it
    full_time: bool = False  # overdue jobs have all of the engine's time, the oldest first, instead of half
    every_deadline: bool = False  # all deadlines that can be met come first, whether they press or not


def pick(rules: Rules, queues: Queues[Request], now: float, cap: Cap, cost: CostModel) -> list[Request]:
    """The group of the lowest rank, within a key the lowest first."""
    waiting = sum(map(len, queues.values()))
    overdue = None if rules.full_time else _overdue(queues, now, cap, cost)
    groups: list[tuple[Rank, list[Request]]] = []
    last = next(reversed(list(queues)))
    for key, queue in queues.items():
        ranks = {id(request): ranked(request.task, now, rules) for request in queue}
        if overdue is not None and overdue.key == key:
            ranks[id(overdue)] = FIRST
        group = _fill(sorted(queue, key=lambda request: ranks[id(request)]), cap)
        first = ranks[id(group[0])]
        if first[0] >= 0 and first[1] != DUE:
            factor = rules.price(group, waiting - len(queue), cap, cost) * (rules.sticky if key == last else 1)
            first = (*first[:2], first[2] * factor, first[3])
        groups.append((first, group))
    best, group = min(groups, key=lambda one: one[0])
    if rules.brief and best[0] >= 0:
        seconds = {id(one): cost.seconds(one[0].cost, sum(r.rows for r in one)) for _, one in groups}
        short = [one for _, one in groups if seconds[id(one)] <= rules.brief * seconds[id(group)]]
        group = min(short, key=lambda one: seconds[id(one)], default=group)
    task = group[0].task
    if len(queues) == 1 and not task.begun and now - task.arrived < rules.idle * task.solo:
        waste = (_price(group, 1, cap, cost) - 1) / WASTE
        return [] if waste > 0.5 else group
    return group


def ranked(task: Task, now: float, rules: Rules) -> Rank:
    if rules.full_time and task.lost(now) > patience(task):
        return (-1.0, task.arrived)
    if rules.every_deadline and task.deadline is not None and now + task.remaining <= task.deadline:
        return (task.priority, DUE, task.deadline, task.arrived)
    first = rank(task, now)
    if first[1] == DUE:
        return first
    age = max(0.0, now - task.arrived) / max(task.solo, 1e-9)
    return (*first[:2], first[2] / (1 + age) ** rules.aging, first[3])


def variant(rules: Rules) -> Policy:
    return functools.partial(pick, rules)


VARIANTS: dict[str, Policy] = {
    "remaining": variant(Rules(price=no_price)),
    "remaining_aged": variant(Rules(price=no_price, aging=1)),
    "completions": variant(Rules(price=per_completion)),
    "fill": variant(Rules(price=to_fill)),
    "thrifty_aged": variant(Rules(aging=1)),
    "sticky": variant(Rules(sticky=0.7)),
    "idle": variant(Rules(idle=0.5)),
    "brief": variant(Rules(brief=0.1)),
    "full_time": variant(Rules(full_time=True)),
    "every_deadline": variant(Rules(every_deadline=True)),
}
