"""Jobs that have started, and how many may have at a time."""

from __future__ import annotations

from stepweave.batching.call import Call
from stepweave.compat.own_state import OwnState, OwnTypes
from stepweave.compat.snapshot import Given
from stepweave.engine.fiber import Fiber
from stepweave.engine.job import Job

RECOVERY = 20  # jobs that end, before one more may run at a time


class Active:
    """A job that has started: its fiber, and what the fiber waits for."""

    __slots__ = (
        "_given",
        "call",
        "elsewhere",
        "evicted",
        "fiber",
        "job",
        "refused",
        "starved",
        "told",
        "__weakref__",
    )

    def __init__(self, job: Job, fiber: Fiber) -> None:
        self.job = job
        self.fiber = fiber
        self.call: Call | None = None  # that stands in a queue
        self.elsewhere = False  # its work is on another thread
        self.starved: Call | None = None  # that waits for other jobs to leave the memory
        # it ends, to start again: for want of memory, or since what it was given is in doubt
        self.evicted = False
        self.told = 0  # to end, so many times
        self.refused = False  # the modules are no longer as they were
        self._given = Given(*job.args, *job.kwargs.values())

    @property
    def repeatable(self) -> bool:
        """Whether its call can begin anew: it has written to no tensor that it was given."""
        return not self._given.overwritten()

    def own_state(self) -> tuple[str, str] | None:
        """Why its calls must run alone, if its own code has changed modules that it shares with
        others: a code and a text."""
        for one in self.fiber.own:
            if isinstance(one, OwnState) and one:
                return self.job.scope.wrote(one, self.job)  # type: ignore[no-any-return]
            if isinstance(one, OwnTypes) and one:
                return "cast", "the job's pipeline casts a module for a while"
        return None

    def reset(self) -> None:
        """Have the job be as it was before it started."""
        self._given.put_back()
        self.job.restart()


class Crowd:
    """How many jobs may run at a time: fewer than `most` for a while after that many did not fit
    into memory."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ended = 0
        self.limit = most

    def shrink(self, limit: int) -> None:
        self.limit, self._ended = limit, 0

    def ended(self) -> None:
        """Note that a job has ended."""
        self._ended += 1
        if self._ended >= RECOVERY and self.limit < self._most:
            self.limit, self._ended = self.limit + 1, 0
