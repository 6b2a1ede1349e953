"""What is known of one kind of call: whether its calls may share a forward, which of them, and the proof."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakSet

from stepweave.engine.call import Call
from stepweave.engine.evidence import Span, distance, hull, readable, span
from stepweave.engine.readings import Path, Readings

CONSTANTS = 8  # with so many different constants an argument is tried at once that was not proven
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
    # differences that matter to no result, like rounding, by the constants of the calls that showed it (`Call.constants`): calls
    # that differ by no more are merged. A constant such as a scale of 0 may be all that keeps an argument from mattering.
    slack: dict[Hashable, float] | None = None

    def within(self, first: Call, call: Call, variation: Any) -> bool:
        """Whether calls differ in this argument by no more than matters to no result."""
        slack = 0.0 if self.slack is None else self.slack.get(first.constants, 0.0)
        if slack == float("inf"):
            return True
        if not slack or not readable(first, variation):
            return False
        if self.tried is not None and not self.tried.covers(hull([span(first, variation), span(call, variation)])):
            return False
        return distance(first.leaves[variation], call.leaves[variation]) <= slack

    def due(self, first: Call, call: Call, variation: Any, chances: int) -> bool:
        """Whether to try the argument again."""
        if chances >= self.again:
            return True
        if not isinstance(variation, int):
            return False
        if self.slack is not None and first.constants not in self.slack and len(self.slack) < CONSTANTS:
            return True
        if not readable(first, variation):
            return False
        if self.tried is None:
            return self.apart > 0 and distance(first.leaves[variation], call.leaves[variation]) > 2 * self.apart
        found = hull([span(first, variation), span(call, variation)])
        return not self.tried.covers(found) and found.width > 2 * self.tried.width

    @property
    def matters(self) -> bool:
        """Whether there were calls in which it may make a difference."""
        return self.slack is None or not all(self.slack.values())


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
            found = [f"{self.name(variation)}: {held.reason}" for variation, held in known if held.matters]
            return ("must_be_equal", "merged only where equal: " + "; ".join(found)) if found else None
        return None

    def within_slack(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether calls differ in a held argument by no more than matters to no result."""
        held = self.held.get(variation)
        return held is not None and held.within(first, call, variation)

    def ready(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether calls that differ in a held argument may run together all the same, or are to be tried."""
        held = self.held[variation]
        return held.due(first, call, variation, self.chances) or held.within(first, call, variation)

    def hold(self, variation: Any, reason: str, wait: int, call: Call, slack: float = 0.0, **tried: Any) -> Held:
        """Have calls merged only where an argument is equal, or within `slack`, until it is tried again. Twice as long after each
        try. `tried`: as in Held."""
        known = self.held.get(variation)
        found = {} if known is None or known.slack is None else dict(known.slack)
        if slack:
            slack = max(slack, found.get(call.constants, 0.0))  # it may have been tried with values further apart
        found[call.constants] = slack
        wait = wait if known is None else 2 * known.wait
        held = self.held[variation] = Held(reason, wait, self.chances + wait, slack=found, **tried)
        self.spans.pop(variation, None)
        self.proven.discard(variation)
        return held

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
