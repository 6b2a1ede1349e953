"""One forward for many calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stepweave.engine import ambient
from stepweave.engine.call import Call, Unmergeable
from stepweave.engine.certify import Certificates, Verdict
from stepweave.engine.hooks import RunYourself
from stepweave.engine.memory import RowCaps
from stepweave.engine.merge import copied, merge, split
from stepweave.engine.stats import Stats
from stepweave.engine.textcache import EncoderCache

logger = logging.getLogger(__name__)


class Forwarder:
    """Runs calls of one key: alone, merged, or both ways to prove that they may be.

    `advance` is given a call's owner and the answer: its result, or RunYourself.
    """

    def __init__(
        self,
        certificates: Certificates,
        cache: EncoderCache,
        stats: Stats,
        device: torch.device,
        kinds: tuple[str, ...],
        max_rows: int,
        advance: Callable[[Any, Any], None],
    ) -> None:
        self._certificates = certificates
        self._cache = cache
        self._stats = stats
        self._device = device
        self._kinds = kinds
        self._max_rows = max_rows
        self._advance = advance
        self._caps = RowCaps()

    def limit(self, call: Call) -> int:
        """The most rows of a forward with this call."""
        return self._caps.limit(call.kind, min(self._max_rows, call.target.cap or self._max_rows))

    def decide(self, calls: list[Call]) -> tuple[Verdict, list[Call]]:
        """What to do first with calls of one key, and with which of them."""
        try:
            return self._certificates.decide(calls)
        except Exception:
            self._stats.errors += 1
            logger.exception("no certificate could be had for a call of %s; it runs alone", calls[0].target.name)
            return Verdict.ALONE, calls[:1]

    def run(self, verdict: Verdict, calls: list[Call]) -> None:
        """Do it, and let the calls' owners go on."""
        if verdict is Verdict.ALONE:
            self._alone(calls)
        elif verdict is Verdict.PROVE:
            self._prove(calls)
        else:
            self._merged(calls)

    def _alone(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self._stats.forward(call.target.name, call.rows, 1)
            call.keep = call.keep or call.cache_key is not None
            self._advance(call.owner, RunYourself())
            self._remember(call, call.output)
            self._caps.fitted(call.kind)

    def _merged(self, calls: Sequence[Call]) -> None:
        rows = sum(call.rows for call in calls)
        try:
            outputs = run_merged(calls, self._kinds, repeat=self._certificates.of(calls[0]).repeat)
        except torch.OutOfMemoryError:
            outputs = None  # and the error is let go of, which holds on to the memory
        except Exception as error:
            self._retry(calls, f"merged, it raised {type(error).__name__}: {error}"[:200])
            return
        if outputs is None:
            self._out_of_memory(calls[0], rows)
            self._halve(calls)
            return
        self._caps.fitted(calls[0].kind)
        self._stats.forward(calls[0].target.name, rows, len(calls))
        for call, output in zip(calls, outputs, strict=True):
            self._remember(call, output)
            self._advance(call.owner, output)

    def _retry(self, calls: Sequence[Call], reason: str) -> None:
        """Run alone what failed merged. If all goes well then, merging is to blame."""
        self._stats.retried += 1
        for call in calls:
            call.keep = True
        self._alone(calls)
        if not any(call.failed for call in calls):
            self._certificates.fail(calls[0], reason)

    def _halve(self, calls: Sequence[Call]) -> None:
        """What does not fit into memory at once is run in halves, down to single calls."""
        middle = len(calls) // 2
        for half in (calls[:middle], calls[middle:]):
            if len(half) == 1:
                self._alone(half)
            else:
                self._merged(half)

    def _out_of_memory(self, call: Call, rows: int) -> None:
        self._stats.out_of_memory += 1
        self._caps.failed(call.kind, rows)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _prove(self, calls: Sequence[Call]) -> None:
        """Run calls merged and one by one; the fibers get their own results."""
        self._stats.proofs += 1
        merged: Any = None
        try:
            merged = try_merged(calls, self._kinds, repeat=self._certificates.of(calls[0]).repeat)
        except torch.OutOfMemoryError:
            pass
        except Exception as error:
            merged = error
        if merged is None:
            self._out_of_memory(calls[0], sum(call.rows for call in calls))
        for call in calls:
            call.keep = merged is not None
        self._alone(calls)
        if merged is not None:
            self._certificates.judge(calls, merged)
        for call in calls:
            call.output = None

    def _remember(self, call: Call, output: Any) -> None:
        if call.cache_key is not None and output is not None:
            self._cache.put(call.cache_key, output)


def run_merged(calls: Sequence[Call], kinds: tuple[str, ...], *, repeat: bool, trial: bool = False) -> list[Any]:
    """The results of calls of one kind, from one forward. `kinds` are the device types whose autocast is theirs, too."""
    here = ambient.current(kinds)
    ambient.apply(calls[0].ambient, here)
    try:
        arguments = merge(calls, repeat=repeat)
        output = calls[0].target.function(**(copied(arguments) if trial else arguments))
        return split(output, [call.rows for call in calls], listed=calls[0].listed)
    finally:
        ambient.apply(here, calls[0].ambient)


def try_merged(calls: Sequence[Call], kinds: tuple[str, ...], *, repeat: bool) -> list[Any]:
    """As `run_merged`, for a proof: it changes nothing that the calls will be run on, one by one.

    Raises Unmergeable if the forward draws from a call's generator. (From torch's default one, which other threads use: then
    merged and single results differ.)
    """
    generators = _generators([call.arguments for call in calls])
    before = [one.get_state() for one in generators]
    drawn = False
    try:
        outputs = run_merged(calls, kinds, repeat=repeat, trial=True)
    finally:
        for generator, state in zip(generators, before, strict=True):
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
                drawn = True
    if drawn:
        raise Unmergeable("it draws random numbers")
    return outputs


def _generators(value: Any) -> list[torch.Generator]:
    if isinstance(value, torch.Generator):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for item in value for one in _generators(item)] if isinstance(value, (list, tuple)) else []
