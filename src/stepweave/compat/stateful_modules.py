"""Handles modules that keep state between forwards, and jobs whose own code changes modules.

If a module keeps state, jobs run one at a time, each on the modules as they were before all jobs.
Changes by a job's own code, its callback's or pipeline's, apply only while that job runs.
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

LOOKED = 4096  # signatures of pipelines' calls that are known to change no module


class GuardedJob(Protocol):
    """A job, as far as modules are concerned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scope: Any  # its `pipeline` is called
    fiber: Any  # its `own` has the job's state
    watched: bool  # whether changes of modules by its own code are watched


class ModuleGuard:
    """Watches an engine's modules. For the engine's thread; `why_turns` for any.

    Args:
        modules: by their names in the pipeline.
        pipeline: the class of the engine's pipeline.
        processors: if calls swap attention processors.
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
        self.stateful: dict[str, tuple[nn.Module, str]] = {}  # by name: module, and its state
        self.keepers: dict[str, str] = {}  # hooks that keep a call's state, by the modules' classes
        self.overwritten: list[str] = []  # weights that a job wrote to, which cannot be restored
        self._writers: set[type] = set()  # pipelines whose own code changes modules
        self._harmless: set[Hashable] = set()  # signatures of calls that do not
        self._logged: set[str] = set()
        # snapshots to restore when no job runs
        self._initial: list[tuple[dict[str, nn.Module], ModuleState]] = []

    # Modules that keep state

    @property
    def untold(self) -> bool:
        """Whether a module has been found to keep state since `tell`."""
        return bool(self.stateful.keys() - self._logged)

    def keeps_state(self, module: nn.Module) -> bool:
        return any(stateful is module for stateful, _ in self.stateful.values())

    def note_stateful(
        self, name: str, module: nn.Module, what: str, before: ModuleState | None
    ) -> bool:
        """Note that a module keeps state, `what`; `before` is a snapshot from before its first
        forward. Returns whether it is new."""
        if name in self.stateful:
            return False
        self.stateful[name] = (module, what)
        if before is not None:
            self._initial.append(({name: module}, before))
        return True

    def note_keeper(self, module: str, hook: str) -> None:
        """Note a hook, on a module of this class, that keeps a call's state."""
        if hook not in self.keepers.values():
            logger.warning("jobs run one at a time: %s has the hook %s", module, hook)
        self.keepers[module] = hook

    def tell(self) -> None:
        """Log the modules that have been found to keep state."""
        for name, (module, what) in self.stateful.items():
            if name not in self._logged:
                self._logged.add(name)
                kind = type(module).__name__
                logger.warning("jobs run one at a time: %s (%s) keeps state: %s", name, kind, what)

    def keep(self) -> None:
        """Take a snapshot of stateful modules before a job, while none runs."""
        if self.stateful:
            modules = {name: module for name, (module, _) in self.stateful.items()}
            with contained("take a snapshot of modules"):
                self._initial.append((modules, ModuleState(modules, keep=True, weights=True)))

    def put_back(self) -> None:
        """Restore stateful modules after a job, while none runs."""
        while self._initial:
            modules, before = self._initial.pop()
            with contained("restore the state of modules"):
                change = before.change(ModuleState(modules, keep=True, weights=before.weights))
                change.undo()
                self._note_overwritten(change.lost)

    def why_turns(self, swaps_state: bool) -> dict[str, UnsharedNote]:
        """Why jobs run one at a time, by the module that keeps state. Empty if they do not."""
        # copies, since any thread may read them
        reasons: dict[str, UnsharedNote] = {
            name: ("state", what) for name, (_, what) in list(self.stateful.items())
        }
        for name, hook in list(self.keepers.items()):
            reasons[name] = ("turns", f"its hook {hook} keeps the state of a call")
        if swaps_state:
            reasons[self._pipeline.__name__] = ("turns", "its calls change the shared modules")
        return reasons

    # Jobs whose own code changes modules

    def own(self, job: GuardedJob, *, alone: bool) -> list[Own]:
        """The state to install whenever a job's fiber runs. A job that runs `alone` needs less: it
        may change modules."""
        own: list[Own] = [] if self._processors is None else [ProcessorSwap(self._processors)]
        if alone:
            return own
        if any(upcasts(module) for module in self._modules.values()):
            own.append(OwnTypes(self._modules.values()))
        kind, code = type(job.scope.pipeline), _has_code(job)
        if code or kind in self._writers or _signature(job) not in self._harmless:
            own.insert(0, OwnState(self._modules, weights=code))  # first: sees the others' changes
            job.watched = True
        return own

    def left(self, job: GuardedJob, *, last: bool, succeeded: bool) -> None:
        """Check, after a job's call has ended, for changes since its last forward. A call that
        `succeeded` without changes need not be watched again. `last`: no other job runs."""
        with contained("check the modules after a job"):
            self.changed_by(job)
            if last:
                self.put_back()
            if succeeded and job.watched and len(self._harmless) < LOOKED:
                self._harmless.add(_signature(job))

    def changed_by(self, job: GuardedJob) -> UnsharedNote | None:
        """Why a job's calls must run alone, if its own code has changed shared modules; or None."""
        for state in job.fiber.own:
            if isinstance(state, OwnState) and state:
                return self._wrote(state, job)
            if isinstance(state, OwnTypes) and state:
                return "cast", "the job's pipeline casts a module for a while"
        return None

    def _wrote(self, own: OwnState, job: GuardedJob) -> UnsharedNote:
        """Find what has changed modules: the job's callback; a hook on a module, which then keeps
        state; or else the pipeline's code, in all its jobs."""
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
        """The error of all jobs once one has overwritten weights; else None."""
        if not self.overwritten:
            return None
        return StepweaveError(
            f"A job's own code, or a forward, has overwritten {some(self.overwritten)} in place. "
            f"This cannot be undone for other jobs: weights of more than {WHOLE:,} numbers are "
            "not copied. Load the pipeline again and make a new engine; assign new weights instead "
            "of changing them in place.",
            code="engine_failed",
        )


def _has_code(job: GuardedJob) -> bool:
    return has_code([*job.args, *job.kwargs.values()])


def _signature(job: GuardedJob) -> Hashable:
    return signature(type(job.scope.pipeline), job.args, job.kwargs)


def some(paths: list[str]) -> str:
    """The first three of them, and the number of others."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
