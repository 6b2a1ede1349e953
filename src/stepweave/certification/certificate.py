"""The record of one kind of call: whether its calls may share a forward, and which of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakSet

import torch

from stepweave.batching.batch_axes import Path, Readings
from stepweave.batching.call import Call
from stepweave.certification.evidence import Span, distance, hull, readable, span
from stepweave.compat.row_adapters import ADAPTERS
from stepweave.reasons import UnsharedNote, UnsharedReason

CONDITIONS = 8  # an unproven argument is tried at once under this many different conditions
KEPT = 1024  # different constants that are remembered
STRONGER = 4.0  # a scale of an adapter, by this factor, is looked at again
RAGGED = "sizes"  # the variation of calls that differ in size


class State(Enum):
    """`pending` and `failed` kinds run alone; failed ones are tried again more and more rarely."""

    PENDING = "pending"
    CERTIFIED = "certified"
    FAILED = "failed"


class Verdict(Enum):
    """How to run calls: the first alone; all merged; the first two both ways, as a proof; all
    merged and two of them also alone, twice (audit) or once (look)."""

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
    again: int  # the certificate's number of chances at which it is tried again
    tried: Span | None = None  # of few numbers: values tried; twice as wide a span is tried at once
    bounded: bool = False  # whether numbers beyond those tried may matter, such as token ids
    # of many numbers: the largest difference tried; twice as large a one is tried at once
    apart: float = 0.0
    # differences without effect on results, like rounding, by the conditions of the test
    # (`Certificate.conditions`); calls that differ by no more are merged. By conditions, since an
    # argument may have no effect only because of a constant, such as a scale of 0, or another
    # argument.
    slack: dict[Hashable, float] | None = None

    def within(
        self, first: Call, call: Call, variation: Any, conditions: Sequence[Hashable]
    ) -> bool:
        """Whether calls differ in this argument by no more than its slack."""
        slack = 0.0 if self.slack is None else min(self.slack.get(key, 0.0) for key in conditions)
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
        if self.slack is not None and len(self.slack) < CONDITIONS:
            if any(key not in self.slack for key in conditions):
                return True
        if not readable(first, variation):
            return False
        apart = distance(first.leaves[variation], call.leaves[variation])
        if 0 < 2 * self.apart < apart < float("inf"):
            return True
        if self.tried is None:
            return False
        values = hull([span(first, variation), span(call, variation)])
        return not self.tried.covers(values) and values.width > 2 * self.tried.width

    @property
    def matters(self) -> bool:
        """Whether the argument may have an effect under some of the conditions."""
        return self.slack is None or not all(self.slack.values())


@dataclass
class Certificate:
    """The record of one kind of call. A variation, in which calls differ, is an argument's position
    among the leaves, a pair of that and types, or RAGGED."""

    target: str
    sample: str
    state: State = State.PENDING
    code: UnsharedReason | None = None  # of the reason; None if untried or certified
    reason: str = "not tried yet"
    error: float = 0.0  # the largest, as a share of the spread over rows of its slice
    rows: int = 0  # the largest number that a proof has covered
    proofs: int = 0
    merged: int = 0  # forwards
    chances: int = 0  # decisions on calls that could be merged
    attempts: int = 0  # inconclusive proofs since the last success
    failures: int = 0
    passed: int = 0  # proofs since the last failure
    resting: int = 0  # no proof before this number of chances
    rests: int = 0  # because proofs were inconclusive
    ambiguous: bool = False  # whether `repeat` makes a difference
    repeat: bool = True  # argument of `run_merged`
    spread: float = 0.0  # the largest difference in size that is proven, as a share of the larger
    next_audit: int = 1  # at this number of merged forwards
    proven: set[Any] = field(default_factory=set)  # variations
    # of arguments of few numbers: the values that each proof covers
    spans: dict[int, list[Span]] = field(default_factory=dict)
    held: dict[Any, Held] = field(default_factory=dict)
    # whether its rows may be computed apart from each other; None if not known
    divisible: bool | None = None
    readings: Readings = field(default_factory=Readings)
    read: tuple[tuple[Path, str | None], ...] = ()  # how this kind reads its arguments
    samples: frozenset[int] = frozenset()  # leaves of the sample
    constants: set[Hashable] = field(default_factory=set)  # of calls that were merged
    totals: set[int] = field(default_factory=set)  # rows of merged forwards
    # the largest scales, by their numbers, of those compared in a forward with others
    adapters: dict[float, float] = field(default_factory=dict)
    value: Callable[[tuple[Any, ...]], Hashable] = id  # a key of a leaf, equal for equal leaves
    names: tuple[str, ...] = ()  # of the arguments, by their positions among the leaves
    # jobs that have got results of merged forwards since the last check
    served: WeakSet[Any] = field(default_factory=WeakSet)

    def __str__(self) -> str:
        return f"{self.target} {self.sample}"

    def conclude(self, state: State, reason: str, code: UnsharedReason | None) -> None:
        self.state, self.reason, self.code = state, reason, code

    @property
    def abandoned(self) -> bool:
        """Whether it failed and is no longer used, because the arguments are read in another way
        since, which makes another kind."""
        return self.state is State.FAILED and any(
            self.readings.of(path) != reading for path, reading in self.read
        )

    @property
    def alone(self) -> UnsharedNote | None:
        """Why all or some of its calls run alone; None if none do."""
        if self.state is not State.CERTIFIED:
            return None if self.code is None else (self.code, self.reason)
        held = list(self.held.items())  # a copy, since any thread may read it
        reasons = [f"{self.name(key)}: {item.reason}" for key, item in held if item.matters]
        if not reasons:
            return None
        return "must_be_equal", "merged only where equal: " + "; ".join(reasons)

    def conditions(self, call: Call, variation: Any) -> Hashable:
        """The conditions under which an argument is tested: constants, and values of arguments that
        are not proven."""
        if call.opaque:
            return object()
        free = {position for position, held in self.held.items() if not held.matters}
        skipped = self.proven | self.samples | free | self.spans.keys() | {variation}
        return call.group.constants, tuple(
            (i, self.value(leaf)) for i, leaf in enumerate(call.leaves) if i not in skipped
        )

    def within_slack(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether calls differ in a held argument by no more than its slack."""
        held = self.held.get(variation)
        if held is None or not held.slack:
            return False
        conditions = [self.conditions(item, variation) for item in (first, call)]
        return held.within(first, call, variation, conditions)

    def due(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether to try a held argument again."""
        held = self.held.get(variation)
        if held is None:
            return False
        calls = [] if held.slack is None else [first, call]
        conditions = [self.conditions(item, variation) for item in calls]
        return held.due(first, call, variation, conditions, self.chances)

    def ready(self, variation: Any, first: Call, call: Call) -> bool:
        """Whether calls that differ in a held argument may be merged nevertheless, or tried."""
        return self.within_slack(variation, first, call) or self.due(variation, first, call)

    def hold(
        self, variation: Any, reason: str, wait: int, call: Call, slack: float = 0.0, **tried: Any
    ) -> Held:
        """Merge calls only if an argument is equal, or within `slack`, until it is tried again;
        the wait doubles with each try. `tried`: as in Held."""
        before, conditions = self.held.get(variation), self.conditions(call, variation)
        slacks = {} if before is None or before.slack is None else dict(before.slack)
        # an earlier try may have shown a larger slack
        slacks[conditions] = max(slack, slacks.get(conditions, 0.0)) if slack else slack
        wait = wait if before is None else 2 * before.wait
        held = self.held[variation] = Held(reason, wait, self.chances + wait, slack=slacks, **tried)
        self.spans.pop(variation, None)
        self.proven.discard(variation)
        return held

    def is_new(self, calls: Sequence[Call]) -> bool:
        """Note the constants and the rows of calls to merge. Returns whether they are new; of many
        constants, only the first few count, then each power of two."""
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

    def strangers(self, calls: Sequence[Call]) -> list[Call] | None:
        """The first call and one of other adapters, if any of these is new or far stronger, which
        it then no longer is: it may be of other layers than those that have been proven."""
        first: Any = calls[0].arguments.get(ADAPTERS)
        for call in calls[1:] if first is not None else ():
            table = call.arguments[ADAPTERS]
            if table is first or torch.equal(table, first):
                continue
            every = torch.cat([first, table], dim=1)[0].tolist()
            both = [(number, abs(scale)) for number, scale in every]
            if any(scale > STRONGER * self.adapters.get(number, 0.0) for number, scale in both):
                for number, scale in both:
                    self.adapters[number] = max(scale, self.adapters.get(number, 0.0))
                return [calls[0], call]
        return None

    def forget(self) -> None:
        """Forget everything that was proven."""
        for collection in (self.proven, self.spans, self.held, self.constants, self.totals):
            collection.clear()
        self.adapters.clear()
        self.rows, self.spread, self.passed, self.divisible = 0, 0.0, 0, None

    def name(self, variation: Any) -> str:
        """The name of a variation's argument."""
        if isinstance(variation, tuple):
            return f"types of {self.name(variation[0])}"
        return variation if isinstance(variation, str) else self.names[variation]

    def describe(self) -> dict[str, Any]:
        """The fields that `/v1/models` and `StepEngine.stats` show."""
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
