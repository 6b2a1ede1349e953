"""Runs proofs and audits: calls merged, and alone in their own fibers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stepweave.batching.call import Call
from stepweave.batching.merge import join
from stepweave.certification.certificate import State
from stepweave.certification.certificates import Certificates
from stepweave.certification.proof import Proof, Prover
from stepweave.certification.state_watch import Watches, same
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.stateful_modules import some
from stepweave.planning.stats import Stats

Answers = Iterator[tuple[Call, Any]]


class Proving:
    """Runs calls of one key merged, and two of them alone, and records the result in their
    certificate.

    Args:
        alone: runs each call alone: yields their answers, and returns their attempts. With `keep`
            the attempts keep copies of the results.
        deliver: yields merged results to their calls.
        ran_out: called with a call and the number of rows for which memory ran out.
        part: computes the result of some of a call's rows, as a trial.
        limit: the largest number of rows of a forward with a call.
    """

    def __init__(
        self,
        certificates: Certificates,
        watches: Watches,
        stats: Stats,
        device_types: tuple[str, ...],
        *,
        alone: Callable[..., Any],
        deliver: Callable[[Sequence[Call], Sequence[Any]], Answers],
        ran_out: Callable[[Call, int], None],
        part: Callable[[Call, int, int], Any],
        limit: Callable[[Call], int],
    ) -> None:
        self._certificates = certificates
        self._watches = watches
        self._stats = stats
        self._device_types = device_types
        self._alone = alone
        self._deliver = deliver
        self._ran_out = ran_out
        self._part = part
        self._limit = limit

    def prove(self, calls: Sequence[Call], *, audit: bool, brief: bool = False) -> Answers:
        """Run a proof or an audit. In a proof the two calls get their results of running alone a
        second time, in an audit merged ones. A `brief` audit runs each alone only once."""
        first = calls[0]
        self._stats.proofs += 1
        certificate = self._certificates.of(first)
        pair = self._certificates.pair(calls) if audit else (calls[0], calls[1])
        watch = self._watches.of(first.target)
        prover = Prover(self._device_types, repeat=certificate.repeat, most_rows=self._limit(first))
        variations = self._certificates.differences(calls)
        proof, short = None, False
        try:
            proven = self._certificates.proven(calls)
            proof = prover.start(calls, pair, audit=audit, proven=proven, brief=brief)
        except Exception as error:  # of a call alone, which its fiber will raise; or out of memory
            short = ran_out(error)
            if not short and not prover.in_call:
                self._certificates.put_off(first, error)
        self._stats.checks += prover.forwards
        if proof is None:  # outside of the handler, whose error holds the memory
            if short:
                self._ran_out(first, sum(call.rows for call in calls))
            yield from self._alone(calls)
            return
        proof.variations = variations
        if proof.module_changes:
            watch.found = f"a forward changes {some(proof.module_changes)}"
        if watch.found is not None:
            for call in calls:
                watch.used_by(call.owner)
            yield from self._alone(calls)  # their jobs will restart
            return
        parts = self._try_parts(calls) if isinstance(proof.merged, list) else None
        if not audit:
            proof.attempts = yield from self._alone(pair[::-1], keep=True)
            self._stats.checks += 2
            proof.seconds = {id(attempt.call): attempt.output for attempt in proof.attempts}
        self._look_again(proof)
        counted = prover.forwards
        right = watch.found is None and self._certificates.judge(proof, prover)
        self._stats.checks += prover.forwards - counted  # batches of copies
        if parts is not None:
            self._certificates.judge_parts(*parts, proof)
        if certificate.state is State.FAILED:
            self._certificates.doubt(first)
        pair_ids = set() if audit else {id(call) for call in pair}
        rest = [i for i, call in enumerate(calls) if id(call) not in pair_ids]
        calls_left, merged = [calls[i] for i in rest], proof.merged
        if right and rest and isinstance(merged, list):
            rows = sum(call.rows for call in calls_left)
            self._stats.forward(first.target.name, rows, len(rest))
            yield from self._deliver(calls_left, [merged[i] for i in rest])
        else:
            yield from self._alone(calls_left)

    def _look_again(self, proof: Proof) -> None:
        """Note it if a second run of the pair gave other results: the module keeps state."""
        watch = self._watches.of(proof.calls[0].target)
        failed = any(attempt.failed for attempt in proof.attempts)
        if watch.found is not None or failed or proof.drew or proof.wrote:
            return
        for call in map(id, proof.pair):
            second = proof.seconds.get(call)
            if second is not None and not same(proof.singles[call], second, proof.again.get(call)):
                watch.found = "the same call gives another result after other calls"

    def _try_parts(self, calls: Sequence[Call]) -> tuple[Call, Any] | None:
        """Run a call of several rows in halves, for `judge_parts`. Returns it with its result or
        error; None if it is known whether the kind is divisible."""
        call = max(calls, key=lambda call: call.rows)
        known = self._certificates.of(call).divisible is not None
        if known or call.rows < 2 or call.group.chunks > 1:
            return None
        middle = call.rows // 2
        try:
            self._stats.checks += 2
            halves = [self._part(call, a, b) for a, b in ((0, middle), (middle, call.rows))]
            return call, join(halves, [middle, call.rows - middle], listed=call.group.listed)
        except Exception as error:
            return None if ran_out(error) else (call, error.with_traceback(None))
