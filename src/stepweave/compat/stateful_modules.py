"""Modules that keep something between forwards, and jobs whose own code changes modules.

Where a module keeps state, jobs run one at a time, each on the modules as they were before all
jobs. What a job's own code changes, a callback's or its pipeline's, is in place only while that job
runs.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from torch import nn

from stepweave.compat.attention_processors import AttentionProcessors, ProcessorSwap
from stepweave.compat.module_state import ModuleState
from stepweave.compat.own_state import OwnState, OwnTypes, has_code, signature
from stepweave.compat.torch_state import Own
from stepweave.compat.turn_taking import upcasts
from stepweave.compat.values import WHOLE
from stepweave.contained import contained
from stepweave.errors import StepweaveError
from stepweave.reasons import UnsharedNote

logger = logging.getLogger(__name__)

LOOKED = 4096  # kinds of calls of a pipeline that are known to change no module


class GuardedJob(Protocol):
    """A job, as far as modules are concerned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scope: Any  # whose `pipeline` it calls
    fiber: Any  # that has something of its `own`
    watched: bool  # whether its own code changes modules is looked at


class ModuleGuard:
    """What is known of an engine's modules. Used by the engine's thread; `why_turns` by any.

    Args:
        modules: by their names in the pipeline.
        pipeline: the class of the engine's pipeline.
        processors: where calls swap attention processors.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        pipeline: type,
        processors: AttentionProcessors | None,
    ) -> None:
        self._modules = modules
        self._pipeline = pipeline
        self._processors = processors
        self.stateful: dict[str, tuple[nn.Module, str]] = {}  # by name, and what they keep
        self.keepers: dict[str, str] = {}  # hooks that keep a call's state, by the modules' classes
        self.overwritten: list[str] = []  # weights that a job wrote to, which cannot be put back
        self._writers: set[type] = set()  # pipelines whose own code changes modules
        self._looked: set[Hashable] = set()  # kinds of calls of a pipeline that did not
        self._told: set[str] = set()
        # to be put back when no job runs
        self._as_found: list[tuple[dict[str, nn.Module], ModuleState]] = []

    # Modules that keep state

    @property
    def untold(self) -> bool:
        """Whether a module has been found to keep state since `tell`."""
        return bool(self.stateful.keys() - self._told)

    def keeps_state(self, module: nn.Module) -> bool:
        return any(stateful is module for stateful, _ in self.stateful.values())

    def note_stateful(
        self, name: str, module: nn.Module, what: str, before: ModuleState | None
    ) -> bool:
        """A forward has shown that its module keeps something; `before` is what the module held
        before its first one. Whether that is news."""
        if name in self.stateful:
            return False
        self.stateful[name] = (module, what)
        if before is not None:
            self._as_found.append(({name: module}, before))
        return True

    def note_keeper(self, module: str, hook: str) -> None:
        """A module of this class carries a hook that keeps a call's state."""
        if hook not in self.keepers.values():
            logger.warning("jobs run one at a time: %s carries %s", module, hook)
        self.keepers[module] = hook

    def tell(self) -> None:
        """Say which modules have been found to keep state."""
        for name, (module, what) in self.stateful.items():
            if name not in self._told:
                self._told.add(name)
                kind = type(module).__name__
                logger.warning("jobs run one at a time: %s (%s) keeps state: %s", name, kind, what)

    def keep(self) -> None:
        """Note what these modules hold before a job, while none runs."""
        if self.stateful:
            modules = {name: module for name, (module, _) in self.stateful.items()}
            with contained("read what modules hold"):
                self._as_found.append((modules, ModuleState(modules, keep=True, weights=True)))

    def put_back(self) -> None:
        """Have them hold what they held before the job that has ended, once none runs."""
        while self._as_found:
            modules, before = self._as_found.pop()
            with contained("put back what modules hold"):
                change = before.change(ModuleState(modules, keep=True, weights=before.weights))
                change.undo()
                self._note_overwritten(change.lost)

    def why_turns(self, swaps_state: bool) -> dict[str, UnsharedNote]:
        """Why jobs run one at a time, by what keeps the state. Empty if they do not."""
        # read on any thread
        reasons: dict[str, UnsharedNote] = {
            name: ("state", what) for name, (_, what) in list(self.stateful.items())
        }
        for name, hook in list(self.keepers.items()):
            reasons[name] = ("turns", f"it carries {hook}, which keeps the state of a call")
        if swaps_state:
            reasons[self._pipeline.__name__] = ("turns", "its calls change the shared modules")
        return reasons

    # Jobs whose own code changes modules

    def own(self, job: GuardedJob, *, alone: bool) -> list[Own]:
        """What a job's fiber has of its own; one that runs `alone` may change what it likes."""
        own: list[Own] = [] if self._processors is None else [ProcessorSwap(self._processors)]
        if alone:
            return own
        if any(upcasts(module) for module in self._modules.values()):
            own.append(OwnTypes(self._modules.values()))
        kind, code = type(job.scope.pipeline), _has_code(job)
        if code or kind in self._writers or _signature(job) not in self._looked:
            own.insert(0, OwnState(self._modules, weights=code))  # sees what the others leave
            job.watched = True
        return own

    def left(self, job: GuardedJob, *, last: bool, succeeded: bool) -> None:
        """A job's call has ended, of the `last` one that ran: what it did after its last forward is
        looked at. If it went well, and its own code had changed modules, that was seen, if it was
        watched."""
        with contained("look at what a job has left in the modules"):
            self.changed_by(job)
            if last:
                self.put_back()
            if succeeded and job.watched and len(self._looked) < LOOKED:
                self._looked.add(_signature(job))

    def changed_by(self, job: GuardedJob) -> UnsharedNote | None:
        """Why a job's calls must run alone, if its own code has changed modules that it shares."""
        for state in job.fiber.own:
            if isinstance(state, OwnState) and state:
                return self._wrote(state, job)
            if isinstance(state, OwnTypes) and state:
                return "cast", "the job's pipeline casts a module for a while"
        return None

    def _wrote(self, own: OwnState, job: GuardedJob) -> UnsharedNote:
        """Its callbacks' code, or else its pipeline's, whose jobs all do; or a hook of a whole
        module has changed something of its own, so that the module keeps state."""
        kind, paths = type(job.scope.pipeline), own.paths
        self._note_overwritten(own.lost)
        if _has_code(job):
            return "callback", f"a job's callback changes {some(paths)}"
        hook = next((path for path in paths if "_hooks[" in path and path[-1] != "]"), None)
        name = "" if hook is None else hook.partition(".")[0]
        if name in self._modules:
            self.stateful.setdefault(name, (self._modules[name], f"a hook changes {hook}"))
        else:
            self._writers.add(kind)
        return "state", f"a call of {kind.__name__} changes {some(paths)}"

    def _note_overwritten(self, weights: list[str]) -> None:
        self.overwritten += [path for path in weights if path not in self.overwritten]

    def error(self) -> StepweaveError | None:
        """What to tell jobs after one has written to weights in place; None if none has."""
        if not self.overwritten:
            return None
        return StepweaveError(
            f"A job's own code, or a forward, has written to {some(self.overwritten)} in place, "
            "which cannot be put back for other jobs: weights of more than "
            f"{WHOLE:,} numbers are not copied. Load the pipeline again and make another engine; "
            "replace such weights rather than write to them.",
            code="engine_failed",
        )


def _has_code(job: GuardedJob) -> bool:
    return has_code([*job.args, *job.kwargs.values()])


def _signature(job: GuardedJob) -> Hashable:
    return signature(type(job.scope.pipeline), job.args, job.kwargs)


def some(paths: list[str]) -> str:
    """The first three of them, in words."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
