"""Calls that wait for a forward: one queue for each key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any


class CallQueues:
    """One queue for each key, so that no call waits for another key's queue to empty."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Hashable, list[Any]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, call: Any) -> None:
        self._queues.setdefault(call.key, []).append(call)

    def remove(self, call: Any) -> None:
        """Forget a call."""
        queue = self._queues[call.key]
        queue.remove(call)
        if not queue:
            del self._queues[call.key]

    def by_key(self) -> Mapping[Hashable, Sequence[Any]]:
        """The queues, the one that was served longest ago first."""
        return self._queues

    def take(self, calls: Sequence[Any]) -> None:
        """Take calls of one key out, and put their queue behind the others."""
        queue = self._queues.pop(calls[0].key)
        taken = set(map(id, calls))
        rest = [call for call in queue if id(call) not in taken]
        if rest:
            self._queues[calls[0].key] = rest
