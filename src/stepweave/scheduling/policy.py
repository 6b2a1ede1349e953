"""Policies: which of the calls that wait share the next forward. Each is a pure function of the
queues and the time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar

from stepweave.planning.cost import CostModel
from stepweave.scheduling.task import Key, Task


class Request(Protocol):
    """A call that waits for a forward."""

    key: Hashable  # equal for calls that may share one
    rows: int
    cost: Key
    task: Task
    since: float  # when it began to wait


RequestT = TypeVar("RequestT", bound=Request)
Queues = Mapping[Hashable, Sequence[RequestT]]  # by key; the key that was served longest ago first
Cap = Callable[[Any], int]  # the most rows of a forward with a request
Policy = Callable[[Queues[Any], float, Cap, CostModel], list[Any]]
Rank = tuple[float, ...]

PATIENCE = 60.0  # seconds that a job may lose to others before it is overdue ...
PATIENCE_SOLO = 4.0  # ... or so many times what it takes alone, if that is longer
OTHERS = 1.0  # seconds that others have for each that an overdue job has
SLACK = 4.0  # times the remaining work; with less of it to spare a deadline counts
# how much a half-empty forward counts against its jobs, for each call of another key that waits
# meanwhile
WASTE = 3.0
DUE, WITHOUT, LATE = 0, 1, 2


def patience(task: Task) -> float:
    """Seconds that a job may lose to others before it is overdue."""
    return max(PATIENCE, PATIENCE_SOLO * task.solo)


def rank(task: Task, now: float) -> Rank:
    """The order of the default policy, lowest first: class, then deadlines that press, then
    remaining work, then what is late.

    A deadline presses once what can be spared is less than four times the remaining work; of those
    that press and can be met, the earliest comes first. Least remaining work first: Schrage, A
    Proof of the Optimality of the Shortest Remaining Processing Time Discipline, 1968.
    """
    remaining = task.remaining
    if task.deadline is not None:
        slack = task.deadline - now - remaining
        if slack < 0:
            return (task.priority, LATE, remaining, task.arrived)
        if slack <= SLACK * remaining:
            return (task.priority, DUE, task.deadline, task.arrived)
    return (task.priority, WITHOUT, remaining, task.arrived)


def thrifty(queues: Queues[RequestT], now: float, cap: Cap, cost: CostModel) -> list[RequestT]:
    """The default: the best-ranked call with others of its key, up to the cap, where half-empty
    forwards count as more work.

    What a forward wastes against a full one delays every other call that waits, so a job whose step
    would be run half-empty lets others go first, the longer the more there are; meanwhile others of
    its kind may come. Without that, least remaining work first would be at its worst where batches
    pay most. If there is room beside the chosen step, those that can join it go first with what
    they need before, such as the encoding of prompts.

    A job that has lost more time to others than its patience is overdue. The overdue job that came
    first goes before class and deadline once it has waited as long as its forward takes: about half
    of the time, or every second forward if others' are longer, and all of it if others want none.
    So each of its forwards ends within twice its seconds and one forward of others; a job is done,
    from the first forward after it became overdue, within the sum of that over its own forwards
    that are left and those of all that came before it and are still there, at the cost of full
    groups.
    """
    oldest = _overdue(queues, now, cap)
    if oldest and now - oldest[0].since >= OTHERS * cost.seconds(oldest[0].cost, _rows(oldest)):
        return oldest
    waiting = sum(map(len, queues.values()))
    groups: list[tuple[Rank, list[RequestT]]] = []
    for queue in queues.values():
        ranks = {id(request): rank(request.task, now) for request in queue}
        group = _fill(sorted(queue, key=lambda request: ranks[id(request)]), cap)
        first = ranks[id(group[0])]
        if first[1] != DUE:
            first = (
                *first[:2],
                first[2] * _price(group, waiting - len(queue), cap, cost),
                first[3],
            )
        groups.append((first, group))
    groups.sort(key=lambda ranked: ranked[0])
    best = groups[0][1]
    task, room = best[0].task, cap(best[0]) - _rows(best)
    if task.opened and task.left and room > 0:
        for _, group in groups[1:]:
            other = group[0].task
            if not other.opened and other.kind == task.kind and other.demand.rows <= room:
                return group
    return best


def _overdue(queues: Queues[RequestT], now: float, cap: Cap) -> list[RequestT]:
    """The group of the overdue job that came first; empty if none is overdue."""
    late = (
        one
        for one in chain.from_iterable(queues.values())
        if one.task.lost(now) > patience(one.task)
    )
    oldest = min(late, key=lambda request: request.task.arrived, default=None)
    if oldest is None:
        return []
    others = (request for request in queues[oldest.key] if request is not oldest)
    return _fill([oldest, *sorted(others, key=lambda request: rank(request.task, now))], cap)


def _rows(group: Sequence[Request]) -> int:
    return max(1, sum(request.rows for request in group))


def _price(group: Sequence[Request], others: int, cap: Cap, cost: CostModel) -> float:
    """What the remaining work of a group's first job is multiplied by."""
    first = group[0]
    if not others or not (first.task.opened and first.task.left):
        return 1.0  # what is encoded or decoded is so once, for all steps
    own, rows = _rows([first]), _rows(group)
    most = max(own, cap(first))
    alone = cost.seconds(first.cost, own) / own
    waste = cost.seconds(first.cost, rows) / rows - cost.seconds(first.cost, most) / most
    return 1 + WASTE * others * max(0.0, waste) / max(alone, 1e-9)


def aged_rank(task: Task, now: float) -> Rank:
    """Overdue jobs by arrival; then as `rank`, but by aged remaining work, and with every deadline
    that can be met first."""
    if task.lost(now) > patience(task):
        return (-1, 0, task.arrived, task.arrived)
    remaining = task.remaining
    aged = remaining / (1 + max(0.0, now - task.arrived) / max(task.solo, 1e-9))
    if task.deadline is None:
        return (task.priority, WITHOUT, aged, task.arrived)
    if now + remaining <= task.deadline:
        return (task.priority, DUE, task.deadline, task.arrived)
    return (task.priority, LATE, aged, task.arrived)


def aged(queues: Queues[RequestT], now: float, cap: Cap, cost: CostModel) -> list[RequestT]:
    """The call with the least remaining work, less with age, with others of its key."""
    ranks = {
        id(request): aged_rank(request.task, now)
        for request in chain.from_iterable(queues.values())
    }
    first = min(chain.from_iterable(queues.values()), key=lambda request: ranks[id(request)])
    return _fill(sorted(queues[first.key], key=lambda request: ranks[id(request)]), cap)


def fifo(queues: Queues[RequestT], now: float, cap: Cap, cost: CostModel) -> list[RequestT]:
    """As peers do it: jobs join the running batch in order of arrival while they are of its kind;
    the first that is not, or for which there is no room, holds up all behind it until the batch has
    ended."""
    requests = sorted(
        chain.from_iterable(queues.values()), key=lambda request: request.task.arrived
    )
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
    "thrifty": thrifty,
    "aged": aged,
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
