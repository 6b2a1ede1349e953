"""Jobs as scheduling sees them: their work, and how much of it remains."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

AGING_THRESHOLD = 60.0  # seconds of delay after which a job is overdue ...
AGING_THRESHOLD_SOLO = 4.0  # ... or this many times its duration alone, if that is longer


class Priority(IntEnum):
    """All jobs of a lower number go before those of a higher one."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Key(NamedTuple):
    """The key of a forward in the cost model; its rows are given apart."""

    module: str
    size: int  # elements of a row's sample, which are proportional to its tokens
    adapters: int = 0  # the most, such as LoRAs, that a row has

    @property
    def plain(self) -> Key:
        """The same without adapters."""
        return self._replace(adapters=0) if self.adapters else self


class Load(NamedTuple):
    """A number of equal calls of one module."""

    key: Key
    rows: int
    calls: float = 1


@dataclass(frozen=True)
class Demand:
    """A job's calls: before its first denoising step, in each step, and after the last."""

    steps: int = 0
    before: tuple[Load, ...] = ()
    step: tuple[Load, ...] = ()
    after: tuple[Load, ...] = ()
    # what else must be equal for steps to share forwards, such as width and height
    group: Hashable = None

    @property
    def kind(self) -> Hashable:  # equal for jobs whose steps may share forwards
        return (self.group, *(load.key.plain for load in self.step))

    @property
    def rows(self) -> int:
        """Rows of a step's first module."""
        return self.step[0].rows if self.step else 1


class Prices(Protocol):
    def alone(self, loads: tuple[Load, ...]) -> float:
        """Seconds of these calls if they share no forward."""


@dataclass(eq=False, slots=True, kw_only=True)
class Task:
    """A job's arrival, priority, deadline, demand and progress. Times are seconds of one clock."""

    demand: Demand = field(default=Demand(), kw_only=False)
    arrived: float = 0.0
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    begun: bool = False  # its first forward has started
    opened: bool = False  # its calls before the first step are done
    done: int = 0  # steps
    # seconds on an idle engine: in total, before the steps, for each step, and after them
    solo: float = field(default=0.0, init=False)
    before: float = field(default=0.0, init=False)
    step: float = field(default=0.0, init=False)
    after: float = field(default=0.0, init=False)

    def price(self, prices: Prices) -> None:
        """Calculate its seconds on an idle engine, at the current prices."""
        demand, alone = self.demand, prices.alone
        self.before, self.step, self.after = map(alone, (demand.before, demand.step, demand.after))
        self.solo = self.before + self.demand.steps * self.step + self.after

    @property
    def left(self) -> int:
        """Steps still to do."""
        return max(0, self.demand.steps - self.done)

    @property
    def remaining(self) -> float:
        """Seconds that the rest would take on an idle engine."""
        return (0.0 if self.opened else self.before) + self.left * self.step + self.after

    def delay(self, now: float) -> float:
        """Seconds since its arrival, less those of the work that is done."""
        return now - self.arrived - (self.solo - self.remaining)

    def overdue(self, now: float) -> bool:
        """Whether its delay has passed the aging threshold, so it goes before other jobs."""
        return self.delay(now) > max(AGING_THRESHOLD, AGING_THRESHOLD_SOLO * self.solo)
