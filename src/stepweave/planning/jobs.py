"""What planning reads and writes of jobs and of their calls."""

from __future__ import annotations

from typing import Any, Protocol

from stepweave.planning.profiles import Recorder, Shape
from stepweave.scheduling.queues import WaitingCall
from stepweave.scheduling.task import Priority, Task


class PlannedCall(WaitingCall, Protocol):
    """`Planner.saw` sets `since`, `Planner.pick` `cap`."""

    cap: int  # rows that its forward may have


class PlannedJob(Protocol):
    """Times are seconds of the monotonic clock. `Planner.enter` sets `shape` and `task`."""

    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scheduler: Any
    scope: Any  # whose `pipeline` it calls
    priority: Priority
    reproducible: bool
    accepted: float
    deadline: float | None
    begun: float | None  # when it was given its first forward
    opened: float | None  # when its denoising steps began
    stepped: float | None  # when its last step had run
    recorder: Recorder  # of the calls that it makes
    shape: Shape | None
    task: Task

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and in all; (0, 0) until its pipeline says how many."""

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""

    def begin(self) -> None:
        """Note that it is given a forward."""
