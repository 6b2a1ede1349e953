"""One forward for many calls."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from stepweave.batching.call import Call, Unmergeable
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.forward import run_arguments, run_merged
from stepweave.batching.merge import copied, split
from stepweave.batching.parts import join, part
from stepweave.certification.certificate import Certificate, State, Verdict
from stepweave.certification.certificates import Certificates
from stepweave.certification.compare import agree, told_apart
from stepweave.certification.proof import Proof, Prover
from stepweave.certification.state_watch import same, some
from stepweave.compat.snapshot import Given
from stepweave.engine.hooks import RunYourself
from stepweave.errors import OutOfMemory
from stepweave.memory.device import DeviceMemory, Room, ran_out
from stepweave.planning.clock import Clock
from stepweave.planning.planner import Planner
from stepweave.planning.stats import Stats
from stepweave.scheduling.task import Demand, Key

logger = logging.getLogger(__name__)


class Starved:
    """The answer to a call that does not fit into memory now, however few of its rows at a time."""

    def __init__(self, call: Call) -> None:
        self.call = call


class Forwarder:
    """Runs calls of one key: alone, merged, or both ways to prove that they may be.

    `advance` is given a call's owner and the answer: its result, RunYourself, Starved or an error.
    The planner is told how long a forward took that went well, until all its fibers waited again.
    """

    def __init__(
        self,
        certificates: Certificates,
        cache: EncoderCache,
        stats: Stats,
        memory: DeviceMemory,
        kinds: tuple[str, ...],
        max_rows: int,
        advance: Callable[[Any, Any], None],
        clock: Clock,
        planner: Planner,
    ) -> None:
        self._certificates = certificates
        self._cache = cache
        self._stats = stats
        self._kinds = kinds
        self._max_rows = max_rows
        self._advance = advance
        self._clock = clock
        self._planner = planner
        self._room = Room(memory)
        self._doubtful: list[Any] = []

    def limit(self, call: Call) -> int:
        """The most rows of a forward with this call."""
        return self._room.limit(call.kind, min(self._max_rows, call.target.cap or self._max_rows))

    def fits(self, demand: Demand) -> bool:
        """Whether the memory that is left is enough for each of a job's calls, as far as is known;
        in parts, if need be."""
        return all(
            self._room.fits(load.key, 1) for load in (*demand.before, *demand.step, *demand.after)
        )

    def decide(self, calls: list[Call]) -> tuple[Verdict, list[Call]]:
        """What to do first with calls of one key, and with which of them."""
        try:
            return self._certificates.decide(calls)
        except Exception:
            self._stats.errors += 1
            logger.exception(
                "no certificate could be had for a call of %s; it runs alone", calls[0].target.name
            )
            return Verdict.ALONE, calls[:1]

    def run(self, verdict: Verdict, calls: list[Call]) -> None:
        """Do it, and let the calls' owners go on."""
        watch = calls[0].target.watch
        if watch is not None and not calls[0].own:
            watch.begin(calls[0].target.module)
        if verdict is Verdict.ALONE:
            self._alone(calls)
        elif verdict is not Verdict.MERGE:
            self._prove(calls, audit=verdict is not Verdict.PROVE, brief=verdict is Verdict.LOOK)
        else:
            self._merged(calls)

    def _alone(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if (
                call.rows > self.limit(call)
                and not call.whole
                and self._certificates.divisible(call)
            ):
                answer = self._in_parts(call)
                if not isinstance(answer, RunYourself):
                    self._stats.called(call.target.name)
                    self._advance(call.owner, answer)
                    continue
            self._stats.forward(call.target.name, call.rows, 1)
            call.keep = call.keep or call.cache_key is not None
            watch = call.target.watch
            call.check = watch is not None and not call.own and watch.due(call.kind, call.owner)
            started = self._clock.start()
            with self._room.measured(call.kind, call.rows, call.cost):
                self._advance(call.owner, RunYourself())
            if not (call.failed or call.ran_out):
                self._clock.stop(
                    started, partial(self._ran_alone, call.cost, call.cap, call.rows, call.looked)
                )
            if not call.wrote:
                self._remember(call, call.output)
            if not call.ran_out:
                self._room.fitted(call.kind)

    def _ran_alone(self, key: Key, cap: int, rows: int, looked: float, seconds: float) -> None:
        self._planner.ran(key, cap, rows, max(0.0, seconds - looked))

    def _merged(self, calls: Sequence[Call]) -> None:
        kind, rows = calls[0].kind, sum(call.rows for call in calls)
        outputs, reason = None, ""
        started = self._clock.start()
        try:
            with self._room.measured(kind, rows, calls[0].cost):
                outputs = run_merged(
                    calls, self._kinds, repeat=self._certificates.of(calls[0]).repeat
                )
        except Exception as error:  # let go of here, since it holds on to the memory
            if not ran_out(error):
                reason = f"merged, it raised {type(error).__name__}: {error}"[:200]
        if reason:
            self._retry(calls, reason)
            return
        if outputs is None:
            self._ran_out(calls[0], rows)
            self._halve(calls)
            return
        self._room.fitted(kind)
        self._stats.forward(calls[0].target.name, rows, len(calls))
        self._deliver(calls, outputs)
        self._clock.stop(started, partial(self._planner.ran, calls[0].cost, calls[0].cap, rows))

    def _deliver(self, calls: Sequence[Call], outputs: Sequence[Any]) -> None:
        """Let the calls' owners go on with results of a merged forward."""
        watch = calls[0].target.watch
        served = self._certificates.of(calls[0]).served
        for call, output in zip(calls, outputs, strict=True):
            if watch is not None:
                watch.used_by(call.owner)
            served.add(call.owner)
            self._remember(call, output)
            self._advance(call.owner, output)

    def _doubt(self, certificate: Certificate) -> None:
        """Have the jobs begin anew that had results of a kind that has turned out not to be
        mergeable."""
        if certificate.served:
            self._doubtful += certificate.served
            certificate.served.clear()
            self._cache.clear()

    def doubtful(self) -> list[Any]:
        """Owners that had results of merged forwards of a kind that has turned out not to be
        mergeable, told once."""
        found, self._doubtful = self._doubtful, []
        return found

    def _retry(self, calls: Sequence[Call], reason: str) -> None:
        """Run alone what failed merged. If all goes well then, merging is to blame."""
        self._stats.retried += 1
        for call in calls:
            call.keep = True
        self._alone(calls)
        if not any(call.failed for call in calls):
            self._certificates.fail(calls[0], reason)
            self._doubt(self._certificates.of(calls[0]))

    def _halve(self, calls: Sequence[Call]) -> None:
        """What does not fit into memory at once is run in halves, down to single calls."""
        middle = len(calls) // 2
        for half in (calls[:middle], calls[middle:]):
            if len(half) == 1:
                self._alone(half)
            else:
                self._merged(half)

    def _ran_out(self, call: Call, rows: int) -> None:
        """Learn that so many rows of a call's kind do not fit."""
        self._stats.out_of_memory += 1
        self._room.failed(call.kind, rows)
        self._room.memory.free()

    def relieve(self, call: Call, *, again: bool = False) -> Any:
        """The answer to a call that ran out of memory by itself: to run once more, if there is more
        room now, or in parts."""
        if again:
            call.retried = True
            return RunYourself()
        gc.collect()  # what ended jobs leave behind is in cycles
        self._ran_out(call, call.rows)
        if call.overwritten:
            return too_little(call)
        if self._cache.clear() and not call.retried:
            call.retried = True
            return RunYourself()
        divisible = call.rows > 1 and not call.whole and self._divisible(call)
        return self._in_parts(call) if divisible else Starved(call)

    def _in_parts(self, call: Call) -> Any:
        """The answer to a call, from forwards of some of its rows at a time; to run itself if it
        has no parts."""
        started = self._clock.start()
        outputs: list[Any] = []
        counts: list[int] = []
        repeat = self._certificates.of(call).repeat
        size = min(self.limit(call), (call.rows + 1) // 2)
        while sum(counts) < call.rows:
            start = sum(counts)
            rows = min(size, call.rows - start)
            try:
                with self._room.measured(call.kind, rows, call.cost):
                    outputs.append(
                        run_arguments(
                            call, part(call, start, start + rows, repeat=repeat), self._kinds
                        )
                    )
                counts.append(rows)
                continue
            except Exception as error:
                if not ran_out(error):
                    return self._whole(call, error)
            self._ran_out(call, rows)
            if rows == 1:
                return Starved(call)
            size = rows // 2
        try:
            output = join(outputs, counts, listed=call.listed)
        except Unmergeable as error:
            return self._whole(call, error)
        self._stats.divided += 1
        for rows in counts:
            self._stats.forward(call.target.name, rows, 0)
        self._remember(call, output)
        self._clock.stop(started, partial(self._planner.ran, call.cost, call.cap, call.rows))
        return output

    def _whole(self, call: Call, error: Exception) -> Any:
        """The answer to a call whose parts failed otherwise than for want of memory."""
        logger.warning(
            "%s is not run in parts: %s: %s", call.target.name, type(error).__name__, error
        )
        self._certificates.of(call).divisible = False
        return Starved(call) if call.ran_out else RunYourself()

    def _divisible(self, call: Call) -> bool:
        """Whether a call's rows may be computed apart from each other; tried with a few of them if
        nothing is known."""
        known = self._certificates.divisible(call)
        if known is None and call.rows > 2:
            try:
                pair, *single = (self._part_of(call, a, b) for a, b in ((0, 2), (0, 1), (1, 2)))
                rows = split(pair, [1, 1], listed=call.listed)
                right = all(agree(one, other) for one, other in zip(rows, single, strict=True))
                known = (told_apart(rows, single) or None) if right else False
            except Exception as error:
                known = None if ran_out(error) else False
                logger.info(
                    "%s was not divided: %s: %s", call.target.name, type(error).__name__, error
                )
            self._certificates.of(call).divisible = known
        return bool(known)

    def _part_of(self, call: Call, start: int, stop: int) -> Any:
        """The result of some of a call's rows, tried out. Raises Unmergeable if that leaves
        something behind."""
        arguments = copied(part(call, start, stop, repeat=self._certificates.of(call).repeat))
        given = Given(*arguments.values())
        try:
            output = run_arguments(call, arguments, self._kinds)
        finally:
            changed = given.drew() or given.wrote()
            given.put_back()
        if changed:
            raise Unmergeable("it writes to its arguments, or draws random numbers")
        return output

    def _prove(self, calls: Sequence[Call], *, audit: bool, brief: bool = False) -> None:
        """Run calls merged, and two of them by themselves, twice unless `brief`; in a proof these
        two get their own results."""
        self._stats.proofs += 1
        certificate = self._certificates.of(calls[0])
        pair = self._certificates.pair(calls) if audit else (calls[0], calls[1])
        watch = calls[0].target.watch
        prover = Prover(self._kinds, repeat=certificate.repeat, most_rows=self.limit(calls[0]))
        variations = self._certificates.differences(calls)
        proof, short = None, False
        try:
            known = self._certificates.known(calls)
            proof = prover.start(calls, pair, audit=audit, known=known, brief=brief)
        except Exception as error:
            # of a single call, which its own fiber will meet; or memory ran out
            short = ran_out(error)
            if not short and not prover.in_call:
                self._certificates.put_off(calls[0], error)
        self._stats.checks += prover.forwards
        if proof is None:  # outside of the handler, whose error holds on to the memory
            if short:
                self._ran_out(calls[0], sum(call.rows for call in calls))
            self._alone(calls)
            return
        proof.variations = variations
        if proof.left and watch is not None:
            watch.found = f"a forward changes {some(proof.left)}"
        if watch is not None and watch.found is not None:
            for call in calls:
                watch.used_by(call.owner)
            self._alone(calls)  # whose jobs begin anew
            return
        parts = self._try_parts(calls) if isinstance(proof.merged, list) else None
        if not audit:
            for call in pair:
                call.keep = True
            self._alone(pair[::-1])
            self._stats.checks += 2
            proof.seconds = {id(call): call.output for call in pair}
        self._look_again(calls[0], proof)
        counted = prover.forwards
        right = not (watch is not None and watch.found is not None) and self._certificates.judge(
            proof, prover
        )
        self._stats.checks += prover.forwards - counted  # batches of copies
        if parts is not None:
            self._certificates.judge_parts(*parts)
        if certificate.state is State.FAILED:
            self._doubt(certificate)
        for call in pair:
            call.output = None
        rest = [i for i, call in enumerate(calls) if audit or not any(call is one for one in pair)]
        if right and rest and isinstance(proof.merged, list):
            self._stats.forward(calls[0].target.name, sum(calls[i].rows for i in rest), len(rest))
            self._deliver([calls[i] for i in rest], [proof.merged[i] for i in rest])
        else:
            self._alone([calls[i] for i in rest])

    def _look_again(self, call: Call, proof: Proof) -> None:
        """Whether the module keeps something of a call, after each of a pair was run twice."""
        watch = call.target.watch
        if (
            watch is None
            or watch.found is not None
            or any(one.failed or one.ran_out for one in proof.pair)
        ):
            return
        if not (proof.drew or proof.wrote):
            for one in map(id, proof.pair):
                second = proof.seconds.get(one)
                if second is not None and not same(
                    proof.singles[one], second, proof.again.get(one)
                ):
                    watch.found = "the same call gives another result after others"

    def _try_parts(self, calls: Sequence[Call]) -> tuple[Call, Any] | None:
        """What a call of several rows gives in halves, to be compared with what it gives as a
        whole; None if that is known."""
        call = max(calls, key=lambda call: call.rows)
        if call.rows < 2 or call.chunks > 1 or self._certificates.of(call).divisible is not None:
            return None
        middle = call.rows // 2
        try:
            self._stats.checks += 2
            halves = [self._part_of(call, a, b) for a, b in ((0, middle), (middle, call.rows))]
            return call, join(halves, [middle, call.rows - middle], listed=call.listed)
        except Exception as error:
            return None if ran_out(error) else (call, error.with_traceback(None))

    def _remember(self, call: Call, output: Any) -> None:
        if call.cache_key is not None and output is not None:
            self._cache.put(call.cache_key, output)


def too_little(call: Call) -> OutOfMemory:
    """What to tell a job whose call does not fit into memory."""
    return OutOfMemory(
        f"There is not enough memory for this job, even alone: {call.target.name} ran out of it, "
        f"with {call.rows} rows"
        f"{', which a reproducible job may not divide' if call.whole and call.rows > 1 else ''}. "
        "Ask for a smaller size, or fewer pictures."
    )
