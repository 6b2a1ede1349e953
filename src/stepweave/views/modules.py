"""The pipeline's modules while an engine runs it: hooked, guarded, and on the GPU as needed."""

from __future__ import annotations

from collections.abc import Callable
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
from stepweave.compat.proxy import Proxy
from stepweave.compat.stateful_modules import GuardedJob, ModuleGuard
from stepweave.compat.torch_state import DefaultRandom, Own, on_device
from stepweave.compat.turn_taking import modules_in, swaps_processors
from stepweave.contained import contained
from stepweave.memory.device_health import DeviceHealth
from stepweave.views.scope import EngineScope

# Makes the target of a module's forward, whenever somebody else has hooked it meanwhile.
TargetOf = Callable[[nn.Module, Callable[..., Any]], Target]


class SeededJob(GuardedJob, Protocol):
    """A job, as far as its own modules and its own random numbers are concerned."""

    seed: int | None  # of its generator, where the caller gave none


class EngineAutoencoder(Proxy):
    """An autoencoder whose `encode` and `decode` suspend the job, whole: video autoencoders keep
    state between their parts."""

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
        return self._self_call(self._self_targets["encode"], args, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self._self_call(self._self_targets["decode"], args, kwargs)


class EngineModules:
    """Hooks on the modules that suspend jobs, until `close`; and `scope`, which makes views.

    Args:
        hook: makes the hook of a module, given how its target is made.
        call: gives the result of a call of an autoencoder's target.

    Raises EngineMisuseError for modules of another engine.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        hook: Callable[[TargetOf, bool], ModelHook],
        call: Callable[[Target, tuple[Any, ...], dict[str, Any]], Any],
        max_decode_rows: int,
        health: DeviceHealth,
        fingerprints: Fingerprints,
    ) -> None:
        check_free(pipeline)
        self._health = health
        self._offloading = Offloading(pipeline)
        self._hooked: list[nn.Module] = []
        names: dict[int, tuple[str, nn.Module]] = {}
        for name, module in modules_in(pipeline):
            names.setdefault(id(module), (name, module))
        processors = None
        if swaps_processors(pipeline):
            processors = AttentionProcessors([module for _, module in modules_in(pipeline)])
        # of modules of one name, in pipelines within each other, the first is watched
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
        )

    def scope_of(self, pipeline: Any) -> EngineScope:
        """Makes views of the engine's pipeline, or of another one of its modules. Raises
        EngineMisuseError."""
        return self.scope if pipeline is None else self.scope.sibling(pipeline)

    def own(self, job: SeededJob) -> list[Own]:
        """What a job's fiber has of its own."""
        own: list[Own] = []
        with contained("watch a job's own code"):
            own = self.guard.own(job, alone=job.scope.takes_turns())
        if job.seed is not None and job.kwargs.get("generator") is None:  # it takes none
            own.append(DefaultRandom(job.seed, self._health.device))
        return own

    def note_stateful(self, target: Target, watch: StateWatch) -> bool:
        """Whether a forward has just shown that its module keeps state, which is noted."""
        found = watch.found is not None
        return found and self.guard.note_stateful(
            target.name, target.module, watch.found or "", watch.initial
        )

    def close(self) -> None:
        """Take the hooks away without a trace, and offloaded models off the GPU, unless it has
        failed."""
        if self._health.failure is None:
            with contained("take models off the GPU"), on_device(self._health.device):
                self._offloading.offload()
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
        """What stands for a heavy function of a module in every forward of jobs, alone or
        shared."""
        return self._health.guarded(self._offloading.around(module, function))
