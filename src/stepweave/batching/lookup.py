"""What a call that has come has in common with others, and whether its result is known."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from stepweave.batching.call import Call
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.layout import LayoutReader
from stepweave.compat.stateful_modules import ModuleGuard, some
from stepweave.planning.stats import Stats

logger = logging.getLogger(__name__)


class LookUp:
    """Reads calls, and says which must run by themselves."""

    def __init__(
        self, reader: LayoutReader, guard: ModuleGuard, cache: EncoderCache, stats: Stats
    ) -> None:
        self._reader = reader
        self._guard = guard
        self._cache = cache
        self._stats = stats

    def read(self, call: Call) -> tuple[Call, Any]:
        """The call as it is read, and its result if an encoder gave it before, else None."""
        try:
            call = self._restricted(self._reader.read(call))
            return call, None if call.cache_key is None else self._cache.get(call.cache_key)
        except Exception:
            self._stats.errors += 1
            logger.exception("a call of %s cannot be read; it runs alone", call.target.name)
            return call.by_itself(), None

    def _restricted(self, call: Call) -> Call:
        job = call.owner
        stateful = self._guard.keeps_state(call.target.module)
        cache_key = None if stateful else self._cache.key(call)
        reason = self._guard.changed_by(job)
        if reason is not None:  # the modules are others to this job
            return call.by_itself(*reason, whole=True, on_own_modules=True)
        names = job.fiber.variables
        if names:  # which a forward on behalf of others would not find
            return call.by_itself(
                "state", f"a job sets context variables: {some(names)}", whole=True
            )
        if not job.reproducible:
            return call.but(cache_key=cache_key)
        # no forward to share, and none of the results that came of a shared one
        return call.but(
            group=dataclasses.replace(call.group, key=object()),
            whole=True,
            alone=("reproducible", "a reproducible job shares no forwards"),
            cache_key=cache_key and ("reproducible", cache_key),
        )
