"""Why calls run alone, or jobs take turns: logs and counts."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from stepweave.batching.call import Call
from stepweave.certification.certificate import Certificate
from stepweave.certification.certificates import Certificates
from stepweave.reasons import UnsharedNote, UnsharedReason

logger = logging.getLogger(__name__)

KEPT = 64


class Unshared:
    """Logs each reason once, and counts the calls that run alone for it."""

    def __init__(self) -> None:
        self.calls: Counter[UnsharedReason] = Counter()
        self._details: OrderedDict[tuple[str, UnsharedReason], str] = OrderedDict()

    def note(self, name: str, code: UnsharedReason, detail: str) -> None:
        """Count a call of this name that runs alone, and log the reason if it is new."""
        self.calls[code] += 1
        if (name, code) in self._details or len(self._details) >= KEPT:
            return
        self._details[name, code] = detail
        level = logging.INFO if code in ("reproducible", "cast") else logging.WARNING
        logger.log(level, "calls of %s run alone (%s): %s", name, code, detail)

    def met(
        self, calls: Sequence[Call], certificates: Certificates, turns: Mapping[str, UnsharedNote]
    ) -> None:
        """Count the first of these calls, which runs alone, if others wait or it can never be
        merged. `turns`: why jobs run one at a time now, by module."""
        call = calls[0]
        if call.alone is not None:
            self.note(call.target.name, *call.alone)
        elif turns:
            name = call.target.name if call.target.name in turns else next(iter(turns))
            self.calls[turns[name][0]] += 1
        elif len(calls) > 1:
            alone = certificates.of(call).alone
            if alone is not None:
                self.calls[alone[0]] += 1

    def listed(
        self, certificates: Iterable[Certificate], turns: dict[str, UnsharedNote]
    ) -> list[dict[str, str]]:
        """All reasons, as `StepEngine.stats` and `/v1/models` show them. `turns`: as in `met`."""
        rows = {(name, code, detail): None for name, (code, detail) in turns.items()}
        details = list(self._details.items())  # a copy, since any thread may read it
        rows |= {(name, code, detail): None for (name, code), detail in details}
        for item in certificates:
            alone = item.alone  # read once: the engine's thread may change it
            if alone is not None and item.target not in turns:
                code, detail = alone
                rows[item.target, code, f"{item.sample}: {detail}" if item.sample else detail] = (
                    None
                )
        return [{"call": name, "reason": code, "detail": detail} for name, code, detail in rows]
