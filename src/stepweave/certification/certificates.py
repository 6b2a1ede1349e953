"""Certificates: the recorded proof that a kind of call gives the same result merged and alone.

The first calls of a kind that could share a forward are run merged and one by one, and compared. A
certificate covers only what differed in the proof. These need proofs of their own: arguments that
were equal in all calls or had no clear effect, values beyond those tried, other differences in
size, many more rows. Each such variation is proven when it first occurs, or kept out of merged
forwards until it is tried again.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

from stepweave.batching.batch_axes import made
from stepweave.batching.call import Call
from stepweave.batching.fingerprints import Fingerprints
from stepweave.batching.layout import TIMES
from stepweave.batching.leaves import LISTED, REPEATED, ROWS
from stepweave.certification.certificate import RAGGED, Certificate, Held, State, Verdict
from stepweave.certification.compare import Differ, NotFinite, Pair, agree, compare, told_apart
from stepweave.certification.evidence import (
    Span,
    distance,
    hull,
    is_whole,
    readable,
    samples,
    scalars,
    span,
    spread,
)
from stepweave.certification.proof import FAR, Proof, Prover
from stepweave.compat.nested import tensors
from stepweave.reasons import UnsharedReason

logger = logging.getLogger(__name__)

REACH = 4  # a proof covers this many times its rows
ATTEMPTS = 16  # inconclusive proofs before a kind rests
KEPT = 4096  # certificates; the least recently used is dropped
FIRST_AUDITS = 256  # merged forwards, up to which each power of two is audited
REST = 128  # chances to merge before a failed kind is tried again; doubles with each failure
NOT_FINITE = 4  # the same after a proof with numbers that are not finite
HELD = 8  # the same for an argument that had no clear effect; doubles with each try

UNCLEAR = "without a clear effect on the result"
FAINT = 0.05  # an effect without significance, as a share of the allowed error


class Certificates:
    """All certificates of an engine; decides whether calls may be merged."""

    def __init__(
        self, digests: Fingerprints, audit_every: int, on_doubt: Callable[[], object] = lambda: None
    ) -> None:
        self._on_doubt = on_doubt  # cached results of encoders may be wrong, too
        self._digests = digests
        self._audit_every = audit_every
        self._certificates: OrderedDict[Hashable, Certificate] = OrderedDict()
        self._doubtful: list[Any] = []

    def of(self, call: Call) -> Certificate:
        item = self._certificates.get(call.kind)
        if item is None:
            item = Certificate(call.target.name, _shape_of_sample(call))
            self._certificates[call.kind] = item
            item.ambiguous = any(node[0] is REPEATED for _, node in call.group.layout)
            paths = [path for path, kind in call.paths if kind is not LISTED]
            item.readings, item.read = call.target.readings, made(paths, call.guesses)
            item.names = tuple(".".join(map(str, path)) for path, _ in call.paths)
            item.samples, item.value = samples(call), self._value
            if len(self._certificates) > KEPT:
                self._certificates.popitem(last=False)
        else:
            self._certificates.move_to_end(call.kind)
        return item

    def all(self) -> list[Certificate]:
        return [item for item in list(self._certificates.values()) if not item.abandoned]

    def counts(self) -> dict[str, int]:
        items = self.all()
        return {state.value: sum(item.state is state for item in items) for state in State}

    # Decisions

    def decide(self, calls: Sequence[Call]) -> tuple[Verdict, list[Call]]:
        """Decide how to run calls of one key, in the policy's order, and which of them run now: the
        first and perhaps others."""
        first = calls[0]
        if len(calls) == 1:
            return Verdict.ALONE, [first]
        certificate = self.of(first)
        certificate.chances += 1
        if certificate.chances < certificate.resting:
            return Verdict.ALONE, [first]
        if certificate.state is State.FAILED or certificate.attempts >= ATTEMPTS:
            certificate.state, certificate.attempts = State.PENDING, 0
        alike = self._alike(calls, certificate) if certificate.held else list(calls)
        if len(alike) == 1:
            return Verdict.ALONE, [first]
        if certificate.state is State.PENDING:
            varied = [(call, self._variations(first, call, every=True)) for call in reversed(alike)]
            # prefer one with times of the same type: then a failure applies to all of the kind
            varied.sort(key=lambda pair: bool(_types(pair[1])))
            other = next((call for call, variations in varied if variations), None)
            if other is None:
                return Verdict.ALONE, [first]  # equal calls prove nothing
            return Verdict.PROVE, [first, other]
        for call in alike[1:]:
            new = self._variations(first, call) - certificate.proven
            if any(
                certificate.due(key, first, call) or not certificate.within_slack(key, first, call)
                for key in new
            ):
                return Verdict.PROVE, [first, call]
        beyond = self._beyond(alike, certificate)
        if beyond is not None:
            return Verdict.PROVE, beyond
        if spread(alike) > certificate.spread:
            by_size = sorted(alike, key=lambda call: call.extents)
            return Verdict.PROVE, _with_first(first, by_size[0], by_size[-1])
        strangers = certificate.strangers(alike)
        if strangers is not None:
            return Verdict.LOOK, strangers
        unseen = certificate.is_new(alike)
        if sum(call.rows for call in alike) > REACH * certificate.rows:
            return Verdict.AUDIT, alike
        certificate.merged += 1
        if certificate.merged >= certificate.next_audit:
            certificate.next_audit = self._next_audit(certificate.merged)
            return Verdict.AUDIT, alike
        return Verdict.LOOK if unseen else Verdict.MERGE, alike

    def proven(self, calls: Sequence[Call]) -> set[int]:
        """The leaves that are proven."""
        return {key for key in self.of(calls[0]).proven if isinstance(key, int)}

    def _next_audit(self, merged: int) -> int:
        if 2 * merged <= FIRST_AUDITS:
            return min(2 * merged, merged + self._audit_every)
        return merged + self._audit_every

    def differences(self, calls: Sequence[Call]) -> set[Any]:
        """The variations that a proof of these calls must cover: the arguments that differ."""
        certificate, first = self.of(calls[0]), calls[0]
        variations: set[Any] = set().union(*(self._variations(first, call) for call in calls[1:]))
        if spread(calls) > certificate.spread:
            variations.add(RAGGED)
        return variations

    def pair(self, calls: Sequence[Call]) -> tuple[Call, Call]:
        """Choose two of the calls for an audit: the furthest apart in a scalar argument, or any."""
        some = scalars(calls[0])
        if some and random.random() < 0.5 and all(readable(call, some[0]) for call in calls):
            line = sorted(calls, key=lambda call: span(call, some[0]).low)
            return line[0], line[-1]
        first, second = random.sample(calls, 2)
        return first, second

    def _alike(self, calls: Sequence[Call], certificate: Certificate) -> list[Call]:
        """The first call, and the others that may be merged with it and with each other."""
        first = calls[0]
        alike = [first]
        for call in calls[1:]:
            if RAGGED in certificate.held and not certificate.ready(RAGGED, first, call):
                if spread([*alike, call]) > certificate.spread:
                    continue
            differing = self._variations(first, call, held=True) & certificate.held.keys()
            if all(certificate.ready(key, first, call) for key in differing):
                alike.append(call)
        return alike

    def _variations(
        self, one: Call, other: Call, *, held: bool = False, every: bool = False
    ) -> set[Any]:
        """The unproven arguments in which two calls of a kind differ; with `held`, only held ones;
        with `every`, also proven ones."""
        certificate = self._certificates[one.kind]
        variations: set[Any] = set()
        if one is other:
            return variations
        if one.ragged != other.ragged and spread([one, other]) > certificate.spread:
            variations.add(RAGGED)
        for i, (leaf, other_leaf) in enumerate(zip(one.leaves, other.leaves, strict=True)):
            proven = i in certificate.proven or i in certificate.spans
            asked = i in certificate.held if held else every or not proven
            if asked and self._value(leaf) != self._value(other_leaf):
                variations.add(i)
            types = frozenset((_dtype(leaf), _dtype(other_leaf)))  # of times
            if len(types) > 1 and (every or (i, types) not in certificate.proven):
                variations.add((i, types))
        return variations

    def _beyond(self, calls: Sequence[Call], certificate: Certificate) -> list[Call] | None:
        """Calls to prove, if an argument of few numbers exceeds the span of every proof: those with
        its least and its largest value, and the first."""
        for i, proven in certificate.spans.items():
            if i in certificate.held or not all(readable(call, i) for call in calls):
                continue
            values = hull(span(call, i) for call in calls)
            if values.width and not any(tried.covers(values) for tried in proven):
                low = min(calls, key=lambda call: span(call, i).low)
                high = max(calls, key=lambda call: span(call, i).high)
                if low is high:
                    high = next(call for call in calls if call is not low)
                return _with_first(calls[0], low, high)
        return None

    def _value(self, leaf: tuple[Any, ...]) -> Any:
        values = [
            self._digests.of(value) if isinstance(value, torch.Tensor) else (type(value), value)
            for value in leaf
        ]
        return values[0] if len(set(values)) == 1 else tuple(values)

    # Judgements

    def judge(self, proof: Proof, prover: Prover) -> bool:
        """Record a proof, after the pair has been run a second time. Returns False if the merged
        results must not be used."""
        certificate = self.of(proof.calls[0])
        try:
            right = self._judge(proof, prover, certificate)
        except Exception as error:  # counts as an attempt, so that it is not repeated for ever
            logger.exception("comparing results in a proof of %s failed", certificate)
            reason = f"its results could not be compared: {type(error).__name__}"
            self._inconclusive(certificate, reason, "error")
            self._hold_new(proof, certificate, "its results could not be compared")
            return False
        if right:
            certificate.served.clear()
        return right

    def _judge(self, proof: Proof, prover: Prover, certificate: Certificate) -> bool:
        calls, pair = proof.calls, proof.pair
        if proof.audit:
            self._digests.recheck(tensors([call.arguments for call in pair]))
        if any(attempt.failed for attempt in proof.attempts):
            return False  # it fails alone, too, so this is no evidence about merging
        if proof.wrote or any(attempt.wrote for attempt in proof.attempts):
            certificate.readings.refute(calls[0].guesses)
            self._fail(certificate, set(), "it writes to its arguments", "writes_arguments")
            return False
        if proof.drew:
            self._fail(certificate, set(), "it draws random numbers", "random")
            return False
        single = [proof.seconds.get(id(call)) for call in pair]
        if any(output is None for output in single):
            self._inconclusive(certificate, "its results cannot be copied", "not_comparable")
            return False
        variations = proof.variations
        certificate.proofs += 1
        if isinstance(proof.merged, Exception):
            error = proof.merged
            problem = f"merged, it raised {type(error).__name__}: {error}"[:200]
            self._disagree(proof, certificate, variations, problem)
            return False
        merged = [proof.merged_of(call) for call in pair]
        copies = [partial(prover.copies, proof, call) for call in pair]
        try:
            alike = all(call.ragged == calls[0].ragged for call in calls)
            pairs = zip(merged, single, copies, strict=True)
            largest = compare([Pair(*pair, alike=alike) for pair in pairs])
        except Differ as difference:
            # an audit tries nothing new: so the whole kind is wrong
            new = set() if proof.audit else variations
            self._disagree(proof, certificate, new, str(difference))
            return False
        except NotFinite:
            self._inconclusive(certificate, "results were not finite", "not_finite", attempt=False)
            self._rest(certificate, NOT_FINITE)
            return False
        certificate.error = max(certificate.error, largest)
        rows = sum(call.rows for call in calls)
        if not told_apart(merged, single):
            unproven = variations - certificate.proven - certificate.spans.keys()
            right = certificate.state is State.CERTIFIED and not unproven
            if right:
                certificate.rows = max(certificate.rows, rows)
            else:
                self._inconclusive(certificate, "the compared calls were too alike", "too_alike")
            self._hold_new(proof, certificate, UNCLEAR)
            return right
        return self._agree(proof, prover, certificate, variations, rows)

    def _agree(
        self,
        proof: Proof,
        prover: Prover,
        certificate: Certificate,
        variations: set[Any],
        rows: int,
    ) -> bool:
        certificate.passed += 1
        certificate.attempts = certificate.rests = 0
        if certificate.state is State.PENDING and certificate.passed > certificate.failures:
            certificate.conclude(State.CERTIFIED, "merged and alone agree", None)
            certificate.next_audit = certificate.merged + 1
        certificate.readings.prove(proof.calls[0].guesses)
        if all(call.rows == 1 for call in proof.calls) and certificate.divisible is None:
            certificate.divisible = True
        certificate.rows = max(certificate.rows, rows)
        certificate.spread = max(certificate.spread, spread(proof.calls))
        if proof.audit:
            return True
        first, wrong = proof.calls[0], prover.wrong(proof)
        if sample := wrong.keys() & proof.samples:
            self._disagree(proof, certificate, set(), f"with another sample, {wrong[min(sample)]}")
            return False
        for variation in variations - {RAGGED} - proof.spans.keys():
            evident = True if variation in proof.samples else proof.evident.get(variation, False)
            if variation in wrong:
                self._hold(certificate, variation, wrong[variation], REST, first)
            elif isinstance(variation, tuple) or evident:
                certificate.proven.add(variation)
                certificate.held.pop(variation, None)
            else:
                self._hold_unclear(proof, certificate, variation, evident)
        for i, tried in proof.spans.items():
            if i in wrong:
                self._hold(certificate, i, wrong[i], REST, first, tried=tried)
            elif proof.evident.get(i) or i in proof.plain:
                certificate.held.pop(i, None)
                spans = certificate.spans.get(i, [])
                spans = [covered for covered in spans if not tried.covers(covered)]
                certificate.spans[i] = [*spans, tried]
            elif not any(covered.covers(tried) for covered in certificate.spans.get(i, [])):
                faint = proof.evident.get(i) is None or proof.effects.get(i, 1.0) <= FAINT
                slack = tried.width if faint else 0.0
                self._hold(certificate, i, UNCLEAR, HELD, first, slack, tried=tried)
        return True

    def _hold_unclear(
        self, proof: Proof, certificate: Certificate, variation: int, evident: bool | None
    ) -> None:
        """Hold an argument of many numbers without a clear effect, with a slack as far as the proof
        shows one; without limit if it has no effect."""
        pair = [proof.originals[id(call)] for call in proof.pair]
        apart = distance(*(call.leaves[variation] for call in pair))
        tried = hull(span(call, variation) for call in pair)
        slack, bounded = 0.0, False
        if evident is None:
            slack = float("inf")
            bounded = all(is_whole(value) for call in pair for value in call.leaves[variation])
            tried = hull([tried, Span(0.0, 0.0) if bounded else Span(-FAR, FAR)])
        elif apart < float("inf") and variation in proof.plain:
            slack, tried = 2 * apart, Span(tried.low - apart, tried.high + apart)
        elif apart < float("inf") and proof.effects.get(variation, 1.0) <= FAINT:
            slack = apart
        apart = max(apart, slack)
        self._hold(
            certificate, variation, UNCLEAR, HELD, proof.calls[0], slack,
            apart=apart, tried=tried, bounded=bounded,
        )  # fmt: skip

    def _hold_new(self, proof: Proof, certificate: Certificate, reason: str) -> None:
        """Hold the variations that a proof of a certified kind failed to show."""
        if certificate.state is State.CERTIFIED:
            for variation in proof.variations - certificate.proven:
                self._hold(certificate, variation, reason, HELD, proof.calls[0])
            for i, tried in proof.spans.items():
                spans = certificate.spans.get(i)
                if spans is not None and not any(covered.covers(tried) for covered in spans):
                    self._hold(certificate, i, reason, HELD, proof.calls[0], tried=tried)

    def _disagree(
        self, proof: Proof, certificate: Certificate, variations: set[Any], problem: str
    ) -> None:
        retries = certificate.repeat and certificate.ambiguous
        first_proof = certificate.state is State.PENDING and not retries and not _types(variations)
        if first_proof and _read_in_another_way(proof.calls[0], variations):
            certificate.conclude(State.FAILED, problem, "failed")
            certificate.resting = certificate.chances + REST
            logger.info("%s: trying other batch axes for its arguments", certificate)
        else:
            self._fail(certificate, variations, problem, "failed")

    def _inconclusive(
        self, certificate: Certificate, reason: str, code: UnsharedReason, *, attempt: bool = True
    ) -> None:
        if certificate.state is State.PENDING:
            certificate.attempts += attempt
            certificate.reason, certificate.code = reason, code
            if certificate.attempts >= ATTEMPTS:
                self._rest(certificate, REST)
                logger.warning("%s runs alone: %s", certificate, reason)

    def _rest(self, certificate: Certificate, chances: int) -> None:
        """Try a kind again after this many chances, doubled each time until a proof succeeds."""
        until = certificate.chances + chances * 2**certificate.rests
        certificate.resting = max(certificate.resting, until)
        certificate.rests += 1

    def _hold(
        self,
        certificate: Certificate,
        variation: Any,
        reason: str,
        wait: int,
        call: Call,
        slack: float = 0.0,
        **tried: Any,
    ) -> None:
        first = variation not in certificate.held
        held = certificate.hold(variation, reason, wait, call, slack, **tried)
        if first and held.matters:
            name = certificate.name(variation)
            logger.info("%s: merged only where %s is equal: %s", certificate, name, reason)

    def _fail(
        self, certificate: Certificate, variations: set[Any], reason: str, code: UnsharedReason
    ) -> None:
        """Hold the new variations of a failed proof; without any, the whole kind has failed."""
        certified = certificate.state is State.CERTIFIED
        new: set[Any] = (
            {RAGGED} if RAGGED in variations else variations if certified else _types(variations)
        )
        if certificate.state is State.PENDING and certificate.repeat and certificate.ambiguous:
            certificate.repeat = False
            certificate.reason, certificate.code = reason, code
        elif new:
            for variation in new:
                before = certificate.held.get(variation)
                wait = REST if before is None else 2 * before.wait
                certificate.held[variation] = Held(reason, wait, certificate.chances + wait)
                certificate.spans.pop(variation, None)
            certificate.reason, certificate.code = reason, code
            what = "of different sizes" if new == {RAGGED} else "that differ in other arguments"
            logger.warning("%s: calls %s are not merged: %s", certificate, what, reason)
        else:
            again = certificate.failures > 0
            certificate.conclude(State.FAILED, reason, code)
            certificate.failures += 1
            certificate.forget()
            certificate.resting = certificate.chances + REST * 2 ** (certificate.failures - 1)
            log = logger.info if again else logger.warning  # warn once
            log("%s runs alone: %s", certificate, reason)

    def put_off(self, call: Call, error: Exception) -> None:
        """Have a kind rest after an error in a proof."""
        certificate = self.of(call)
        reason = f"{type(error).__name__} in a proof"
        if certificate.rests == 0:
            logger.warning("the proof of %s failed: %s", certificate, reason, exc_info=error)
        self._rest(certificate, HELD)
        if certificate.state is State.PENDING:
            certificate.reason, certificate.code = reason, "error"

    def judge_parts(self, call: Call, divided: Any, proof: Proof) -> None:
        """Record whether a call's result in parts, `divided`, agrees with its whole result."""
        certificate = self.of(call)
        attempts = (attempt for attempt in proof.attempts if attempt.call is call)
        output = next((attempt.output for attempt in attempts), None)
        if certificate.state is State.CERTIFIED and output is not None:
            certificate.divisible = not isinstance(divided, Exception) and agree(divided, output)

    def divisible(self, call: Call) -> bool | None:
        """Whether a call's rows may be computed apart; if its size is untried, by other sizes; None
        if none has been tried."""
        if not isinstance(call.kind, tuple) or call.group.chunks > 1:
            return False
        certificate = self._certificates.get(call.kind)
        if certificate is not None and certificate.divisible is not None:
            return certificate.divisible
        target, layout, _, *rest = call.kind
        others = [
            other.divisible
            for kind, other in self._certificates.items()
            if isinstance(kind, tuple) and (kind[0], kind[1], [*kind[3:]]) == (target, layout, rest)
        ]
        return False if False in others else True if True in others else None

    def fail(self, call: Call, reason: str) -> None:
        """Withdraw the certificate of a kind."""
        self._fail(self.of(call), set(), reason, "failed")
        self.doubt(call)

    def doubt(self, call: Call) -> None:
        """Note the jobs with merged results of a kind whose certificate has failed."""
        served = self.of(call).served
        if served:
            self._doubtful += served
            served.clear()
            self._on_doubt()

    def forget_job(self, job: Any) -> None:
        """Forget which results a job got: it restarts."""
        for certificate in self._certificates.values():
            certificate.served.discard(job)

    def doubtful(self) -> list[Any]:
        """Take the jobs whose results are in doubt."""
        doubtful, self._doubtful = self._doubtful, []
        return doubtful


