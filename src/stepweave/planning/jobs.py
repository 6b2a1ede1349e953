"""The attributes of jobs that planning reads and writes."""

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
    scope: Any  # its `pipeline` is called
    priority: Priority
    reproducible: bool
    adapters_wanted: int  # how many it has named
    accepted: float
    recorder: Recorder  # of the calls that it makes
    shape: Shape
    task: Task

    @property
    def deadline(self) -> float | None: ...
    @property
    def could_start(self) -> float | None: ...  # since when; None while its adapters are read
    @property
    def begun(self) -> float | None: ...  # start of its first forward
    @property
    def opened(self) -> float | None: ...  # start of its denoising steps
    @property
    def stepped(self) -> float | None: ...  # end of its latest step
    @property
    def progress(self) -> tuple[int, int]: ...  # steps done, and in total
    @property
    def late(self) -> bool: ...
    def begin(self) -> None:
        """Note that a forward starts."""
