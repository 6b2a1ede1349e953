"""Jobs one at a time, each on the modules as they were before all jobs: where a module keeps state
between forwards."""

from __future__ import annotations

import logging

from torch import nn

from stepweave.batching.call import Call
from stepweave.certification.state_watch import some
from stepweave.compat.module_state import ModuleState
from stepweave.compat.values import WHOLE
from stepweave.contained import contained
from stepweave.engine.hooks import EngineScope
from stepweave.errors import StepweaveError

logger = logging.getLogger(__name__)


class Turns:
    """Which modules keep state, and what they held before. Used by the engine's thread."""

    def __init__(self, scope: EngineScope) -> None:
        self._scope = scope
        self._told: set[str] = set()
        # to be put back when no job runs
        self._as_found: list[tuple[dict[str, nn.Module], ModuleState]] = []

    @property
    def due(self) -> bool:
        """Whether a module has been found to keep state since `tell`."""
        return bool(self._scope.stateful.keys() - self._told)

    def found(self, call: Call) -> bool:
        """Whether a forward has just shown that its module keeps state, which is noted."""
        target, watch = call.target, call.target.watch
        if watch is None or watch.found is None or target.name in self._scope.stateful:
            return False
        self._scope.stateful[target.name] = (target.module, watch.found)
        if watch.initial is not None:
            self._as_found.append(({target.name: target.module}, watch.initial))
        return True

    def tell(self) -> None:
        """Say which modules have been found to keep state."""
        for name, (module, what) in self._scope.stateful.items():
            if name not in self._told:
                self._told.add(name)
                logger.warning(
                    "jobs run one at a time: %s (%s) keeps state: %s",
                    name,
                    type(module).__name__,
                    what,
                )

    def keep(self) -> None:
        """Note what these modules hold before a job, while none runs."""
        if self._scope.stateful:
            modules = {name: module for name, (module, _) in self._scope.stateful.items()}
            with contained("read what modules hold"):
                self._as_found.append((modules, ModuleState(modules, keep=True, weights=True)))

    def put_back(self) -> None:
        """Have them hold what they held before the job that has ended, once none runs."""
        while self._as_found:
            modules, before = self._as_found.pop()
            with contained("put back what modules hold"):
                change = before.change(ModuleState(modules, keep=True, weights=before.weights))
                change.undo()
                self._scope.spoilt += [
                    path for path in change.lost if path not in self._scope.spoilt
                ]


def spoilt(weights: list[str]) -> StepweaveError:
    """What to tell jobs after one has written to weights in place."""
    return StepweaveError(
        f"A job's own code, or a forward, has written to {some(weights)} in place, which cannot be "
        f"put back for other jobs: "
        f"weights of more than {WHOLE:,} numbers are not copied. Load the pipeline again and make "
        f"another engine; replace such "
        "weights rather than write to them.",
        code="engine_failed",
    )
