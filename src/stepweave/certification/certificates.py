"""Certificates: the recorded proof that a kind of call gives the same result merged and alone.

Nothing is merged on trust. The first calls of a kind that could share a forward are run merged and
one by one, and compared. What the proof did not see is not covered by it: an argument that was the
same in all calls or had no clear effect, values beyond those tried, sizes that did not differ, many
more rows. Each such variation is proven when it first occurs, or kept out of merged forwards until
it is tried again.
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

logger = logging.getLogger(__name__)

REACH = 4  # a proof with so many rows covers this many times as many
# inconclusive proofs, whose calls were too alike to tell apart, before a kind is left alone for a
# while
ATTEMPTS = 16
KEPT = 4096  # certificates; the least recently used goes first
FIRST_AUDITS = 256  # merged forwards, up to which each power of two is audited
# chances to merge, after which a kind that failed is tried again; twice as many after each failure
REST = 128
NOT_FINITE = 4  # the same for a proof that met numbers that are not finite
HELD = 8  # the same for an argument that had no clear effect; twice as many after each try

UNCLEAR = "without a clear effect on the result"
FAINT = 0.05  # an effect that matters to no result, as a share of the error allowed


class Certificates:
    """All certificates of an engine, and the decision whether calls may be merged."""

    def __init__(
        self,
        digests: Fingerprints,
        audit_every: int,
        on_doubt: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_doubt = on_doubt  # results of encoders may be wrong, too
        self._digests = digests
        self._audit_every = audit_every
        self._known: OrderedDict[Hashable, Certificate] = OrderedDict()
        self._doubtful: list[Any] = []

    def of(self, call: Call) -> Certificate:
        found = self._known.get(call.kind)
        if found is None:
            found = self._known[call.kind] = Certificate(call.target.name, _shape_of_sample(call))
            found.ambiguous = any(node[0] is REPEATED for _, node in call.group.layout)
            paths = [path for path, kind in call.paths if kind is not LISTED]
            found.readings, found.read = call.target.readings, made(paths, call.guesses)
            found.names = tuple(".".join(map(str, path)) for path, _ in call.paths)
            found.samples, found.value = samples(call), self._value
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

    # Decisions

    def decide(self, calls: Sequence[Call]) -> tuple[Verdict, list[Call]]:
        """What to do first with calls of one key, in the policy's order, and with which of them;
        the first always is among them."""
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
            # best one whose times are of the same type, so that a failure says something of all
            # calls of the kind
            varied.sort(key=lambda pair: bool(_types(pair[1])))
            other = next((call for call, variations in varied if variations), None)
            if other is None:
                return Verdict.ALONE, [first]  # equal calls prove nothing
            return Verdict.PROVE, [first, other]
        for call in alike[1:]:
            new = self._variations(first, call) - certificate.proven
            if any(
                certificate.due(one, first, call) or not certificate.within_slack(one, first, call)
                for one in new
            ):
                return Verdict.PROVE, [first, call]
        beyond = self._beyond(alike, certificate)
        if beyond is not None:
            return Verdict.PROVE, beyond
        if spread(alike) > certificate.spread:
            ends = [
                min(alike, key=lambda call: call.extents),
                max(alike, key=lambda call: call.extents),
            ]
            return Verdict.PROVE, [*ends, *([] if any(first is one for one in ends) else [first])]
        unseen = certificate.is_new(alike)
        if sum(call.rows for call in alike) > REACH * certificate.rows:
            return Verdict.AUDIT, alike
        certificate.merged += 1
        if certificate.merged >= certificate.next_audit:
            certificate.next_audit = self._next_audit(certificate.merged)
            return Verdict.AUDIT, alike
        return Verdict.LOOK if unseen else Verdict.MERGE, alike

    def known(self, calls: Sequence[Call]) -> set[int]:
        """The leaves that need no evidence any more."""
        return {one for one in self.of(calls[0]).proven if isinstance(one, int)}

    def _next_audit(self, merged: int) -> int:
        if 2 * merged <= FIRST_AUDITS:
            return min(2 * merged, merged + self._audit_every)
        return merged + self._audit_every

    def differences(self, calls: Sequence[Call]) -> set[Any]:
        """What a proof of calls is to prove: the arguments in which they differ."""
        certificate = self.of(calls[0])
        found: set[Any] = set()
        for call in calls[1:]:
            found |= self._variations(calls[0], call)
        if spread(calls) > certificate.spread:
            found.add(RAGGED)
        return found

    def pair(self, calls: Sequence[Call]) -> tuple[Call, Call]:
        """Two of the calls to audit: those furthest apart, or any two."""
        some = scalars(calls[0])
        if some and random.random() < 0.5 and all(readable(call, some[0]) for call in calls):
            line = sorted(calls, key=lambda call: span(call, some[0]).low)
            return line[0], line[-1]
        one, other = random.sample(range(len(calls)), 2)
        return calls[one], calls[other]

    def _alike(self, calls: Sequence[Call], certificate: Certificate) -> list[Call]:
        """The first call, and those that may run with it and with each other."""
        first = calls[0]
        alike = [first]
        for call in calls[1:]:
            if RAGGED in certificate.held and not certificate.ready(RAGGED, first, call):
                if spread([*alike, call]) > certificate.spread:
                    continue
            differing = self._variations(first, call, held=True) & certificate.held.keys()
            if all(certificate.ready(one, first, call) for one in differing):
                alike.append(call)
        return alike

    def _variations(
        self, one: Call, other: Call, *, held: bool = False, every: bool = False
    ) -> set[Any]:
        """In which arguments two calls of a kind differ, as far as that is not proven to be right;
        or of those that are `held`; or with `every`, of all."""
        certificate = self._known[one.kind]
        found: set[Any] = set()
        if one is other:
            return found
        if one.ragged != other.ragged and spread([one, other]) > certificate.spread:
            found.add(RAGGED)
        for i, (leaf, other_leaf) in enumerate(zip(one.leaves, other.leaves, strict=True)):
            known = i in certificate.proven or i in certificate.spans
            asked = i in certificate.held if held else every or not known
            if asked and self._value(leaf) != self._value(other_leaf):
                found.add(i)
            types = frozenset((_dtype(leaf), _dtype(other_leaf)))  # of times
            if len(types) > 1 and (every or (i, types) not in certificate.proven):
                found.add((i, types))
        return found

    def _beyond(self, calls: Sequence[Call], certificate: Certificate) -> list[Call] | None:
        """Calls to prove if an argument of few numbers lies beyond what any one proof has spanned:
        the ends, and the first."""
        for i, proven in certificate.spans.items():
            if i in certificate.held or not all(readable(call, i) for call in calls):
                continue
            found = hull(span(call, i) for call in calls)
            if found.width and not any(one.covers(found) for one in proven):
                low = min(calls, key=lambda call: span(call, i).low)
                high = max(calls, key=lambda call: span(call, i).high)
                ends = (
                    [low, high]
                    if low is not high
                    else [low, next(one for one in calls if one is not low)]
                )
                return [*ends, *([] if any(calls[0] is one for one in ends) else [calls[0]])]
        return None

    def _value(self, leaf: tuple[Any, ...]) -> Any:
        values = [
            self._digests.of(one) if isinstance(one, torch.Tensor) else (type(one), one)
            for one in leaf
        ]
        return values[0] if len(set(values)) == 1 else tuple(values)

    # Judgements

    def judge(self, proof: Proof, prover: Prover) -> bool:
        """Record a proof, after the pair has been run a second time. False: what was merged must
        not be used."""
        certificate = self.of(proof.calls[0])
        try:
            right = self._judge(proof, prover, certificate)
        except Exception as error:  # an attempt like another, so that it is not made for ever
            logger.exception(
                "a proof of %s %s could not be judged", certificate.target, certificate.sample
            )
            self._inconclusive(
                certificate, f"it could not be judged: {type(error).__name__}", "error"
            )
            self._hold_new(proof, certificate, "it could not be judged")
            return False
        if right:
            certificate.served.clear()
        return right

    def _judge(self, proof: Proof, prover: Prover, certificate: Certificate) -> bool:
        calls, pair = proof.calls, proof.pair
        if proof.audit:
            self._digests.recheck(tensors([call.arguments for call in pair]))
        if any(attempt.failed for attempt in proof.attempts):
            return False  # it fails alone, too, which says nothing of merging
        if proof.wrote or any(attempt.wrote for attempt in proof.attempts):
            certificate.readings.refute(calls[0].guesses)
            self._fail(certificate, set(), "it writes to its arguments", "writes_arguments")
            return False
        if proof.drew:
            self._fail(certificate, set(), "it draws random numbers", "random")
            return False
        single = [proof.seconds.get(id(call)) for call in pair]
        if any(one is None for one in single):
            self._inconclusive(certificate, "its results cannot be copied", "not_comparable")
            return False
        variations = proof.variations
        certificate.proofs += 1
        if isinstance(proof.merged, Exception):
            error = proof.merged
            self._disagree(
                proof,
                certificate,
                variations,
                f"merged, it raised {type(error).__name__}: {error}"[:200],
            )
            return False
        merged = [proof.merged_of(call) for call in pair]
        copies = [partial(prover.copies, proof, call) for call in pair]
        try:
            alike = all(call.ragged == calls[0].ragged for call in calls)
            found = compare(
                [Pair(*one, alike=alike) for one in zip(merged, single, copies, strict=True)]
            )
        except Differ as difference:
            # an audit tries nothing new: what it finds is wrong with the kind
            self._disagree(
                proof, certificate, set() if proof.audit else variations, str(difference)
            )
            return False
        except NotFinite:
            self._inconclusive(certificate, "results were not finite", "not_finite", attempt=False)
            self._rest(certificate, NOT_FINITE)
            return False
        certificate.error = max(certificate.error, found)
        rows = sum(call.rows for call in calls)
        if not told_apart(merged, single):
            if (
                certificate.state is State.CERTIFIED
                and not variations - certificate.proven - certificate.spans.keys()
            ):
                certificate.rows = max(certificate.rows, rows)
                self._hold_new(proof, certificate, UNCLEAR)
                return True
            self._inconclusive(
                certificate, "the calls compared were too alike to tell apart", "too_alike"
            )
            self._hold_new(proof, certificate, UNCLEAR)
            return False
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
            certificate.state, certificate.code, certificate.reason = (
                State.CERTIFIED,
                "",
                "merged and alone agree",
            )
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
                known = certificate.spans.setdefault(i, [])
                known[:] = [one for one in known if not tried.covers(one)]
                known.append(tried)
            elif not any(one.covers(tried) for one in certificate.spans.get(i, [])):
                faint = proof.evident.get(i) is None or proof.effects.get(i, 1.0) <= FAINT
                self._hold(
                    certificate, i, UNCLEAR, HELD, first, tried.width if faint else 0.0, tried=tried
                )
        return True

    def _hold_unclear(
        self, proof: Proof, certificate: Certificate, variation: int, evident: bool | None
    ) -> None:
        """Hold an argument of many numbers whose effect is small, as far as it was tried, or free
        it where it has none."""
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
            certificate,
            variation,
            UNCLEAR,
            HELD,
            proof.calls[0],
            slack,
            apart=apart,
            tried=tried,
            bounded=bounded,
        )

    def _hold_new(self, proof: Proof, certificate: Certificate, reason: str) -> None:
        """Hold what a proof of a certified kind was to show, and did not."""
        if certificate.state is State.CERTIFIED:
            for variation in proof.variations - certificate.proven:
                self._hold(certificate, variation, reason, HELD, proof.calls[0])
            for i, tried in proof.spans.items():
                if i in certificate.spans and not any(
                    one.covers(tried) for one in certificate.spans[i]
                ):
                    self._hold(certificate, i, reason, HELD, proof.calls[0], tried=tried)

    def _disagree(
        self, proof: Proof, certificate: Certificate, variations: set[Any], problem: str
    ) -> None:
        first_proof = certificate.state is State.PENDING and not (
            certificate.repeat and certificate.ambiguous
        )
        if (
            first_proof
            and not _types(variations)
            and _read_in_another_way(proof.calls[0], variations)
        ):
            certificate.state, certificate.reason, certificate.code = (
                State.FAILED,
                problem,
                "failed",
            )
            certificate.resting = certificate.chances + REST
            logger.info(
                "%s %s: its arguments are read in another way",
                certificate.target,
                certificate.sample,
            )
        else:
            self._fail(certificate, variations, problem, "failed")

    def _inconclusive(
        self, certificate: Certificate, reason: str, code: str, *, attempt: bool = True
    ) -> None:
        if certificate.state is State.PENDING:
            certificate.attempts += attempt
            certificate.reason, certificate.code = reason, code
            if certificate.attempts >= ATTEMPTS:
                self._rest(certificate, REST)
                logger.warning(
                    "%s %s runs alone: %s", certificate.target, certificate.sample, reason
                )

    def _rest(self, certificate: Certificate, chances: int) -> None:
        """Try a kind again only after a while, twice as long each time until a proof succeeds."""
        certificate.resting = max(
            certificate.resting, certificate.chances + chances * 2**certificate.rests
        )
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
            logger.info(
                "%s %s: merged only where %s is equal: %s",
                certificate.target, certificate.sample, certificate.name(variation), reason,
            )  # fmt: skip

    def _fail(self, certificate: Certificate, variations: set[Any], reason: str, code: str) -> None:
        """Hold what was new in this proof; a kind that fails with nothing new is not to be trusted
        at all."""
        certified = certificate.state is State.CERTIFIED
        new: set[Any] = (
            {RAGGED} if RAGGED in variations else variations if certified else _types(variations)
        )
        if certificate.state is State.PENDING and certificate.repeat and certificate.ambiguous:
            certificate.repeat = False
            certificate.reason, certificate.code = reason, code
        elif new:
            for variation in new:
                known = certificate.held.get(variation)
                wait = REST if known is None else 2 * known.wait
                certificate.held[variation] = Held(reason, wait, certificate.chances + wait)
                certificate.spans.pop(variation, None)
            certificate.reason, certificate.code = reason, code
            what = (
                "calls of different sizes"
                if new == {RAGGED}
                else "calls that differ in further arguments"
            )
            logger.warning(
                "%s %s: %s are not merged: %s", certificate.target, certificate.sample, what, reason
            )
        else:
            again = certificate.failures > 0
            certificate.state, certificate.reason, certificate.code = State.FAILED, reason, code
            certificate.failures += 1
            certificate.forget()
            certificate.resting = certificate.chances + REST * 2 ** (certificate.failures - 1)
            log = logger.info if again else logger.warning  # once
            log("%s %s runs alone: %s", certificate.target, certificate.sample, reason)

    def put_off(self, call: Call, error: Exception) -> None:
        """A proof could not be made: try again after a while."""
        certificate = self.of(call)
        reason = f"{type(error).__name__} in a proof"
        if certificate.rests == 0:
            logger.warning(
                "%s %s could not be tried: %s",
                certificate.target,
                certificate.sample,
                reason,
                exc_info=error,
            )
        self._rest(certificate, HELD)
        if certificate.state is State.PENDING:
            certificate.reason, certificate.code = reason, "error"

    def judge_parts(self, call: Call, divided: Any, proof: Proof) -> None:
        """Record whether a call gave in parts, as `divided`, what it gave as a whole in a proof."""
        certificate = self.of(call)
        output = next((one.output for one in proof.attempts if one.call is call), None)
        if certificate.state is State.CERTIFIED and output is not None:
            certificate.divisible = not isinstance(divided, Exception) and agree(divided, output)

    def divisible(self, call: Call) -> bool | None:
        """Whether a call's rows may be computed apart; where its own size was never tried, whether
        another's may."""
        if not isinstance(call.kind, tuple) or call.group.chunks > 1:
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
        self._fail(self.of(call), set(), reason, "failed")
        self.doubt(call)

    def doubt(self, call: Call) -> None:
        """Note whose results are in doubt: jobs that had merged ones of a kind that has turned out
        not to be mergeable."""
        served = self.of(call).served
        if served:
            self._doubtful += served
            served.clear()
            self._on_doubt()

    def forget_job(self, job: Any) -> None:
        """A job starts again: what it was given before is no longer in doubt."""
        for certificate in self._known.values():
            certificate.served.discard(job)

    def doubtful(self) -> list[Any]:
        """The jobs whose results are in doubt, told once."""
        doubtful, self._doubtful = self._doubtful, []
        return doubtful


def _read_in_another_way(call: Call, variations: set[Any]) -> bool:
    """Whether there is another way to read the arguments of calls whose first proof failed, in
    which they differ so."""
    rows = [
        path for i, (path, kind) in enumerate(call.paths) if kind is ROWS and i not in variations
    ]
    equal = [path for path in rows if path[0] not in TIMES]  # they are equal at the first step only
    return call.target.readings.another(call.guesses, equal)


def _types(variations: set[Any]) -> set[Any]:
    """The variations that are of types of times."""
    return {one for one in variations if isinstance(one, tuple)}


def _dtype(leaf: tuple[Any, ...]) -> Any:
    return leaf[0].dtype if isinstance(leaf[0], torch.Tensor) else None


def _shape_of_sample(call: Call) -> str:
    tensor = next(
        (leaf[0] for leaf in call.leaves if isinstance(leaf[0], torch.Tensor) and leaf[0].ndim),
        None,
    )
    if tensor is None:
        return ""
    shape = (
        tensor.shape if isinstance(next(iter(call.arguments.values())), list) else tensor.shape[1:]
    )
    return f"{'x'.join(map(str, shape))} {str(tensor.dtype).removeprefix('torch.')}"
