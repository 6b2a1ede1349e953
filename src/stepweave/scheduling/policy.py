"""Which calls share the next forward: waste-aware shortest remaining time first (SRPT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from stepweave.scheduling.queues import CallT, Queues, WaitingCall, cost_of
from stepweave.scheduling.task import Key, Task

Rank = tuple[float, ...]  # the lowest goes first
Cap = Callable[[Any], int]  # the largest number of rows of a forward with a call

URGENT, UNHURRIED, HOPELESS = 0, 1, 2  # order by deadline, among jobs of one priority


class Cost(Protocol):
    def seconds(self, key: Key, rows: int) -> float:
        """Seconds of a forward of this many rows."""


@runtime_checkable
class Policy(Protocol):
    """The type of `StepEngine(policy=...)`: pure functions, so that they can be simulated."""

    @property
    def cuts_at_knee(self) -> bool:
        """Whether forwards have no more rows than pay."""

    def rank(self, task: Task, now: float) -> Rank:
        """The rank by which jobs start, and are predicted to run."""

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        """Choose at least one call, and others of its key while their rows are within its limit."""


@dataclass(frozen=True)
class WasteAwareSRPT:
    """The default: priority, then urgent deadlines, then the least remaining work, where jobs whose
    forward would run half-empty count as longer.

    A half-empty forward takes longer for each row than a full one, and that waste delays all other
    calls. So remaining work is multiplied by 1 + waste_weight * waste * others. Calls after the
    last step, such as decoding, wait for those of jobs that end soon, if sharing a forward saves
    others more seconds than the wait costs. docs/scheduling.md has an example of both.

    Waiting is bounded: the oldest overdue job (`Task.overdue`) goes before all others once it has
    waited as long as its forward takes, so it gets at least half of the time.

    Source: Schrage, A Proof of the Optimality of the Shortest Remaining Processing Time Discipline,
    1968.
    """

    waste_weight: float = 3.0
    urgency: float = 4.0  # a deadline is urgent if less than this many times the work is spare
    gather_weight: float = 2.0  # what a second of others counts against one of a job that waits
    others_share: float = 1.0  # seconds of others for each second of the oldest overdue job
    cuts_at_knee: bool = True

    def rank(self, task: Task, now: float) -> Rank:
        """Among jobs of one priority: urgent deadlines, the earliest first; then the least
        remaining work; last, jobs that can no longer meet their deadlines."""
        remaining = task.remaining
        spare = float("inf") if task.deadline is None else task.deadline - now - remaining
        if spare < 0:
            return (task.priority, HOPELESS, remaining, task.arrived)
        if task.deadline is not None and spare <= self.urgency * remaining:
            return (task.priority, URGENT, task.deadline, task.arrived)
        return (task.priority, UNHURRIED, remaining, task.arrived)

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        calls = list(chain.from_iterable(queues.values()))
        if len(queues) == 1 and rows_of(calls) <= cap(calls[0]):
            return self._group(calls, now, cap)  # all of them: there is nothing to weigh
        if overdue := [call for call in calls if call.task.overdue(now)]:
            oldest = min(overdue, key=lambda call: call.task.arrived)
            group = self._group(queues[oldest.key], now, cap, oldest)
            seconds = cost.seconds(cost_of(group), rows_of(group))
            if now - oldest.since >= self.others_share * seconds:
                return group

        def weighted(group: list[CallT]) -> Rank:
            priority, deadline, amount, arrived = self.rank(group[0].task, now)
            if deadline != URGENT:
                others = len(calls) - len(queues[group[0].key])
                amount *= self.waste_factor(group, others, cap, cost)
            return (priority, deadline, amount, arrived)

        groups = sorted((self._group(queue, now, cap) for queue in queues.values()), key=weighted)
        while len(groups) > 1 and self._gathers(groups[0], groups[1], len(calls), now, cap, cost):
            del groups[0]
        return _joining(groups, cap) or groups[0]

    def _gathers(
        self, last: list[CallT], steps: list[CallT], waiting: int, now: float, cap: Cap, cost: Cost
    ) -> bool:
        """Whether the calls `last`, after their jobs' last steps, wait for those of jobs whose
        `steps` are next."""
        task, first = last[0].task, steps[0]
        priority, deadline, *_ = self.rank(task, now)
        if not task.opened or task.left or not (first.task.opened and first.task.left):
            return False
        if deadline == URGENT or priority != first.task.priority:
            return False
        key, rows, more = last[0].cost, rows_of(last), 0
        alone, forward = cost.seconds(key, rows), cost.seconds(cost_of(steps), rows_of(steps))
        # a step may have several forwards
        forward *= max(1.0, first.task.step / max(cost.seconds(first.cost, first.rows), 1e-9))
        worth, room = self.gather_weight * (waiting - len(last)), cap(last[0]) - rows
        for one in sorted((call.task for call in steps), key=lambda one: one.left):
            wait = len(last) * one.left * forward
            more += sum(load.rows for load in one.demand.after if load.key == key)
            if more > room or wait >= worth * alone:
                return False
            saved = alone + cost.seconds(key, more) - cost.seconds(key, rows + more)
            if more and worth * saved > wait:
                return True
        return False

    def waste_factor(
        self, group: Sequence[WaitingCall], others: int, cap: Cap, cost: Cost
    ) -> float:
        """The factor by which the remaining work of a group's first job is multiplied."""
        first = group[0]
        if not others or not (first.task.opened and first.task.left):
            return 1.0  # only steps repeat: encoding and decoding happen once a job
        own, rows, key = rows_of([first]), rows_of(group), cost_of(group)
        full = max(own, cap(first))
        alone = cost.seconds(first.cost, own) / own
        waste = cost.seconds(key, rows) / rows - cost.seconds(key, full) / full
        return 1 + self.waste_weight * others * max(0.0, waste) / max(alone, 1e-9)

    def _group(
        self, queue: Sequence[CallT], now: float, cap: Cap, first: CallT | None = None
    ) -> list[CallT]:
        def order(call: CallT) -> tuple[bool, Rank]:
            return call is not first, self.rank(call.task, now)

        return fill(sorted(queue, key=order), cap)


srpt = WasteAwareSRPT()


def rows_of(group: Sequence[WaitingCall]) -> int:
    return max(1, sum(call.rows for call in group))


def fill(queue: Sequence[CallT], cap: Cap) -> list[CallT]:
    """The first call, whatever its rows, and the following ones that fit within its limit, and
    within their own if they have more adapters."""
    group, rows, most = [queue[0]], queue[0].rows, cap(queue[0])
    adapters = queue[0].cost.adapters
    for call in queue[1:]:
        if rows >= most:
            break
        own = most if call.cost.adapters <= adapters else min(most, cap(call))
        if rows + call.rows <= own:
            group.append(call)
            rows, most, adapters = rows + call.rows, own, max(adapters, call.cost.adapters)
    return group


def _joining(groups: Sequence[list[CallT]], cap: Cap) -> list[CallT] | None:
    """A group whose first job will be able to join the steps of the best group, which has room,
    once its calls before the first step, such as encoding, are done."""
    best, *others = groups
    task, room = best[0].task, cap(best[0]) - rows_of(best)
    for group in others if task.opened and task.left else ():
        other, kind = group[0].task, task.demand.kind
        if not other.opened and other.demand.rows <= room and other.demand.kind == kind:
            return group
    return None
