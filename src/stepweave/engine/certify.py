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
from stepweave.engine.digests import Digests
from stepweave.engine.merge import tensors

logger = logging.getLogger(__name__)

TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}  # of the largest output
APART = 10.0  # how much closer a row must be to its own single result than to any other's
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
            # the first audit comes early: most kinds do not live to see a thousand
            found.next_audit = max(1, self._audit_every // 10)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(call.kind)
        return found

    def all(self) -> list[Certificate]:
        return list(self._known.values())

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
            other = next((call for call in reversed(alike) if self._variations(first, call)), None)
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
            self._fail(certificate, variations, f"merged, it raised {type(merged).__name__}: {merged}"[:200])
            return
        error, problem = _compare(merged, [call.output for call in calls])
        certificate.error = max(certificate.error, error)
        if problem is not None:
            self._fail(certificate, variations, problem)
        elif _told_apart(merged, [call.output for call in calls]):
            certificate.state, certificate.reason = State.CERTIFIED, "merged and alone agree"
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
        new = {RAGGED} if RAGGED in variations else variations if certificate.state is State.CERTIFIED else set()
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

    def fail(self, call: Call, reason: str) -> None:
        """Withdraw the certificate of a kind."""
        self._fail(self.of(call), set(), reason)


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


def _compare(merged: list[Any], single: list[Any]) -> tuple[float, str | None]:
    """The largest difference, as a share of the largest output, and what is wrong, if anything is."""
    worst = 0.0
    for one, other in zip(merged, single, strict=True):
        ours, theirs = tensors(one), tensors(other)
        if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
            return worst, "merged and alone give results of different shapes"
        for a, b in zip(ours, theirs, strict=True):
            if not a.dtype.is_floating_point:
                if not torch.equal(a, b):
                    return worst, "merged and alone give different whole numbers"
                continue
            tolerance = TOLERANCE.get(a.dtype, TOLERANCE[torch.float32])
            error = _relative(a, b)
            if not error <= tolerance:  # also NaN in one and not in the other
                return max(worst, error), f"merged and alone differ by {error:.2g} of the largest output"
            worst = max(worst, error)
    return worst, None


def _relative(merged: torch.Tensor, single: torch.Tensor) -> float:
    if torch.equal(merged, single):
        return 0.0
    ours, alone = (one.detach().cpu().double() for one in (merged, single))  # not every device has doubles
    return float((ours - alone).abs().max()) / (float(alone.abs().max()) or 1.0)


def _told_apart(merged: list[Any], single: list[Any]) -> bool:
    """Whether every merged row is far closer to its own single result than to those of other calls, and some differ at all.

    Only calls with results of the same shapes can be held against each other.
    """
    rows = [(_rows(one), _rows(other)) for one, other in zip(merged, single, strict=True)]
    evidence = False
    for i, (ours, own) in enumerate(rows):
        for j, (_, others) in enumerate(rows):
            if i == j or own.shape[1:] != others.shape[1:]:
                continue
            for row in range(len(ours)):
                apart = (others - own[row]).norm(dim=1)
                differing = others[apart > 0]
                if not len(differing):
                    continue
                distance = (ours[row] - own[row]).norm()
                if (APART * distance > (differing - ours[row]).norm(dim=1)).any():
                    return False
                evidence = True
    return evidence


def _rows(output: Any) -> torch.Tensor:
    """All numbers of a result, as (rows, numbers)."""
    found = [t for t in tensors(output) if t.ndim and t.dtype.is_floating_point]
    if not found:
        return torch.empty(0, 0)
    rows = found[0].shape[0]
    flat = [t.detach().double().cpu().reshape(rows, -1) for t in found if t.shape[0] == rows]
    return torch.cat(flat, dim=1)
