"""Certificates: the recorded proof that a kind of call gives the same result merged and alone.

Nothing is merged on trust. The first calls of a kind that could share a forward are run merged and one by one, and compared.
What the proof did not see is not covered by it: an argument that had the same value in all calls, sizes that did not differ,
many more rows than were tried. Each such variation is proven when it first occurs, or refused and kept out of merged forwards.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from stepweave.engine.call import Call
from stepweave.engine.compare import compare, told_apart
from stepweave.engine.describe import TIMES
from stepweave.engine.digests import Digests
from stepweave.engine.readings import Path, Readings

logger = logging.getLogger(__name__)

REACH = 4  # a proof with so many rows covers this many times as many
ATTEMPTS = 16  # inconclusive proofs, whose calls were too alike to tell apart, before a kind is left alone
KEPT = 4096  # certificates; the least recently used goes first

SLIGHT = 1e-6  # the spread of sizes that differ in shape only

RAGGED = "sizes"  # the variation of calls that differ in size


class State(Enum):
    """`pending` runs alone and is tried again; `failed` runs alone for good."""

    PENDING = "pending"
    CERTIFIED = "certified"
    FAILED = "failed"


class Verdict(Enum):
    """What to do with calls: run the first alone, run all merged, or run all both ways and compare."""

    ALONE = "alone"
    MERGE = "merge"
    PROVE = "prove"


@dataclass
class Certificate:
    """What is known of one kind of call. Variations are arguments' positions among the leaves, or RAGGED."""

    target: str
    sample: str
    state: State = State.PENDING
    reason: str = "not tried yet"
    error: float = 0.0  # the largest seen, as a share of the largest output
    rows: int = 0  # the most that a proof has covered
    proofs: int = 0
    merged: int = 0  # forwards
    attempts: int = 0
    ambiguous: bool = False  # whether `repeat` makes a difference
    repeat: bool = True  # see merge
    spread: float = 0.0  # the largest difference in size that is proven, as a share of the larger
    next_audit: int = 0  # when `merged` gets there
    proven: set[Any] = field(default_factory=set)
    refused: set[Any] = field(default_factory=set)
    divisible: bool | None = None  # whether its rows may be computed apart from each other; None if not known
    readings: Readings = field(default_factory=Readings)
    read: tuple[tuple[Path, str | None], ...] = ()  # how this kind reads its arguments

    @property
    def abandoned(self) -> bool:
        """Whether it failed, and the arguments have been read in another way since, which makes another kind."""
        return self.state is State.FAILED and any(self.readings.of(path) != reading for path, reading in self.read)

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


