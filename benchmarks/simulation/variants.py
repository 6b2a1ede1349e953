"""Policies that were tried against the default; docs/experiments.md says what came.

All are one function with other rules: `VARIANTS` gives their names to `python -m benchmarks.simulate --policies`.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from stepweave.scheduling.cost import CostModel
from stepweave.scheduling.policy import Cap, Policy, Rank, Request, patience
from stepweave.scheduling.task import Task


class Waiting(Request, Protocol):
    since: float  # when it began to wait


@dataclass(frozen=True)
class Rules:
    """What a variant minds. Without any: classes, deadlines, then the least remaining work."""

    aging: float = 0  # power of 1 + age / solo that remaining work is divided by
    waste: float = 0  # remaining work counts more by so many times what its group wastes, for each call of another key
    fill: float = 0  # power of the group's seconds per row, as a multiple of a full group's, that it is multiplied by
    completions: bool = False  # rank groups by completions per second
    sticky: float = 1  # factor of the key that ran last
    idle: float = 0  # with nothing else to do, a new job waits for another so long, as a share of its solo time
    half: bool = False  # the oldest overdue job has half of the time instead of all
    brief: float = 0  # what takes at most this share of the forward whose turn it is goes before it
    steal: float | None = None  # a deadline counts once slack is less than so many times the remaining work


def pick(
    rules: Rules, queues: Mapping[Hashable, Sequence[Waiting]], now: float, cap: Cap, cost: CostModel
) -> list[Waiting]:
    """The group of the lowest rank, within a key the lowest first."""
    waiting = sum(map(len, queues.values()))
    oldest = overdue(queues, now)
    if rules.half and oldest is not None and not due(oldest, queues[oldest.key], now, cap, cost):
        oldest = None
    groups: list[tuple[Rank, list[Waiting]]] = []
    for key, queue in queues.items():
        ranks = {id(call): rank(call.task, now, rules, late=not rules.half) for call in queue}
        if oldest is not None and oldest.key == key:
            ranks[id(oldest)] = (-1,)
        ordered = sorted(queue, key=lambda call: ranks[id(call)])
        candidates = fill(ordered, cap)
        first = ranks[id(candidates[0])]
        price = factor(rules, candidates, waiting - len(queue), cap, cost)
        price *= rules.sticky if key == next(reversed(list(queues))) else 1
        whole = (*first[:3], first[3] * price) if len(first) > 3 and first[2] else first
        groups.append((whole, candidates))
    best, group = min(groups, key=lambda ranked: ranked[0])
    if rules.brief and best[0] == 1:
        most = rules.brief * seconds(group, cost)
        group = min(
            (one for _, one in groups if seconds(one, cost) <= most), key=lambda one: seconds(one, cost), default=group
        )
    if rules.idle and len(queues) == 1 and waste(group, cap, cost) > 0.5:
        task = group[0].task
        if not task.begun and now - task.arrived < rules.idle * task.solo:
            return []
    return group


def rank(task: Task, now: float, rules: Rules, late: bool) -> Rank:
    """As the default's, but what only counts within a class comes last."""
    if late and task.lost(now) > patience(task):
        return (0, task.arrived)
    remaining = task.remaining
    score = remaining / (1 + (now - task.arrived) / task.solo) ** rules.aging
    if task.deadline is None:
        return (1, task.priority, 1, score)
    slack = task.deadline - now - remaining
    if slack < 0:
        return (1, task.priority, 2, score)
    if rules.steal is not None and slack > rules.steal * remaining:
        return (1, task.priority, 1, score)
    return (1, task.priority, 0, task.deadline)


def overdue(queues: Mapping[Hashable, Sequence[Waiting]], now: float) -> Waiting | None:
    """The call of the oldest job that lost more time than its patience."""
    late = (call for call in chain.from_iterable(queues.values()) if call.task.lost(now) > patience(call.task))
    return min(late, key=lambda call: call.task.arrived, default=None)


def due(call: Waiting, queue: Sequence[Waiting], now: float, cap: Cap, cost: CostModel) -> bool:
    """Whether it has waited as long as its next forward takes: then others have had half of the time."""
    rows = min(sum(other.rows for other in queue), cap(call))
    return now - call.since >= cost.seconds(call.cost, rows)


def seconds(group: Sequence[Waiting], cost: CostModel) -> float:
    return cost.seconds(group[0].cost, sum(call.rows for call in group))


def waste(group: Sequence[Waiting], cap: Cap, cost: CostModel) -> float:
    """What a row costs in the group beyond what it costs in a full one, as a share of what it costs alone."""
    key, most = group[0].cost, cap(group[0])
    rows = sum(call.rows for call in group)
    alone = cost.seconds(key, group[0].rows) / group[0].rows
    return max(0.0, cost.seconds(key, rows) / rows - cost.seconds(key, most) / most) / max(alone, 1e-9)


def factor(rules: Rules, group: Sequence[Waiting], others: int, cap: Cap, cost: CostModel) -> float:
    """What the remaining work of a group's first job is multiplied by."""
    task = group[0].task
    if not (rules.waste or rules.fill or rules.completions) or not (task.opened and task.left):
        return 1  # what is encoded and decoded has its price, too, but is once for all steps
    key, most = group[0].cost, cap(group[0])
    rows = sum(call.rows for call in group)
    price, full = cost.seconds(key, rows) / rows, cost.seconds(key, most) / most
    if rules.completions:
        return price / cost.seconds(key, 1)
    return float((1 + rules.waste * others * waste(group, cap, cost)) * (price / full) ** rules.fill)


def fill(ordered: Sequence[Waiting], cap: Cap) -> list[Waiting]:
    """The first, and those after it that fit beside."""
    group, rows, most = [ordered[0]], ordered[0].rows, cap(ordered[0])
    for call in ordered[1:]:
        if rows + call.rows <= most:
            group.append(call)
            rows += call.rows
    return group


def variant(rules: Rules) -> Policy:
    return functools.partial(pick, rules)


VARIANTS: dict[str, Policy] = {
    "remaining": variant(Rules()),
    "completions": variant(Rules(aging=1, completions=True)),
    "sticky": variant(Rules(aging=1, sticky=0.7)),
    "fill": variant(Rules(aging=1, fill=1)),
    "fill_idle": variant(Rules(aging=1, fill=1, idle=0.5)),
    "half": variant(Rules(aging=1, half=True)),
    "thrifty_aged": variant(Rules(aging=1, waste=3, half=True)),
    "thrifty": variant(Rules(waste=3, half=True)),
    "thrifty_steal": variant(Rules(waste=3, half=True, steal=4)),
    "thrifty_brief": variant(Rules(waste=3, half=True, steal=4, brief=0.1)),
}
