"""What planning reads and writes of jobs; of their calls it is what scheduling does."""

from __future__ import annotations

from typing import Any, Protocol

from stepweave.planning.profiles import Recorder, Shape
from stepweave.scheduling.task import Priority, Task


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
    recorder: Recorder  # of the calls that it makes
    shape: Shape
    task: Task

    @property
    def deadline(self) -> float | None:
        """When it must be done."""

    @property
    def begun(self) -> float | None:
        """When it was given its first forward."""

    @property
    def opened(self) -> float | None:
        """When its denoising steps began."""

    @property
    def stepped(self) -> float | None:
        """When its last step had run."""

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and in all; (0, 0) until its pipeline says how many."""

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""

    def begin(self) -> None:
        """Note that it is given a forward."""
