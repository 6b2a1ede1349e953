"""Variants of the default policy that were tried and are worse (docs/experiments.md has the
figures); `VARIANTS` are their names for `python -m benchmarks.simulate --policies`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from stepweave.scheduling.policy import URGENT, Cap, Cost, Policy, Rank, WasteAwareSRPT
from stepweave.scheduling.queues import CallT, Queues, WaitingCall
from stepweave.scheduling.task import Task

STICKY = 0.7  # factor of the remaining work of jobs whose key ran last
IDLE = 0.5  # longest wait for others, as a multiple of the time alone


class PerCompletion(WasteAwareSRPT):
    """Ranks by a row's seconds in the group relative to those alone: completions per second."""

    def waste_factor(
        self, group: Sequence[WaitingCall], others: int, cap: Cap, cost: Cost
    ) -> float:
        alone = cost.seconds(group[0].cost, 1)
        return _row_seconds(group, cost) / alone if _in_steps(group[0].task) else 1.0


class ToFill(WasteAwareSRPT):
    """Ranks by a row's seconds in the group relative to a full one, even if no others wait."""

    def waste_factor(
        self, group: Sequence[WaitingCall], others: int, cap: Cap, cost: Cost
    ) -> float:
        return 1 + _waste(group, cap, cost) if _in_steps(group[0].task) else 1.0


class AgedRemaining(WasteAwareSRPT):
    """Discounts remaining work by age."""

    def rank(self, task: Task, now: float) -> Rank:
        age = max(0.0, now - task.arrived) / max(task.solo, 1e-9)
        return _scaled(super().rank(task, now), 1 / (1 + age))


@dataclass
class _Last:
    kind: Hashable = None


@dataclass(frozen=True)
class Sticky(WasteAwareSRPT):
    """Prefers jobs whose key ran last."""

    last: _Last = field(default_factory=_Last)

    def rank(self, task: Task, now: float) -> Rank:
        factor = STICKY if task.demand.kind == self.last.kind else 1
        return _scaled(super().rank(task, now), factor)

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        self.last.kind = list(queues.values())[-1][0].task.demand.kind
        return super().choose(queues, now, cap, cost)


class Idle(WasteAwareSRPT):
    """Lets a job on an idle engine wait for another to share its first step, if that pays."""

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        group = super().choose(queues, now, cap, cost)
        task = group[0].task
        waits = len(queues) == 1 and not task.begun and now - task.arrived < IDLE * task.solo
        return [] if waits and _waste(group, cap, cost) > 1 else group


def _scaled(first: Rank, factor: float) -> Rank:
    return first if first[1] == URGENT else (*first[:2], first[2] * factor, *first[3:])


def _in_steps(task: Task) -> bool:
    return task.opened and task.left > 0


def _waste(group: Sequence[WaitingCall], cap: Cap, cost: Cost) -> float:
    """Additional seconds of a row in the group, relative to its seconds in a full group."""
    most = max(group[0].rows, cap(group[0]))
    return max(0.0, _row_seconds(group, cost) / (cost.seconds(group[0].cost, most) / most) - 1)


def _row_seconds(group: Sequence[WaitingCall], cost: Cost) -> float:
    rows = sum(call.rows for call in group)
    return cost.seconds(group[0].cost, rows) / rows


VARIANTS: dict[str, Policy] = {
    "remaining": WasteAwareSRPT(waste_weight=0.0),  # no price for waste
    "remaining_aged": AgedRemaining(waste_weight=0.0),
    "srpt_aged": AgedRemaining(),
    "completions": PerCompletion(),
    "fill": ToFill(),
    "sticky": Sticky(),
    "idle": Idle(),
    "full_time": WasteAwareSRPT(others_share=0.0),  # the oldest overdue job gets all the time
    # all deadlines that can be met come first, even if they are not urgent
    "every_deadline": WasteAwareSRPT(urgency=1e9),
}
