"""The pipeline's modules in an engine: hooked, watched, and moved to the GPU as needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from diffusers.hooks import ModelHook
from torch import nn
from transformers import PreTrainedModel

from stepweave.batching.call import Target
from stepweave.batching.fingerprints import Fingerprints, followed
from stepweave.certification.state_watch import StateWatch
from stepweave.compat.attention_processors import AttentionProcessors
from stepweave.compat.cpu_offload import Offloading
from stepweave.compat.locks import is_autoencoder
from stepweave.compat.module_hooks import check_free, install, uninstall
from stepweave.compat.posteriors import seeded
from stepweave.compat.proxy import Proxy
from stepweave.compat.row_adapters import by_rows, detach
from stepweave.compat.stateful_modules import GuardedJob, ModuleGuard
from stepweave.compat.torch_state import DefaultRandom, Own, on_device
from stepweave.compat.turn_taking import modules_in, swaps_processors
from stepweave.contained import contained
from stepweave.memory.device_health import DeviceHealth
from stepweave.views.scope import EngineScope

# Makes the target of a module's forward; again if other code has hooked the module since.
TargetOf = Callable[[nn.Module, Callable[..., Any]], Target]


class SeededJob(GuardedJob, Protocol):
    """A job, as far as its own modules and its random numbers are concerned."""

    seed: int | None  # of the generator that the engine made, if the caller gave none


class EngineAutoencoder(Proxy):
    """An autoencoder whose `encode` and `decode` suspend the job as whole calls: video autoencoders
    keep state between the calls of their submodules."""

    def __init__(
        self,
        autoencoder: nn.Module,
        targets: dict[str, Target],
        call: Callable[[Target, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        super().__init__(autoencoder)
        self._self_targets = targets
        self._self_call = call

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return seeded(self._self_call(self._self_targets["encode"], args, kwargs))

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self._self_call(self._self_targets["decode"], args, kwargs)


class EngineModules:
    """Hooks the modules that suspend jobs, until `close`; `scope` makes the jobs' views.

    Args:
        beside: modules that other pipelines have, by name.
        hook: makes a module's hook of a `TargetOf` and of whether results are cached.
        call: calls an autoencoder's target through the engine.

    Raises EngineMisuseError for modules of another engine.
    """

    def __init__(
        self,
        pipeline: Any,
        beside: Mapping[str, nn.Module],
        *,
        hook: Callable[[TargetOf, bool], ModelHook],
        call: Callable[[Target, tuple[Any, ...], dict[str, Any]], Any],
        max_decode_rows: int,
        health: DeviceHealth,
        fingerprints: Fingerprints,
    ) -> None:
        modules = [*modules_in(pipeline), *beside.items()]
        check_free(type(pipeline).__name__, modules)
        self._health = health
        self._offloading = Offloading(pipeline)
        self._hooked: list[nn.Module] = []
        names: dict[int, tuple[str, nn.Module]] = {}
        for name, module in modules:
            names.setdefault(id(module), (name, module))
        processors = None
        if swaps_processors(pipeline):
            processors = AttentionProcessors([module for _, module in modules])
        # if nested pipelines have modules of the same name, the first one is watched
        watched = dict(reversed(list(names.values())))
        self.guard = ModuleGuard(watched, type(pipeline), processors)
        stand_ins: dict[int, Callable[[nn.Module], Any]] = {}
        for name, module in names.values():
            if is_autoencoder(module):
                targets = {}
                for method in ("encode", "decode"):
                    function = self._around(module, getattr(module, method))
                    targets[method] = Target(f"{name}.{method}", module, function, max_decode_rows)
                stand_ins[id(module)] = partial(EngineAutoencoder, targets=targets, call=call)
            else:
                cached = isinstance(module, PreTrainedModel)
                target = partial(self._target, name, cached, processors)
                install(module, hook(target, cached))
                self._hooked.append(module)
        on_gpu = health.device.type != "cpu"
        self.scope = EngineScope(
            pipeline,
            self.guard,
            stand_ins,
            health.device,
            processors_apart=processors is not None,
            tokenized=partial(followed, digests=fingerprints) if on_gpu else lambda output: output,
            beside=beside,
        )

    def scope_of(self, pipeline: Any) -> EngineScope:
        """The scope that makes views of the engine's pipeline, or of another pipeline of the same
        modules. Raises EngineMisuseError for one with other modules."""
        return self.scope if pipeline is None else self.scope.sibling(pipeline)

    def own(self, job: SeededJob) -> list[Own]:
        """The state to install whenever a job's fiber runs."""
        own: list[Own] = []
        with contained("watch a job's own code"):
            own = self.guard.own(job, alone=job.scope.takes_turns())
        if job.seed is not None and job.kwargs.get("generator") is None:  # pipeline takes none
            own.append(DefaultRandom(job.seed, self._health.device))
        return own

    def note_stateful(self, target: Target, watch: StateWatch) -> bool:
        """Note it if the watch has found that a module keeps state. Returns whether it is new."""
        return watch.found is not None and self.guard.note_stateful(
            target.name, target.module, watch.found or "", watch.initial
        )

    def close(self) -> None:
        """Remove all hooks, and move offloaded models off the GPU unless it has failed."""
        if self._health.failure is None:
            with contained("move models off the GPU"), on_device(self._health.device):
                self._offloading.offload()
        detach(self._hooked)
        while self._hooked:
            uninstall(self._hooked.pop())

    def _target(
        self,
        name: str,
        cached: bool,
        processors: AttentionProcessors | None,
        module: nn.Module,
        forward: Callable[..., Any],
    ) -> Target:
        function = self._around(module, forward)
        return Target(name, module, function, cached=cached, processors=processors)

    def _around(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """Add offloading, device health checks, and adapters, to a module's function."""
        return by_rows(self._health.guarded(self._offloading.around(module, function)))
