"""What is known of one kind of call: whether its calls may share a forward, which of them, and the proof."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakSet

from stepweave.engine.evidence import Span
from stepweave.engine.readings import Path, Readings

RAGGED = "sizes"  # the variation of calls that differ in size


class State(Enum):
    """`pending` runs alone and is tried again; `failed` runs alone, and is tried again ever more rarely."""

    PENDING = "pending"
    CERTIFIED = "certified"
    FAILED = "failed"


class Verdict(Enum):
    """What to do with calls: run the first alone, run all merged, prove that they may be (the first two run both ways), or audit
    (two of them)."""

    ALONE = "alone"
    MERGE = "merge"
    PROVE = "prove"
    AUDIT = "audit"


@dataclass
class Held:
    """An argument that must be equal in merged calls, until it is tried again."""

    reason: str
    wait: int  # chances to merge between tries
    again: int  # when the kind has had so many chances
    tried: Span | None = None  # values, where they are few; twice as wide a span is tried at once
    apart: float = 0.0  # the largest difference that was tried, where there are more; twice that is tried at once
    slack: float = 0.0  # a difference that matters to no result, like rounding; calls that differ by no more are merged


@dataclass
class Certificate:
    """What is known of one kind of call. Variations are arguments' positions among the leaves, or RAGGED."""

    target: str
    sample: str
    state: State = State.PENDING
    code: str = "untried"  # of the reason: one of few
    reason: str = "not tried yet"
    error: float = 0.0  # the largest seen, as a share of the spread of the slice that it is in
    rows: int = 0  # the most that a proof has covered
    proofs: int = 0
    merged: int = 0  # forwards
    chances: int = 0  # decisions on calls that could be merged
    attempts: int = 0
    failures: int = 0
    passed: int = 0  # proofs since the last failure
    resting: int = 0  # until so many chances
    rests: int = 0  # for want of proofs that could tell calls apart
    ambiguous: bool = False  # whether `repeat` makes a difference
    repeat: bool = True  # see merge
    spread: float = 0.0  # the largest difference in size that is proven, as a share of the larger
    next_audit: int = 1  # when `merged` gets there
    proven: set[Any] = field(default_factory=set)
    spans: dict[int, list[Span]] = field(default_factory=dict)  # of arguments of few numbers, each of one proof
    held: dict[Any, Held] = field(default_factory=dict)
    divisible: bool | None = None  # whether its rows may be computed apart from each other; None if not known
    readings: Readings = field(default_factory=Readings)
    read: tuple[tuple[Path, str | None], ...] = ()  # how this kind reads its arguments
    names: tuple[str, ...] = ()  # of the arguments, by their positions among the leaves
    served: WeakSet[Any] = field(
        default_factory=WeakSet
    )  # owners that had results of merged forwards since the last check

    @property
    def abandoned(self) -> bool:
        """Whether it failed, and the arguments have been read in another way since, which makes another kind."""
        return self.state is State.FAILED and any(self.readings.of(path) != reading for path, reading in self.read)

    @property
    def alone(self) -> tuple[str, str] | None:
        """Why its calls run alone, or some of them: a code and a text."""
        if self.state is not State.CERTIFIED:
            return None if self.code == "untried" else (self.code, self.reason)
        if self.held:
            known = list(self.held.items())  # read on any thread
            found = [f"{self.name(variation)}: {held.reason}" for variation, held in known if not held.slack]
            return ("must_be_equal", "merged only where equal: " + "; ".join(found)) if found else None
        return None

    def name(self, variation: Any) -> str:
        """What a variation is of."""
        if isinstance(variation, tuple):
            return f"types of {self.name(variation[0])}"
        return variation if isinstance(variation, str) else self.names[variation]

    def describe(self) -> dict[str, Any]:
        """As `/v1/models` and `StepEngine.stats` show it."""
        return {
            "call": self.target,
            "sample": self.sample,
            "state": self.state.value,
            "reason": self.reason,
            "largest_error": float(f"{self.error:.3g}"),
            "rows": self.rows,
            "proofs": self.proofs,
            "merged_forwards": self.merged,
        }
