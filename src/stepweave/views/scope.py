"""Views of the pipeline for an engine's jobs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from stepweave.compat.cpu_offload import moves_only, offload_only, pipelines_in
from stepweave.compat.host_times import keep_times_on_the_host
from stepweave.compat.locks import LockedTokenizer
from stepweave.compat.stateful_modules import ModuleGuard
from stepweave.compat.turn_taking import TurnTaking, modules_in
from stepweave.errors import EngineMisuseError
from stepweave.reasons import UnsharedNote
from stepweave.scope.pipeline import RequestScopedPipeline
from stepweave.truncation.tokenizers import Reporter


class PrivateScope(RequestScopedPipeline):
    """Views with tokenizers of the engine's own, so that calls past the engine cannot change their
    padding meanwhile. `tokenized` is given what tokenizers make, and gives what is to be used."""

    def __init__(
        self, pipeline: Any, tokenized: Callable[[Any], Any] = lambda output: output
    ) -> None:
        super().__init__(pipeline, wrap_scheduler=False)
        self._home = pipeline
        self._tokenized = tokenized
        # by the `id` of the pipeline's own: that one, its number of tokens, and a copy
        self._tokenizers: dict[int, tuple[Any, int, Any]] = {}
        self._shared = {id(module): module for _, module in modules_in(pipeline)}

    def sibling(self, pipeline: Any) -> Self:
        """The same of another pipeline that has no modules but these. Raises EngineMisuseError,
        naming the first that it has."""
        for name, module in modules_in(pipeline):
            if id(module) not in self._shared:
                kind, home = type(pipeline).__name__, type(self._home).__name__
                raise EngineMisuseError(
                    f"{kind}.{name} is no module of the {home} that the engine runs."
                )
        scope = copy.copy(self)  # locks and tokenizers are shared as the modules are
        scope.pipeline = pipeline
        scope.turns = self.turns.of(pipeline)
        return scope

    def view(self, scheduler: Any = None) -> Any:
        view = super().view(scheduler)
        if self.pipeline is not self._home:  # which offloads what both have
            view.__dict__["maybe_free_model_hooks"] = offload_only(self._home)
        return view

    def stand_in(self, component: Any) -> Any:
        if not isinstance(component, PreTrainedTokenizerBase):
            return super().stand_in(component)
        known = self._tokenizers.get(id(component))
        # tokens may have been added since, as load_textual_inversion does
        if known is None or known[0] is not component or known[1] != len(component):
            known = (component, len(component), copy.deepcopy(component))
            self._tokenizers[id(component)] = known
        names = (name for name, value in vars(self.pipeline).items() if value is component)
        reporter = Reporter(known[2], next(names, "tokenizer"), self._tokenized)
        return LockedTokenizer(known[2], self.tokenizer_lock, reporter)


class EngineScope(PrivateScope):
    """Views whose heavy modules suspend their jobs: `stand_ins` gives what stands in the place of
    components without a hook of their own, by `id`."""

    def __init__(
        self,
        pipeline: Any,
        guard: ModuleGuard,
        stand_ins: dict[int, Any],
        device: torch.device,
        *,
        processors_apart: bool,
        tokenized: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        super().__init__(pipeline, tokenized)
        self._guard = guard
        self._stand_ins = stand_ins
        self._device = device
        # forwards do not overlap here
        self.turns = TurnTaking(
            pipeline, harmless=moves_only, processors_apart=processors_apart, casts_apart=True
        )

    def view(self, scheduler: Any = None) -> Any:
        view = super().view(scheduler)
        for pipeline in pipelines_in(view):
            # other jobs may go on with the models
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
        """Why jobs run one at a time, by what keeps the state. Empty if they do not."""
        return self._guard.why_turns(self.turns.swaps_state())

    def stand_in(self, component: Any) -> Any:
        stand_in = self._stand_ins.get(id(component))
        return super().stand_in(component) if stand_in is None else stand_in(component)
