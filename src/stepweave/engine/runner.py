"""One forward for many calls: alone, merged, or both ways as a proof."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from stepweave.batching.call import Attempt, Call
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.forward import run_merged
from stepweave.certification.certificate import Verdict
from stepweave.certification.certificates import Certificates
from stepweave.certification.proving import Proving
from stepweave.certification.state_watch import Watches
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.own_state import Looks
from stepweave.memory.device import DeviceMemory
from stepweave.memory.microbatch import Microbatches
from stepweave.memory.row_limits import RowLimits
from stepweave.planning.clock import clock_of
from stepweave.planning.planner import Planner
from stepweave.planning.stats import Stats
from stepweave.scheduling.queues import cost_of
from stepweave.scheduling.task import Demand, Key

logger = logging.getLogger(__name__)

Answers = Iterator[tuple[Call, Any]]


class Batch(NamedTuple):
    """The calls of the next forward, all of one key, and how to run them."""

    verdict: Verdict
    calls: Sequence[Call]


class BatchRunner:
    """Yields calls with their answers: a result, an `Attempt` if the call's own fiber is to run it,
    or `WaitForMemory`. The caller must resume the call's fiber before it asks for the next."""

    def __init__(
        self,
        certificates: Certificates,
        cache: EncoderCache,
        stats: Stats,
        memory: DeviceMemory,
        planner: Planner,
        device: torch.device,
        device_types: tuple[str, ...],
        max_rows: int,
    ) -> None:
        self.watches = Watches()
        self._certificates = certificates
        self._cache = cache
        self._stats = stats
        self._planner = planner
        self._device_types = device_types
        self._max_rows = max_rows
        self._clock = clock_of(device)
        self._limits = RowLimits(memory)
        self._microbatches = Microbatches(
            self._limits, self.limit, certificates, cache, stats, device_types,
            start=self._clock.start, done=self._done,
        )  # fmt: skip
        self._proving = Proving(
            certificates, self.watches, stats, device_types,
            alone=self._alone, deliver=self._deliver, ran_out=self._microbatches.note_ran_out,
            part=self._microbatches.part, limit=self.limit,
        )  # fmt: skip
        self.answer_out_of_memory = self._microbatches.answer_out_of_memory

    def limit(self, call: Call) -> int:
        """The largest number of rows of a forward with this call."""
        most = min(self._max_rows, call.target.cap or self._max_rows)
        return self._limits.limit(call.kind, most, call.cost.adapters)

    def fits(self, demand: Demand) -> bool:
        """Whether each of a job's calls fits into the free memory, in parts if necessary; True if
        its memory is not yet known."""
        loads = (*demand.before, *demand.step, *demand.after)
        return all(self._limits.fits(load.key, 1) for load in loads)

    def decide(self, calls: list[Call]) -> Batch:
        """Decide which of these calls of one key run now, and how."""
        try:
            return Batch(*self._certificates.decide(calls))
        except Exception:
            self._stats.errors += 1
            logger.exception("no decision for a call of %s; running it alone", calls[0].target.name)
            return Batch(Verdict.ALONE, calls[:1])

    def run(self, batch: Batch) -> Answers:
        verdict, calls = batch
        if not calls[0].on_own_modules:
            self.watches.of(calls[0].target).begin(calls[0].target.module)
        if verdict is Verdict.ALONE:
            yield from self._alone(calls)
        elif verdict is Verdict.MERGE:
            yield from self._merged(calls)
        else:
            brief, audit = verdict is Verdict.LOOK, verdict is not Verdict.PROVE
            yield from self._proving.prove(calls, audit=audit, brief=brief)

    def _alone(
        self, calls: Sequence[Call], *, keep: bool = False
    ) -> Generator[tuple[Call, Any], None, list[Attempt]]:
        """Run each call by itself, in its own fiber, or in parts if it is known not to fit into
        memory. Returns the attempts of the fibers."""
        attempts = []
        for call in calls:
            answer = self._microbatches.run(call) if self._microbatches.wanted(call) else None
            if answer is not None:
                self._stats.called(call.target.name)
                yield call, answer
                continue
            self._stats.forward(call.target.name, call.rows, 1)
            attempt = Attempt(call, keep or call.cache_key is not None)
            attempts.append(attempt)
            watch = self.watches.of(call.target)
            watched = not call.on_own_modules and watch.due(call.kind, call.owner)
            if watched:
                attempt.run = watch.run
            looks, started = Looks([call.owner.fiber]), self._clock.start()
            with self._limits.measured(call.kind, call.rows, call.cost):
                yield call, attempt
            if not attempt.failed:
                looked = looks.seconds + (watch.seconds if watched else 0.0)
                self._clock.stop(started, partial(self._ran, call.cost, call.rows, looked))
                if not attempt.wrote:
                    self._remember(call, attempt.output)
            if not attempt.ran_out:
                self._limits.fitted(call.kind)
        return attempts

    def _merged(self, calls: Sequence[Call]) -> Answers:
        first, rows, cost = calls[0], sum(call.rows for call in calls), cost_of(calls)
        outputs, reason = None, ""
        looks, started = Looks(call.owner.fiber for call in calls), self._clock.start()
        try:
            with self._limits.measured(first.kind, rows, cost):
                repeat = self._certificates.of(first).repeat
                outputs = run_merged(calls, self._device_types, repeat=repeat)
        except Exception as error:  # not kept: its traceback would hold the memory
            if not ran_out(error):
                reason = f"merged, it raised {type(error).__name__}: {error}"[:200]
        if outputs is not None:
            self._limits.fitted(first.kind)
            self._stats.forward(first.target.name, rows, len(calls))
            yield from self._deliver(calls, outputs)
            self._clock.stop(started, partial(self._ran, cost, rows, looks.seconds))
        elif reason:  # if all succeed alone, merging is the cause
            self._stats.retried += 1
            attempts = yield from self._alone(calls)
            if not any(attempt.failed for attempt in attempts):
                self._certificates.fail(first, reason)
        else:  # out of memory: run halves, down to single calls
            self._microbatches.note_ran_out(first, rows)
            middle = len(calls) // 2
            for half in (calls[:middle], calls[middle:]):
                yield from self._alone(half) if len(half) == 1 else self._merged(half)

    def _deliver(self, calls: Sequence[Call], outputs: Sequence[Any]) -> Answers:
        watch = self.watches.of(calls[0].target)
        served = self._certificates.of(calls[0]).served
        for call, output in zip(calls, outputs, strict=True):
            watch.used_by(call.owner)
            served.add(call.owner)
            self._remember(call, output)
            yield call, output

    def _done(self, call: Call, output: Any, started: Any) -> None:
        self._remember(call, output)
        self._clock.stop(started, partial(self._ran, call.cost, call.rows, 0.0))

    def _ran(self, key: Key, rows: int, looked: float, seconds: float) -> None:
        # takes no call: a GPU's clock reports late, and would keep it alive
        self._planner.ran(key, rows, max(0.0, seconds - looked))

    def _remember(self, call: Call, output: Any) -> None:
        if call.cache_key is not None and output is not None:
            self._cache.put(call.cache_key, output)
