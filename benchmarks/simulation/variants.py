"""What was tried against the default policy and lost; docs/experiments.md says by how much.

Each is the default's own code with a rule changed: `VARIANTS` gives their names to `python -m
benchmarks.simulate --policies`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable, Sequence
from typing import Any

from stepweave.planning.cost import CostModel
from stepweave.scheduling import policy
from stepweave.scheduling.policy import DUE, Cap, Policy, Queues, Rank, Request, rank, thrifty
from stepweave.scheduling.task import Task

STICKY = 0.7  # factor of the remaining work of those whose key ran last
IDLE = 0.5  # times the time alone


def changed(**rules: Any) -> Policy:
    """The default policy of a copy of its module in which some names stand for something else."""
    if unknown := rules.keys() - vars(policy).keys():
        raise AttributeError(f"the policies know no {', '.join(unknown)}")
    spec = importlib.util.find_spec(policy.__name__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    vars(copy).update(rules)
    default: Policy = copy.thrifty
    return default


def per_completion(group: Sequence[Request], others: int, cap: Cap, cost: CostModel) -> float:
    """A row's seconds in the group over its seconds alone: the lowest rank has the most completions
    per second."""
    return (
        _row_seconds(group, cost) / cost.seconds(group[0].cost, 1)
        if _in_steps(group[0].task)
        else 1.0
    )


def to_fill(group: Sequence[Request], others: int, cap: Cap, cost: CostModel) -> float:
    """A row's seconds in the group over its seconds in a full one, whether others wait or not."""
    return 1 + _waste(group, cap, cost) if _in_steps(group[0].task) else 1.0


def aged_remaining(task: Task, now: float) -> Rank:
    age = max(0.0, now - task.arrived) / max(task.solo, 1e-9)
    return _scaled(rank(task, now), 1 / (1 + age))


def sticky() -> Policy:
    """Those whose key ran last are preferred."""
    last: Hashable = None

    def preferred(task: Task, now: float) -> Rank:
        return _scaled(rank(task, now), STICKY if task.kind == last else 1)

    default = changed(rank=preferred)

    def pick(queues: Queues[Request], now: float, cap: Cap, cost: CostModel) -> list[Request]:
        nonlocal last
        last = list(queues.values())[-1][0].task.kind
        return default(queues, now, cap, cost)

    return pick


def idle(queues: Queues[Request], now: float, cap: Cap, cost: CostModel) -> list[Request]:
    """With nothing else to do, a job waits a while for another to share its first step, if that
    pays."""
    group = thrifty(queues, now, cap, cost)
    task = group[0].task
    waits = len(queues) == 1 and not task.begun and now - task.arrived < IDLE * task.solo
    return [] if waits and _waste(group, cap, cost) > 1 else group


def _scaled(first: Rank, factor: float) -> Rank:
    return first if first[1] == DUE else (*first[:2], first[2] * factor, *first[3:])


def _in_steps(task: Task) -> bool:
    return task.opened and task.left > 0


def _waste(group: Sequence[Request], cap: Cap, cost: CostModel) -> float:
    """What a row takes longer in the group than in a full one, as a share of the latter."""
    most = max(group[0].rows, cap(group[0]))
    return max(0.0, _row_seconds(group, cost) / (cost.seconds(group[0].cost, most) / most) - 1)


def _row_seconds(group: Sequence[Request], cost: CostModel) -> float:
    rows = sum(request.rows for request in group)
    return cost.seconds(group[0].cost, rows) / rows


VARIANTS: dict[str, Policy] = {
    "remaining": changed(WASTE=0.0),  # no price for waste
    "remaining_aged": changed(WASTE=0.0, rank=aged_remaining),
    "thrifty_aged": changed(rank=aged_remaining),
    "completions": changed(_price=per_completion),
    "fill": changed(_price=to_fill),
    "sticky": sticky(),
    "idle": idle,
    "full_time": changed(OTHERS=0.0),  # the oldest overdue job has all of the time
    # all deadlines that can be met come first, whether they press or not
    "every_deadline": changed(SLACK=1e9),
}
