"""Runs a call in parts, some of its rows at a time, if it does not fit into memory at once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

from stepweave.batching.call import Attempt, Call, Unmergeable
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.forward import run_arguments
from stepweave.batching.merge import join, part, split
from stepweave.certification.certificates import Certificates
from stepweave.certification.compare import agree, told_apart
from stepweave.compat.nested import copied
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.snapshot import ArgumentSnapshot
from stepweave.errors import OutOfMemoryError
from stepweave.memory.row_limits import RowLimits
from stepweave.planning.stats import Stats

logger = logging.getLogger(__name__)


class WaitForMemory:
    """The answer to a call that does not fit into memory now, even in parts."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def error(self) -> OutOfMemoryError:
        """The error of the job if no other job runs."""
        call = self.call
        bound = " (not divided: the job is reproducible)" if call.whole and call.rows > 1 else ""
        return OutOfMemoryError(
            f"There is not enough memory for this job, even alone: {call.target.name} ran out of "
            f"memory with {call.rows} rows{bound}. Ask for a smaller size, or fewer images."
        )


class Microbatches:
    """Runs a call in parts, and answers one that ran out of memory.

    Args:
        limits: learns how many rows fit.
        limit: the largest number of rows of a forward with a call.
        device_types: the device types whose autocast each call sets.
        start: called before the first part.
        done: called at the end with the call, its output, and the result of `start`.
    """

    def __init__(
        self,
        limits: RowLimits,
        limit: Callable[[Call], int],
        certificates: Certificates,
        cache: EncoderCache,
        stats: Stats,
        device_types: tuple[str, ...],
        *,
        start: Callable[[], Any],
        done: Callable[[Call, Any, Any], None],
    ) -> None:
        self._limits = limits
        self._limit = limit
        self._certificates = certificates
        self._cache = cache
        self._stats = stats
        self._device_types = device_types
        self._start = start
        self._done = done

    def wanted(self, call: Call) -> bool:
        """Whether a call is known to have too many rows for one forward, and to be divisible."""
        too_many = call.rows > self._limit(call) and not call.whole
        return too_many and bool(self._certificates.divisible(call))

    def note_ran_out(self, call: Call, rows: int) -> None:
        """Learn that this many rows of a call's kind do not fit."""
        self._stats.out_of_memory += 1
        self._limits.failed(call.kind, rows)
        self._limits.memory.free()

    def answer_out_of_memory(self, attempt: Attempt) -> Any:
        """The answer to a call that ran out of memory alone: another attempt if memory was freed,
        its result in parts, or that it must wait."""
        call = attempt.call
        gc.collect()  # ended jobs may be in reference cycles
        self.note_ran_out(call, call.rows)
        if attempt.overwritten:
            return WaitForMemory(call).error()
        if self._cache.clear() and not attempt.again:
            return Attempt(call, again=True)
        if call.rows > 1 and not call.whole and self._divisible(call):
            answer = self.run(call)
            if answer is not None:
                return answer
        return WaitForMemory(call)

    def run(self, call: Call) -> Any:
        """Run a call in parts. Returns its result; WaitForMemory; or None if it is not divisible
        after all."""
        started = self._start()
        outputs: list[Any] = []
        counts: list[int] = []
        repeat = self._certificates.of(call).repeat
        size = min(self._limit(call), (call.rows + 1) // 2)
        while sum(counts) < call.rows:
            start = sum(counts)
            rows = min(size, call.rows - start)
            try:
                with self._limits.measured(call.kind, rows, call.cost):
                    arguments = part(call, start, start + rows, repeat=repeat)
                    outputs.append(run_arguments(call, arguments, self._device_types))
                counts.append(rows)
                continue
            except Exception as error:
                if not ran_out(error):
                    return self._not_divisible(call, error)
            self.note_ran_out(call, rows)
            if rows == 1:
                return WaitForMemory(call)
            size = rows // 2
        try:
            output = join(outputs, counts, listed=call.group.listed)
        except Unmergeable as error:
            return self._not_divisible(call, error)
        self._stats.divided += 1
        for rows in counts:
            self._stats.forward(call.target.name, rows, 0)
        self._done(call, output, started)
        return output

    def _not_divisible(self, call: Call, error: Exception) -> None:
        kind = type(error).__name__
        logger.warning("%s cannot run in parts: %s: %s", call.target.name, kind, error)
        self._certificates.of(call).divisible = False

    def _divisible(self, call: Call) -> bool:
        """Whether a call's rows may be computed apart; tried with two of them if unknown."""
        divisible = self._certificates.divisible(call)
        if divisible is None and call.rows > 2:
            try:
                pair, *single = (self.part(call, a, b) for a, b in ((0, 2), (0, 1), (1, 2)))
                rows = split(pair, [1, 1], listed=call.group.listed)
                right = all(agree(a, b) for a, b in zip(rows, single, strict=True))
                divisible = (told_apart(rows, single) or None) if right else False
            except Exception as error:
                divisible = None if ran_out(error) else False
                kind = type(error).__name__
                logger.info("%s failed in parts: %s: %s", call.target.name, kind, error)
            self._certificates.of(call).divisible = divisible
        return bool(divisible)

    def part(self, call: Call, start: int, stop: int) -> Any:
        """Compute the result of some of a call's rows. Raises Unmergeable if that writes to its
        arguments or draws random numbers."""
        arguments = copied(part(call, start, stop, repeat=self._certificates.of(call).repeat))
        snapshot = ArgumentSnapshot(*arguments.values())
        try:
            output = run_arguments(call, arguments, self._device_types)
        finally:
            changed = snapshot.drew() or snapshot.wrote()
            snapshot.put_back()
        if changed:
            raise Unmergeable("it writes to its arguments, or draws random numbers")
        return output
