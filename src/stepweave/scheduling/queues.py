"""Calls that wait for a forward: one queue for each key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, TypeVar

from stepweave.scheduling.task import Key, Task


class WaitingCall(Protocol):
    """A job's call of a module, as far as scheduling is concerned."""

    @property
    def key(self) -> Hashable: ...  # equal for calls that may share a forward
    @property
    def rows(self) -> int: ...
    @property
    def cost(self) -> Key: ...  # key of the cost model
    @property
    def task(self) -> Task: ...  # of its job
    @property
    def since(self) -> float: ...  # when it began to wait


CallT = TypeVar("CallT", bound=WaitingCall)
Queues = Mapping[Hashable, Sequence[CallT]]


def cost_of(calls: Sequence[WaitingCall]) -> Key:
    """The key of a forward of calls that share one: that of a call with the most adapters."""
    return max((call.cost for call in calls), key=lambda key: key.adapters)


class CallQueues(OrderedDict[Hashable, list[CallT]]):
    """A queue for each key, the one that was served longest ago first; no call waits for another
    key's queue to empty."""

    def add(self, call: CallT) -> None:
        self.setdefault(call.key, []).append(call)

    def remove(self, call: CallT) -> None:
        self[call.key].remove(call)
        if not self[call.key]:
            del self[call.key]

    def take(self, calls: Sequence[CallT]) -> None:
        """Remove calls of one key, and move their queue behind the others."""
        queue = self.pop(calls[0].key)
        taken = set(map(id, calls))
        rest = [call for call in queue if id(call) not in taken]
        if rest:
            self[calls[0].key] = rest
