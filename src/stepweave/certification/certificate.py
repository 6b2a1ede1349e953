"""What is known of one kind of call: whether its calls may share a forward, which of them, and the
proof."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakSet

from stepweave.batching.batch_axes import Path, Readings
from stepweave.batching.call import Call
from stepweave.certification.evidence import Span, distance, hull, readable, span
from stepweave.reasons import UnsharedNote, UnsharedReason

CONDITIONS = 8  # under so many different ones an argument is tried at once that was not proven
KEPT = 1024  # different constants that are told from new ones
RAGGED = "sizes"  # the variation of calls that differ in size


class State(Enum):
    """`pending` runs alone and is tried again; `failed` runs alone, and is tried again ever more
    rarely."""

    PENDING = "pending"
    CERTIFIED = "certified"
    FAILED = "failed"


class Verdict(Enum):
    """What to do with calls: run the first alone, run all merged, prove that they may be (the first
    two run both ways), audit two of them, or look at two of them, once each."""

    ALONE = "alone"
    MERGE = "merge"
    PROVE = "prove"
    AUDIT = "audit"
    LOOK = "look"


@dataclass
class Held:
    """An argument that must be equal in merged calls, until it is tried again."""

    reason: str
    wait: int  # chances to merge between tries
    again: int  # when the kind has had so many chances
    tried: Span | None = None  # values, where they are few; twice as wide a span is tried at once
    bounded: bool = False  # whether numbers beyond those tried may matter, such as those of words
    # the largest difference that was tried, where there are more; twice that is tried at once
    apart: float = 0.0
    # differences that matter to no result, like rounding, by what showed it
    # (`Certificate.conditions`): calls that differ by no more are merged. A constant such as a
    # scale of 0, or another argument, may be all that keeps an argument from mattering.
    slack: dict[Hashable, float] | None = None

    def within(
        self, first: Call, call: Call, variation: Any, conditions: Sequence[Hashable]
    ) -> bool:
        """Whether calls differ in this argument by no more than matters to no result."""
        slack = 0.0 if self.slack is None else min(self.slack.get(one, 0.0) for one in conditions)
        if not slack or not isinstance(variation, int):
            return False
        if not readable(first, variation):
            return slack == float("inf") and not self.bounded
        if self.tried is not None and not self.tried.covers(
            hull([span(first, variation), span(call, variation)])
        ):
            return False
        return (
            slack == float("inf")
            or distance(first.leaves[variation], call.leaves[variation]) <= slack
        )

    def due(
        self, first: Call, call: Call, variation: Any, conditions: Sequence[Hashable], chances: int
    ) -> bool:
        """Whether to try the argument again."""
        if chances >= self.again:
            return True
        if not isinstance(variation, int):
            return False
        if (
            self.slack is not None
            and len(self.slack) < CONDITIONS
            and any(one not in self.slack for one in conditions)
        ):
            return True
        if not readable(first, variation):
            return False
        if (
            0
            < 2 * self.apart
            < distance(first.leaves[variation], call.leaves[variation])
            < float("inf")
        ):
            return True
        if self.tried is None:
            return False
        found = hull([span(first, variation), span(call, variation)])
        return not self.tried.covers(found) and found.width > 2 * self.tried.width

    @property
    def matters(self) -> bool:
        """Whether there were calls in which it may make a difference."""
        return self.slack is None or not all(self.slack.values())


@dataclass
class Certificate:
    """What is known of one kind of call. Variations are arguments' positions among the leaves, or
    RAGGED."""

    target: str
    sample: str
    state: State = State.PENDING
    code: UnsharedReason | None = None  # of the reason; None if untried or certified
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
    # of arguments of few numbers, each of one proof
    spans: dict[int, list[Span]] = field(default_factory=dict)
    held: dict[Any, Held] = field(default_factory=dict)
    # whether its rows may be computed apart from each other; None if not known
    divisible: bool | None = None
    readings: Readings = field(default_factory=Readings)
    read: tuple[tuple[Path, str | None], ...] = ()  # how this kind reads its arguments
    samples: frozenset[int] = frozenset()  # leaves by which rows are told apart
    constants: set[Hashable] = field(default_factory=set)  # of calls that were merged
    totals: set[int] = field(default_factory=set)  # rows of merged forwards
    value: Callable[[tuple[Any, ...]], Hashable] = id  # of a leaf, equal for equal ones
    names: tuple[str, ...] = ()  # of the arguments, by their positions among the leaves
    # owners that had results of merged forwards since the last check
    served: WeakSet[Any] = field(default_factory=WeakSet)

    @property
    def abandoned(self) -> bool:
        """Whether it failed, and the arguments have been read in another way since, which makes
        another kind."""
        return self.state is State.FAILED and any(
            self.readings.of(path) != reading for path, reading in self.read
        )

    @property
    def alone(self) -> UnsharedNote | None:
        """Why its calls run alone, or some of them."""
        if self.state is not State.CERTIFIED:
            return None if self.code is None else (self.code, self.reason)
        if self.held:
            known = list(self.held.items())  # read on any thread
            found = [
                f"{self.name(variation)}: {held.reason}"
                for variation, held in known
                if held.matters
            ]
            return (
                ("must_be_equal", "merged only where equal: " + "; ".join(found)) if found else None
            )
        return None

    def conditions(self, call: Call, variation: Any) -> Hashable:
        """All that was the same when an argument was found not to matter: constants, and other
        arguments that are not proven."""
        if call.opaque:
            return object()
        free = {one for one, held in self.held.items() if not held.matters}
        rest = [
            i
            for i in range(len(call.leaves))
            if i != variation and i not in self.proven | self.samples | free
        ]
        return call.group.constants, tuple(
            (i, self.value(call.leaves[i])) for i in rest if i not in self.spans
        )

    def within_slack(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether calls differ in a held argument by no more than matters to no result."""
        held = self.held.get(variation)
        if held is None or not held.slack:
            return False
        return held.within(
            first, call, variation, [self.conditions(one, variation) for one in (first, call)]
        )

    def due(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether to try a held argument again."""
        held = self.held.get(variation)
        if held is None:
            return False
        conditions = (
            [] if held.slack is None else [self.conditions(one, variation) for one in (first, call)]
        )
        return held.due(first, call, variation, conditions, self.chances)

    def ready(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether calls that differ in a held argument may run together all the same, or are to be
        tried."""
        return self.within_slack(variation, first, call) or self.due(variation, first, call)

    def hold(
        self, variation: Any, reason: str, wait: int, call: Call, slack: float = 0.0, **tried: Any
    ) -> Held:
        """Have calls merged only where an argument is equal, or within `slack`, until it is tried
        again. Twice as long after each try. `tried`: as in Held."""
        known, conditions = self.held.get(variation), self.conditions(call, variation)
        found = {} if known is None or known.slack is None else dict(known.slack)
        if slack:
            # it may have been tried with values further apart
            slack = max(slack, found.get(conditions, 0.0))
        found[conditions] = slack
        wait = wait if known is None else 2 * known.wait
        held = self.held[variation] = Held(reason, wait, self.chances + wait, slack=found, **tried)
        self.spans.pop(variation, None)
        self.proven.discard(variation)
        return held

    def is_new(self, calls: Sequence[Call]) -> bool:
        """Whether calls have constants, or as many rows, as none before that were merged; noted. Of
        many constants, the first few and then ever fewer count."""
        new = False
        if calls[0].group.constants not in self.constants and len(self.constants) < KEPT:
            self.constants.add(calls[0].group.constants)
            number = len(self.constants)
            new = number <= CONDITIONS or number & (number - 1) == 0
        rows = sum(call.rows for call in calls)
        if rows not in self.totals:
            self.totals.add(rows)
            new = True
        return new

    def forget(self) -> None:
        """Believe nothing that was proven."""
        for known in (self.proven, self.spans, self.held, self.constants, self.totals):
            known.clear()
        self.rows, self.spread, self.passed, self.divisible = 0, 0.0, 0, None

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
