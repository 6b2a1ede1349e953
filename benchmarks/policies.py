"""Policies to compare the default with, in the simulator and on the real server."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from stepweave.scheduling.policy import (
    HOPELESS,
    UNHURRIED,
    URGENT,
    Cap,
    Cost,
    Policy,
    Rank,
    fill,
    srpt,
)
from stepweave.scheduling.queues import CallT, Queues
from stepweave.scheduling.task import Task


class Aged:
    """Least remaining work first, discounted by age; overdue jobs and deadlines that can be met
    come before."""

    cuts_at_knee = True

    def rank(self, task: Task, now: float) -> Rank:
        if task.overdue(now):
            return (-1, 0, task.arrived, task.arrived)
        remaining = task.remaining
        aged = remaining / (1 + max(0.0, now - task.arrived) / max(task.solo, 1e-9))
        if task.deadline is None:
            return (task.priority, UNHURRIED, aged, task.arrived)
        if now + remaining <= task.deadline:
            return (task.priority, URGENT, task.deadline, task.arrived)
        return (task.priority, HOPELESS, aged, task.arrived)

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        ranks = {id(call): self.rank(call.task, now) for call in _calls(queues)}
        first = min(_calls(queues), key=lambda call: ranks[id(call)])
        return fill(sorted(queues[first.key], key=lambda call: ranks[id(call)]), cap)


class KeyedFIFO:
    """First come, first served, batched with others of the same key."""

    cuts_at_knee = False

    def rank(self, task: Task, now: float) -> Rank:
        return (task.arrived,)

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        first = min(_calls(queues), key=_arrived)
        return fill(sorted(queues[first.key], key=_arrived), cap)


class RoundRobin(KeyedFIFO):
    """Keys take turns; within a key, first come, first served."""

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        return fill(sorted(next(iter(queues.values())), key=_arrived), cap)


class FIFO(KeyedFIFO):
    """As in other servers: jobs join the running batch in order of arrival; the first that is of
    another kind, or does not fit, blocks all behind it until the batch has ended."""

    def choose(self, queues: Queues[CallT], now: float, cap: Cap, cost: Cost) -> list[CallT]:
        calls = sorted(_calls(queues), key=_arrived)
        batch = [call for call in calls if call.task.begun] or calls[:1]
        first = batch[0]
        rows, most = sum(call.rows for call in batch), cap(first)
        for call in calls:
            if call.task.begun or call is first:
                continue
            if call.task.demand.kind != first.task.demand.kind or rows + call.rows > most:
                break
            batch.append(call)
            rows += call.rows
        return fill([call for call in batch if call.key == first.key], cap)


aged, fifo, keyed_fifo, round_robin = Aged(), FIFO(), KeyedFIFO(), RoundRobin()
POLICIES: dict[str, Policy] = {
    "srpt": srpt,
    "aged": aged,
    "fifo": fifo,
    "keyed_fifo": keyed_fifo,
    "round_robin": round_robin,
}


def _calls(queues: Queues[CallT]) -> Iterable[CallT]:
    return chain.from_iterable(queues.values())


def _arrived(call: CallT) -> float:
    return call.task.arrived