class Certificates:
    """All certificates of an engine, and the decision whether calls may be merged."""

    def __init__(self, digests: Digests, audit_every: int) -> None:
        self._digests = digests
        self._audit_every = audit_every
        self._known: OrderedDict[Hashable, Certificate] = OrderedDict()

    def of(self, call: Call) -> Certificate:
        found = self._known.get(call.kind)
        if found is None:
            found = self._known[call.kind] = Certificate(call.target.name, _shape_of_sample(call))
            found.ambiguous = any(node[0] == "repeated" for _, node in call.layout)
            found.readings, guesses = call.target.readings, dict(call.guesses)
            found.read = tuple((path, guesses.get(path)) for path in guesses.keys() | {path for path, _ in call.paths})
            # the first audit comes early: most kinds do not live to see a thousand
            found.next_audit = max(1, self._audit_every // 10)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(call.kind)
        return found

    def all(self) -> list[Certificate]:
        return [one for one in list(self._known.values()) if not one.abandoned]

    def counts(self) -> dict[str, int]:
        found = self.all()
        return {state.value: sum(one.state is state for one in found) for state in State}

    def decide(self, calls: Sequence[Call]) -> tuple[Verdict, list[Call]]:
        """What to do first with calls of one key, the oldest first, and with which of them. The first always is among them."""
        first = calls[0]
        if len(calls) == 1 or self.of(first).state is State.FAILED:
            return Verdict.ALONE, [first]
        certificate = self.of(first)
        alike = list(calls)
        if certificate.refused:
            alike = self._not_refused(calls, certificate)
        if len(alike) == 1:
            return Verdict.ALONE, [first]
        if certificate.state is State.PENDING:
            varied = [(call, self._variations(first, call)) for call in reversed(alike)]
            # best one whose times are of the same type, so that a failure says something of all calls of the kind
            varied.sort(key=lambda pair: bool(_types(pair[1])))
            other = next((call for call, variations in varied if variations), None)
            if other is None or certificate.attempts >= ATTEMPTS:
                return Verdict.ALONE, [first]  # equal calls prove nothing
            return Verdict.PROVE, [first, other]
        for call in alike[1:]:
            if self._variations(first, call) - certificate.proven:
                return Verdict.PROVE, [first, call]
        if _spread(alike) > certificate.spread:
            ends = min(alike, key=lambda call: call.extents), max(alike, key=lambda call: call.extents)
            return Verdict.PROVE, [call for call in alike if call is first or call in ends]
        if sum(call.rows for call in alike) > REACH * certificate.rows:
            return Verdict.PROVE, alike
        certificate.merged += 1
        if certificate.merged >= certificate.next_audit:
            certificate.next_audit = certificate.merged + self._audit_every
            return Verdict.PROVE, alike
        return Verdict.MERGE, alike

    def _not_refused(self, calls: Sequence[Call], certificate: Certificate) -> list[Call]:
        """The first call, and those that may run with it and with each other."""
        alike = [calls[0]]
        for call in calls[1:]:
            too_far = RAGGED in certificate.refused and _spread([*alike, call]) > certificate.spread
            if not too_far and not self._variations(calls[0], call) & certificate.refused:
                alike.append(call)
        return alike

    def _variations(self, one: Call, other: Call) -> set[Any]:
        """In which arguments two calls of a kind differ, as far as that is not proven to be right."""
        certificate = self._known[one.kind]
        found: set[Any] = set()
        if one is other:
            return found
        if one.ragged != other.ragged and _spread([one, other]) > certificate.spread:
            found.add(RAGGED)
        for i, (leaf, other_leaf) in enumerate(zip(one.leaves, other.leaves, strict=True)):
            if i not in certificate.proven and self._value(leaf) != self._value(other_leaf):
                found.add(i)
            types = frozenset((_dtype(leaf), _dtype(other_leaf)))  # of times
            if len(types) > 1 and (i, types) not in certificate.proven:
                found.add((i, types))
        return found

    def _value(self, leaf: tuple[Any, ...]) -> Any:
        values = [self._digests.of(one) if isinstance(one, torch.Tensor) else (type(one), one) for one in leaf]
        return values[0] if len(set(values)) == 1 else values

    def judge(self, calls: Sequence[Call], merged: list[Any] | Exception) -> None:
        """Record a proof: the calls' own results are in their `output`, the merged forward's (or its error) in `merged`."""
        certificate = self.of(calls[0])
        if any(call.failed for call in calls):
            return  # it fails alone, too, which says nothing of merging
        if any(call.wrote for call in calls):
            certificate.readings.refute(calls[0].guesses)
            self._fail(certificate, set(), "it writes to its arguments")
            return
        if any(call.output is None for call in calls):
            certificate.attempts += 1
            certificate.reason = "its results cannot be copied"
            return
        variations: set[Any] = set()
        for call in calls[1:]:
            variations |= self._variations(calls[0], call)
        if _spread(calls) > certificate.spread:
            variations.add(RAGGED)
        rows = sum(call.rows for call in calls)
        certificate.proofs += 1
        if isinstance(merged, Exception):
            problem: str | None = f"merged, it raised {type(merged).__name__}: {merged}"[:200]
        else:
            error, problem = compare(merged, [call.output for call in calls])
            certificate.error = max(certificate.error, error)
        if problem is not None:
            first_proof = certificate.state is State.PENDING and not (certificate.repeat and certificate.ambiguous)
            if first_proof and not _types(variations) and _read_anew(calls[0], variations):
                certificate.state, certificate.reason = State.FAILED, problem
                logger.info("%s %s: its arguments are read in another way", certificate.target, certificate.sample)
            else:
                self._fail(certificate, variations, problem)
            return
        assert not isinstance(merged, Exception)
        if told_apart(merged, [call.output for call in calls]):
            certificate.state, certificate.reason = State.CERTIFIED, "merged and alone agree"
            certificate.readings.prove(calls[0].guesses)
            if all(call.rows == 1 for call in calls) and certificate.divisible is None:
                certificate.divisible = True
            certificate.rows = max(certificate.rows, rows)
            certificate.proven |= variations - {RAGGED}
            certificate.spread = max(certificate.spread, _spread(calls))
        elif certificate.state is State.CERTIFIED and not variations - certificate.proven:
            certificate.rows = max(certificate.rows, rows)
        else:
            self._inconclusive(certificate, variations)

    def _inconclusive(self, certificate: Certificate, variations: set[Any]) -> None:
        certificate.attempts += 1
        if certificate.state is State.PENDING:
            certificate.reason = "the calls compared were too alike to tell apart"
        elif certificate.attempts >= ATTEMPTS:
            certificate.refused |= variations - certificate.proven

    def _fail(self, certificate: Certificate, variations: set[Any], reason: str) -> None:
        """Refuse what was new in this proof; a kind that fails with nothing new is not to be trusted at all."""
        certified = certificate.state is State.CERTIFIED
        new = {RAGGED} if RAGGED in variations else variations if certified else _types(variations)
        certificate.reason = reason
        if certificate.state is State.PENDING and certificate.repeat and certificate.ambiguous:
            certificate.repeat = False
        elif new:
            certificate.refused |= new
            what = "calls of different sizes" if new == {RAGGED} else "calls that differ in further arguments"
            logger.warning("%s %s: %s are not merged: %s", certificate.target, certificate.sample, what, reason)
        else:
            certificate.state = State.FAILED
            logger.warning("%s %s runs alone: %s", certificate.target, certificate.sample, reason)

    def judge_parts(self, call: Call, divided: Any) -> None:
        """Record whether a call gave in parts, as `divided`, what it gave as a whole, in its `output`."""
        certificate = self.of(call)
        if certificate.state is State.CERTIFIED and not call.failed and call.output is not None:
            certificate.divisible = not isinstance(divided, Exception) and compare([divided], [call.output])[1] is None

    def divisible(self, call: Call) -> bool | None:
        """Whether a call's rows may be computed apart; where its own size was never tried, whether another's may."""
        if not isinstance(call.kind, tuple) or call.chunks > 1:
            return False
        own = self._known.get(call.kind)
        if own is not None and own.divisible is not None:
            return own.divisible
        target, layout, _, *rest = call.kind
        found = [
            one.divisible
            for kind, one in self._known.items()
            if isinstance(kind, tuple) and (kind[0], kind[1], [*kind[3:]]) == (target, layout, rest)
        ]
        return False if False in found else True if True in found else None

    def fail(self, call: Call, reason: str) -> None:
        """Withdraw the certificate of a kind."""
        self._fail(self.of(call), set(), reason)


def _read_anew(call: Call, variations: set[Any]) -> bool:
    """Whether there is another way to read the arguments of calls whose first proof failed, in which they differ so."""
    readings = call.target.readings
    if call.guesses:  # what is supposed to be shared is so since it failed as rows
        return readings.refute(call.guesses) and any(reading != "shared" for _, reading in call.guesses)
    rows = [path for i, (path, tag) in enumerate(call.paths) if tag == "rows" and i not in variations]
    equal = [path for path in rows if path[0] not in TIMES]  # they are equal at the first step only
    return readings.suppose(equal, "shared")


def _types(variations: set[Any]) -> set[Any]:
    """The variations that are of types of times."""
    return {one for one in variations if isinstance(one, tuple)}


def _dtype(leaf: tuple[Any, ...]) -> Any:
    return leaf[0].dtype if isinstance(leaf[0], torch.Tensor) else None


def _spread(calls: Sequence[Call]) -> float:
    """How much calls differ in the sizes that may differ, 0 to 1; more than 0 if they differ at all."""
    if all(call.ragged == calls[0].ragged for call in calls):
        return 0.0
    shares = [
        1 - min(least for least, _ in sizes) / (max(most for _, most in sizes) or 1)
        for sizes in zip(*(call.extents for call in calls), strict=True)
    ]
    return max(*shares, SLIGHT) if shares else SLIGHT


def _shape_of_sample(call: Call) -> str:
    tensor = next((leaf[0] for leaf in call.leaves if isinstance(leaf[0], torch.Tensor) and leaf[0].ndim), None)
    if tensor is None:
        return ""
    shape = tensor.shape if isinstance(next(iter(call.arguments.values())), list) else tensor.shape[1:]
    return f"{'x'.join(map(str, shape))} {str(tensor.dtype).removeprefix('torch.')}"
