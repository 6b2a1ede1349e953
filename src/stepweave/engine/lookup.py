"""What a call that has come has in common with others, and whether its result is known."""

from __future__ import annotations

import logging
from typing import Any

from stepweave.batching.call import Call
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.layout import Describer
from stepweave.certification.state_watch import some
from stepweave.engine.active import Active
from stepweave.engine.hooks import EngineScope
from stepweave.planning.stats import Stats

logger = logging.getLogger(__name__)


class LookUp:
    """Describes calls, and says which must stand alone."""

    def __init__(
        self, describer: Describer, scope: EngineScope, cache: EncoderCache, stats: Stats
    ) -> None:
        self._describer = describer
        self._scope = scope
        self._cache = cache
        self._stats = stats

    def known(self, call: Call, active: Active) -> Any:
        """Describe a call; what its result is, if an encoder gave it before."""
        try:
            self._describer.describe(call)
            stateful = any(
                module is call.target.module for module, _ in self._scope.stateful.values()
            )
            call.cache_key = None if stateful else self._cache.key(call)
            own = active.own_state()
            if own is not None:  # the modules are others to this job
                call.whole, call.own, call.cache_key = True, True, None
                call.stand_alone(*own)
            elif names := active.fiber.variables:
                # which a forward on behalf of others would not find
                call.whole, call.cache_key = True, None
                call.stand_alone("state", f"a job sets context variables: {some(names)}")
            elif active.job.reproducible:
                # no forward to share, and none of the results that came of a shared one
                call.key, call.whole = object(), True
                call.apart = ("reproducible", "a reproducible job shares no forwards")
                call.cache_key = call.cache_key and ("reproducible", call.cache_key)
            return None if call.cache_key is None else self._cache.get(call.cache_key)
        except Exception:
            self._stats.errors += 1
            logger.exception("a call of %s cannot be looked up; it runs alone", call.target.name)
            call.stand_alone()
            return None
