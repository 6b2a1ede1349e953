"""Calls that wait for a forward: one queue for each key, and whose turn it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from stepweave.engine.call import Call


class CallQueues:
    """Keys take turns, so that no call waits for another key's queue to empty; within a key the oldest job goes first."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Hashable, list[Call]] = OrderedDict()  # the next to serve first

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, call: Call) -> None:
        self._queues.setdefault(call.key, []).append(call)

    def remove(self, call: Call) -> None:
        """Forget a call."""
        queue = self._queues[call.key]
        queue.remove(call)
        if not queue:
            del self._queues[call.key]

    def pick(self, limit: Callable[[Call], int]) -> list[Call]:
        """Calls of the key whose turn it is, the oldest job's first, of at most `limit` rows in all, but at least one call."""
        queue = sorted(next(iter(self._queues.values())), key=lambda call: call.age)
        picked, rows, most = [queue[0]], queue[0].rows, limit(queue[0])
        for call in queue[1:]:
            if rows + call.rows > most:
                break
            picked.append(call)
            rows += call.rows
        return picked

    def take(self, calls: Sequence[Call]) -> None:
        """Take calls of one key out, and let the other keys go first now."""
        queue = self._queues.pop(calls[0].key)
        taken = set(map(id, calls))
        rest = [call for call in queue if id(call) not in taken]
        if rest:
            self._queues[calls[0].key] = rest
