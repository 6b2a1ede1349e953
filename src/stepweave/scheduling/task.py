"""Jobs as the scheduler sees them: what they ask for, and what is left of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol


class Priority(IntEnum):
    """Classes; all jobs of a lower number go before those of a higher one."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Key(NamedTuple):
    """What a forward's seconds depend on, besides its rows."""

    module: str
    size: int  # elements of a row's sample, which are proportional to its tokens


class Load(NamedTuple):
    """Calls of a module, all alike."""

    key: Key
    rows: int
    calls: float = 1


@dataclass(frozen=True)
class Demand:
    """What a job asks of the modules: before its first denoising step, in each of its steps, and
    after the last one."""

    steps: int = 0
    before: tuple[Load, ...] = ()
    step: tuple[Load, ...] = ()
    after: tuple[Load, ...] = ()
    # what else must be equal for steps to share forwards, such as width and height
    group: Hashable = None

    @property
    def kind(self) -> Hashable:
        """Equal for jobs whose steps may share forwards."""
        return (self.group, *(load.key for load in self.step))

    @property
    def rows(self) -> int:
        """Of a step's first module."""
        return self.step[0].rows if self.step else 1


NOTHING = Demand()


class Prices(Protocol):
    def alone(self, loads: tuple[Load, ...]) -> float:
        """Seconds of calls that share no forward."""


class Task:
    """A job: when it came, its class and deadline (both times on one clock, in seconds), its
    demand, and how far it is."""

    __slots__ = (
        "after",
        "arrived",
        "before",
        "begun",
        "deadline",
        "demand",
        "done",
        "opened",
        "priority",
        "solo",
        "step",
    )

    def __init__(
        self,
        demand: Demand = NOTHING,
        *,
        arrived: float = 0.0,
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
    ) -> None:
        self.demand = demand
        self.arrived = arrived
        self.priority = priority
        self.deadline = deadline
        self.begun = False  # it has been given a forward
        self.opened = False  # its first step may run: what comes before is done
        self.done = 0  # steps
        # seconds alone: in all, before, of a step, after
        self.solo = self.before = self.step = self.after = 0.0

    def price(self, cost: Prices) -> None:
        """Work out, or correct, how many seconds the task takes alone."""
        demand = self.demand
        self.before, self.step, self.after = (
            cost.alone(loads) for loads in (demand.before, demand.step, demand.after)
        )
        self.solo = self.before + demand.steps * self.step + self.after

    @property
    def left(self) -> int:
        """Steps still to do."""
        return max(0, self.demand.steps - self.done)

    @property
    def remaining(self) -> float:
        """Seconds that the rest would take alone."""
        return (0.0 if self.opened else self.before) + self.left * self.step + self.after

    @property
    def kind(self) -> Hashable:
        """Equal for tasks whose steps may share forwards."""
        return self.demand.kind

    def lost(self, now: float) -> float:
        """Seconds since it came in which it did not get on, as far as its progress tells."""
        return now - self.arrived - (self.solo - self.remaining)
