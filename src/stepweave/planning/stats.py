"""Statistics of an engine."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepweave.config.engine import Mode
from stepweave.errors import OutOfMemoryError
from stepweave.outcome import End, Outcome
from stepweave.reasons import UnsharedReason


@dataclass
class Forwards:
    """Forwards of one module by their rows, and how many calls shared one."""

    by_rows: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    merged_calls: int = 0

    @property
    def merged_share(self) -> float:
        """The share of calls that shared their forward with others, 0 to 1."""
        return self.merged_calls / self.calls if self.calls else 0.0


class Stats:
    """Counters, written by the engine's threads and read by any."""

    def __init__(self) -> None:
        self.forwards: dict[str, Forwards] = {}
        self.jobs: Counter[End] = Counter()
        self.errors = 0
        self.proofs = 0
        self.checks = 0
        self.retried = 0
        self.out_of_memory = 0
        self.divided = 0
        self.unfit = 0
        self._lock = threading.Lock()

    def forward(self, target: str, rows: int, calls: int) -> None:
        """Count one forward that served `calls` calls."""
        forwards = self._of(target)
        forwards.by_rows[rows] += 1
        forwards.calls += calls
        if calls > 1:
            forwards.merged_calls += calls

    def called(self, target: str) -> None:
        """Count one call that ran in several forwards."""
        self._of(target).calls += 1

    def _of(self, target: str) -> Forwards:
        forwards = self.forwards.get(target)
        if forwards is None:
            forwards = self.forwards[target] = Forwards()
        return forwards

    def counts(self) -> dict[str, Any]:
        """All counters, by their names in `EngineStats`."""
        return {
            "jobs": dict(self.jobs),
            "forwards": dict(self.forwards),
            "proofs": self.proofs,
            "checks": self.checks,
            "retried": self.retried,
            "out_of_memory": self.out_of_memory,
            "divided": self.divided,
            "unfit": self.unfit,
            "errors": self.errors,
        }

    def finished(self, outcome: Outcome) -> None:
        """Count a job by its outcome."""
        with self._lock:
            self.jobs[outcome.end] += 1
            self.unfit += isinstance(outcome.error, OutOfMemoryError)


def of_the_loop(loop: Any) -> dict[str, Any]:
    """What only mode `step` has, by its names in `EngineStats`; `loop` is None in others."""
    every = loop.certificates.all() if loop else []
    return {
        "certificates": [item.describe() for item in every],
        "unshared": loop.unshared.listed(every, loop.scope_of(None).why_turns()) if loop else [],
        "unshared_calls": dict(loop.unshared.calls) if loop else {},
        "cache_hits": loop.cache.hits if loop else 0,
        "cache_misses": loop.cache.misses if loop else 0,
        "cache_bytes": loop.cache.bytes if loop else 0,
        "peak_memory": loop.memory.peak() if loop else 0,
    }


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. `forwards` (by module) and `certificates` only in mode `step`."""

    mode: Mode
    waiting: int  # jobs
    running: int  # jobs
    jobs: Mapping[End, int]  # done
    forwards: Mapping[str, Forwards]
    certificates: list[dict[str, Any]]
    # why calls run alone, or jobs take turns: `call`, `reason` (a code) and `detail`
    unshared: list[dict[str, str]]
    unshared_calls: Mapping[UnsharedReason, int]  # calls that ran alone
    cache_hits: int
    cache_misses: int
    cache_bytes: int
    proofs: int  # forwards run both merged and alone, audits included
    checks: int  # forwards run only for proofs and audits
    retried: int  # merged forwards that failed, after which the calls ran alone
    out_of_memory: int  # forwards that ran out of memory
    divided: int  # calls that ran in parts
    unfit: int  # jobs that failed because memory ran out
    peak_memory: int  # the largest number of bytes allocated on the device; 0 if unknown
    errors: int  # of the engine itself, after which it continued
    backlog: float  # predicted seconds of work submitted and not yet done
    # the median error of the last predicted forwards, as a share of the prediction
    cost_error: float
