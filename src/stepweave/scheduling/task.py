"""Jobs as scheduling sees them: what they ask of the model, and how much of it is left."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

AGING_THRESHOLD = 60.0  # seconds of delay after which a job is overdue ...
AGING_THRESHOLD_SOLO = 4.0  # ... or as many times what it takes alone, if that is longer


class Priority(IntEnum):
    """All jobs of a lower number go before those of a higher one."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Key(NamedTuple):
    """What the seconds of a forward depend on, besides its rows."""

    module: str
    size: int  # elements of a row's sample, which are proportional to its tokens


class Load(NamedTuple):
    """Calls of a module, all alike."""

    key: Key
    rows: int
    calls: float = 1


@dataclass(frozen=True)
class Demand:
    """What a job asks of the modules: before its first denoising step, in each, and after the
    last."""

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


class Prices(Protocol):
    def alone(self, loads: tuple[Load, ...]) -> float:
        """Seconds of calls that share no forward."""


@dataclass(eq=False, slots=True, kw_only=True)
class Task:
    """A job: when it came, its priority and deadline, its demand, and how far it is. Times are
    seconds of one clock."""

    demand: Demand = field(default=Demand(), kw_only=False)
    arrived: float = 0.0
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    begun: bool = False  # it has been given a forward
    opened: bool = False  # its first step may run: what comes before is done
    done: int = 0  # steps
    # seconds that it takes alone: in all, before its steps, in each of them, and after
    solo: float = field(default=0.0, init=False)
    before: float = field(default=0.0, init=False)
    step: float = field(default=0.0, init=False)
    after: float = field(default=0.0, init=False)

    def price(self, prices: Prices) -> None:
        """Work out, or correct, how many seconds it takes alone."""
        demand, alone = self.demand, prices.alone
        self.before, self.step, self.after = map(alone, (demand.before, demand.step, demand.after))
        self.solo = self.before + self.demand.steps * self.step + self.after

    @property
    def left(self) -> int:
        """Steps still to do."""
        return max(0, self.demand.steps - self.done)

    @property
    def remaining(self) -> float:
        """Seconds that the rest would take alone."""
        return (0.0 if self.opened else self.before) + self.left * self.step + self.after

    def delay(self, now: float) -> float:
        """Seconds since it came in which it made no progress, as far as steps tell."""
        return now - self.arrived - (self.solo - self.remaining)

    def overdue(self, now: float) -> bool:
        """Whether it has waited so long for others that it goes before them."""
        return self.delay(now) > max(AGING_THRESHOLD, AGING_THRESHOLD_SOLO * self.solo)
