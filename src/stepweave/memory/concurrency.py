"""How many jobs may run at a time, and which one is preempted when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from stepweave.batching.call import Attempt
from stepweave.memory.microbatch import WaitForMemory

logger = logging.getLogger(__name__)

RECOVERY = 20  # jobs that must end before the limit rises by one


class Preempt:
    """The answer to a job that must restart after the others, to free its memory."""


class MemoryJob(Protocol):
    """A running job, as far as memory is concerned."""

    waiting_for_memory: WaitForMemory | None  # until other jobs free theirs

    @property
    def accepted(self) -> float: ...  # time of submission, in seconds
    def restartable(self) -> bool: ...


JobT = TypeVar("JobT", bound=MemoryJob)


class ConcurrencyLimit:
    """How many jobs may run at a time: fewer than `most` for a while after memory ran out."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ended = 0
        self.limit = most

    def shrink(self, limit: int) -> None:
        self.limit, self._ended = limit, 0

    def ended(self) -> None:
        """Count a job that has ended."""
        self._ended += 1
        if self._ended >= RECOVERY and self.limit < self._most:
            self.limit, self._ended = self.limit + 1, 0

    def retry_or_preempt(self, jobs: Sequence[JobT]) -> Iterator[tuple[JobT, Any]]:
        """Yield answers to jobs that all wait for memory: each retries, the oldest first, until one
        can continue; if none can, the youngest is preempted."""
        oldest_first = sorted(jobs, key=lambda job: job.accepted)
        for job in oldest_first:
            wait = job.waiting_for_memory
            assert wait is not None
            yield job, Attempt(wait.call, again=True)
            if job.waiting_for_memory is None or job.waiting_for_memory.call is not wait.call:
                return
        self.shrink(len(jobs) - 1)
        job = next((job for job in reversed(oldest_first) if job.restartable()), oldest_first[-1])
        wait = job.waiting_for_memory
        assert wait is not None
        if job.restartable():
            logger.warning(
                "preempting %r, it will restart: %d concurrent jobs exceed device memory",
                job, len(jobs),
            )  # fmt: skip
            yield job, Preempt()
        else:
            yield job, wait.error()
