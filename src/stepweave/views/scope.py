"""Views of the pipeline for an engine's jobs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from stepweave.compat.cpu_offload import moves_only, offload_only, pipelines_in
from stepweave.compat.execution_device import without_hooks
from stepweave.compat.host_times import keep_times_on_the_host
from stepweave.compat.locks import LockedTokenizer
from stepweave.compat.stateful_modules import ModuleGuard
from stepweave.compat.turn_taking import TurnTaking, modules_in
from stepweave.errors import EngineMisuseError
from stepweave.reasons import UnsharedNote
from stepweave.scope.pipeline import RequestScopedPipeline
from stepweave.truncation.tokenizers import Reporter


class PrivateScope(RequestScopedPipeline):
    """Makes views with copies of the tokenizers, so that direct calls of the pipeline cannot change
    their padding. `tokenized` maps a tokenizer's output to the output to use. `beside` are modules
    that only other pipelines have."""

    def __init__(
        self,
        pipeline: Any,
        tokenized: Callable[[Any], Any] = lambda output: output,
        beside: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(pipeline, wrap_scheduler=False)
        self._home = pipeline
        self._tokenized = tokenized
        # by the `id` of the original: the original, its number of tokens, and the copy
        self._tokenizers: dict[int, tuple[Any, int, Any]] = {}
        modules = [*modules_in(pipeline), *beside.items()]
        self._shared = {id(module): module for _, module in modules}

    def sibling(self, pipeline: Any) -> Self:
        """The scope of another pipeline of the same modules. Raises EngineMisuseError, naming the
        first module that is not one of these."""
        for name, module in modules_in(pipeline):
            if id(module) not in self._shared:
                kind, home = type(pipeline).__name__, type(self._home).__name__
                raise EngineMisuseError(
                    f"{kind}.{name} is not a module of the {home} that the engine runs."
                )
        scope = copy.copy(self)  # locks and tokenizers are shared as the modules are
        scope.pipeline = pipeline
        scope.turns = self.turns.of(pipeline)
        return scope

    def view(self, scheduler: Any = None) -> Any:
        view = super().view(scheduler)
        if self.pipeline is not self._home:  # the engine's pipeline offloads the shared modules
            view.__dict__["maybe_free_model_hooks"] = offload_only(self._home)
        return view

    def stand_in(self, component: Any) -> Any:
        if not isinstance(component, PreTrainedTokenizerBase):
            return super().stand_in(component)
        entry = self._tokenizers.get(id(component))
        # tokens may have been added since, as load_textual_inversion does
        if entry is None or entry[0] is not component or entry[1] != len(component):
            entry = (component, len(component), copy.deepcopy(component))
            self._tokenizers[id(component)] = entry
        names = (name for name, value in vars(self.pipeline).items() if value is component)
        reporter = Reporter(entry[2], next(names, "tokenizer"), self._tokenized)
        return LockedTokenizer(entry[2], self.tokenizer_lock, reporter)


class EngineScope(PrivateScope):
    """Makes views whose heavy modules suspend their jobs. `stand_ins` makes replacements of
    components without a hook, by the component's `id`."""

    def __init__(
        self,
        pipeline: Any,
        guard: ModuleGuard,
        stand_ins: dict[int, Any],
        device: torch.device,
        *,
        processors_apart: bool,
        tokenized: Callable[[Any], Any] = lambda output: output,
        beside: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(pipeline, tokenized, beside)
        self._guard = guard
        self._stand_ins = stand_ins
        self._device = device
        # forwards do not overlap in an engine
        self.turns = TurnTaking(
            pipeline, harmless=moves_only, processors_apart=processors_apart, casts_apart=True
        )

    def view(self, scheduler: Any = None) -> Any:
        view = super().view(scheduler)
        offloads = self.turns.offloads()
        for pipeline in pipelines_in(view):
            if not offloads:
                without_hooks(pipeline)
            # other jobs may still need the models
            pipeline.__dict__["maybe_free_model_hooks"] = lambda: None
            for component in vars(pipeline).values() if self._device.type != "cpu" else ():
                keep_times_on_the_host(component)
        return view

    def takes_turns(self) -> bool:
        keeper = next(self.turns.keepers(), None)
        if keeper is not None:
            self._guard.note_keeper(*keeper)
            return True
        return bool(self._guard.stateful) or self.turn_lock.locked() or self.turns.swaps_state()

    def why_turns(self) -> dict[str, UnsharedNote]:
        """Why jobs run one at a time, by the module that keeps state. Empty if they do not."""
        return self._guard.why_turns(self.turns.swaps_state())

    def stand_in(self, component: Any) -> Any:
        stand_in = self._stand_ins.get(id(component))
        return super().stand_in(component) if stand_in is None else stand_in(component)
