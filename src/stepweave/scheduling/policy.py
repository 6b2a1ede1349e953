"""Policies: which of the calls that wait share the next forward. Each is a pure function of the queues and the time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar

from stepweave.scheduling.cost import CostModel
from stepweave.scheduling.task import Key, Task


class Request(Protocol):
    """A call that waits for a forward."""

    key: Hashable  # equal for calls that may share one
    rows: int
    cost: Key
    task: Task


RequestT = TypeVar("RequestT", bound=Request)
Queues = Mapping[Hashable, Sequence[RequestT]]  # by key; the key that was served longest ago first
Cap = Callable[[Any], int]  # the most rows of a forward with a request
Policy = Callable[[Queues[Any], float, Cap, CostModel], list[Any]]
Rank = tuple[float, ...]

PATIENCE = 60.0  # seconds that a job may lose to others before it goes first, whatever its class and deadline ...
PATIENCE_SOLO = 4.0  # ... or so many times what it takes alone, if that is longer
BRIEF = 0.1  # a forward goes first if it takes at most this share of the one whose turn it would be


def rank(task: Task, now: float) -> Rank:
    """The order of the default policy, lowest first.

    Jobs that lost more time to others than `patience` says, the oldest first; then by class; within a class those that can meet
    their deadline, the earliest first, then those without one by aged remaining work, then those that are late.

    Aged remaining work is that of Schrage's shortest remaining time first (1968), made smaller with the age as a share of what
    the job takes alone, so that a long one comes to its turn.
    """
    if task.lost(now) > patience(task):
        return (0, 0, 0, task.arrived, task.arrived)
    remaining = task.remaining
    if task.deadline is None:
        return (1, task.priority, 1, aged(task, remaining, now), task.arrived)
    if now + remaining <= task.deadline:
        return (1, task.priority, 0, task.deadline, task.arrived)
    return (1, task.priority, 2, aged(task, remaining, now), task.arrived)


def patience(task: Task) -> float:
    """Seconds that a job may lose to others before it goes before all that came later, and all that have not lost so much.

    So it ends at the latest when, after that, it and those that came before it and are still there have had all their forwards,
    one after another, each at the cost of a full group; and one more, that was running.
    """
    return max(PATIENCE, PATIENCE_SOLO * task.solo)


def aged(task: Task, remaining: float, now: float) -> float:
    """Remaining seconds, less with age."""
    return remaining / (1 + max(0.0, now - task.arrived) / max(task.solo, 1e-9))


def aged_remaining(queues: Queues[RequestT], now: float, cap: Cap, cost: CostModel) -> list[RequestT]:
    """The default: the best-ranked call with others of its key, up to the cap.

    Before that goes what others need before their first step or after their last one, such as the encoding of prompts, if that is
    brief beside it, or if they can then join it.
    """
    ranks = {id(request): rank(request.task, now) for request in chain.from_iterable(queues.values())}
    groups = [
        _fill(sorted(queue, key=lambda request: ranks[id(request)]), cap) for queue in queues.values()
    ]  # fmt: skip
    groups.sort(key=lambda group: ranks[id(group[0])])
    first = groups[0]
    if ranks[id(first[0])][0] == 0:
        return first  # nothing comes before a job that has waited too long
    seconds, task = _seconds(first, cost), first[0].task
    room = cap(first[0]) - sum(request.rows for request in first) if task.opened else 0
    for group in groups[1:]:
        other = group[0].task
        if other.opened and other.left:
            continue  # a step: brief as it may be, many follow
        joins = not other.opened and other.kind == task.kind and other.demand.rows <= room
        if joins or 0 < _seconds(group, cost) <= BRIEF * seconds:
            return group
    return first


def fifo(queues: Queues[RequestT], now: float, cap: Cap, cost: CostModel) -> list[RequestT]:
    """As peers do it: jobs join the running batch in order of arrival while they are of its kind; the first that is not, or for
    which there is no room, holds up all behind it until the batch has ended."""
    requests = sorted(chain.from_iterable(queues.values()), key=lambda request: request.task.arrived)
    batch = [request for request in requests if request.task.begun] or requests[:1]
    rows, most = sum(request.rows for request in batch), cap(batch[0])
    for request in requests:
        if request.task.begun or request is batch[0]:
            continue
        if request.task.kind != batch[0].task.kind or rows + request.rows > most:
            break
        batch.append(request)
        rows += request.rows
    return _fill([request for request in batch if request.key == batch[0].key], cap)


def keyed_fifo(queues: Queues[RequestT], now: float, cap: Cap, cost: CostModel) -> list[RequestT]:
    """The oldest job's call with others of its key, the oldest first."""
    first = min(chain.from_iterable(queues.values()), key=lambda request: request.task.arrived)
    return _fill(_by_arrival(queues[first.key]), cap)


def round_robin(queues: Queues[RequestT], now: float, cap: Cap, cost: CostModel) -> list[RequestT]:
    """Keys take turns; within a key the oldest job goes first."""
    return _fill(_by_arrival(next(iter(queues.values()))), cap)


POLICIES: dict[str, Policy] = {
    "aged": aged_remaining,
    "fifo": fifo,
    "keyed_fifo": keyed_fifo,
    "round_robin": round_robin,
}


def _by_arrival(queue: Iterable[RequestT]) -> list[RequestT]:
    return sorted(queue, key=lambda request: request.task.arrived)


def _fill(queue: Sequence[RequestT], cap: Cap) -> list[RequestT]:
    """The first request, whatever its rows, and those after it that fit beside."""
    group, rows, most = [queue[0]], queue[0].rows, cap(queue[0])
    for request in queue[1:]:
        if rows >= most:
            break
        if rows + request.rows <= most:
            group.append(request)
            rows += request.rows
    return group


def _seconds(group: Sequence[Request], cost: CostModel) -> float:
    return cost.seconds(group[0].cost, sum(request.rows for request in group))