def _read_in_another_way(call: Call, variations: set[Any]) -> bool:
    """Whether there is another reading (choice of batch axes) for arguments of calls that differ so
    and whose first proof failed; it is then used."""
    rows = [
        path for i, (path, kind) in enumerate(call.paths) if kind is ROWS and i not in variations
    ]
    equal = [path for path in rows if path[0] not in TIMES]  # times are equal in some steps only
    return call.target.readings.another(call.guesses, equal)


def _types(variations: set[Any]) -> set[Any]:
    """The variations of the types of times."""
    return {variation for variation in variations if isinstance(variation, tuple)}


def _with_first(first: Call, *calls: Call) -> list[Call]:
    """These calls, and the first unless it is one of them."""
    return [*calls, *([] if any(call is first for call in calls) else [first])]


def _dtype(leaf: tuple[Any, ...]) -> Any:
    return leaf[0].dtype if isinstance(leaf[0], torch.Tensor) else None


def _shape_of_sample(call: Call) -> str:
    values = [leaf[0] for leaf in call.leaves if isinstance(leaf[0], torch.Tensor)]
    tensor = next((value for value in values if value.ndim), None)
    if tensor is None:
        return ""
    listed = isinstance(next(iter(call.arguments.values())), list)
    shape = tensor.shape if listed else tensor.shape[1:]
    return f"{'x'.join(map(str, shape))} {str(tensor.dtype).removeprefix('torch.')}"
