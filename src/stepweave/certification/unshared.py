"""What shares no forward, or takes turns, and why."""

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
    """Reasons as they are met, each logged once; and how many calls ran alone for each."""

    def __init__(self) -> None:
        self.calls: Counter[UnsharedReason] = Counter()
        self._known: OrderedDict[tuple[str, UnsharedReason], str] = OrderedDict()

    def note(self, name: str, code: UnsharedReason, detail: str) -> None:
        """A call of this name runs alone."""
        self.calls[code] += 1
        if (name, code) in self._known or len(self._known) >= KEPT:
            return
        self._known[name, code] = detail
        level = logging.INFO if code in ("reproducible", "cast") else logging.WARNING
        logger.log(level, "calls of %s run alone (%s): %s", name, code, detail)

    def met(
        self,
        calls: Sequence[Call],
        certificates: Certificates,
        turns: Mapping[str, UnsharedNote],
    ) -> None:
        """Count a call, the first, that runs alone though others are there, or that can have no
        company, and why; `turns`: why jobs run one at a time, by module, if they do now."""
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
        """All reasons, as `StepEngine.stats` and `/v1/models` show them; `turns`: why jobs run one
        at a time, by module."""
        found = {(name, code, detail): None for name, (code, detail) in turns.items()}
        known = list(self._known.items())  # read on any thread
        found |= {(name, code, detail): None for (name, code), detail in known}
        for one in certificates:
            alone = one.alone  # once: meanwhile the engine's thread may find that they need not
            if alone is not None and one.target not in turns:
                code, detail = alone
                found[one.target, code, f"{one.sample}: {detail}" if one.sample else detail] = None
        return [{"call": name, "reason": code, "detail": detail} for name, code, detail in found]
