"""Where fibers suspend: hooks on the pipeline's modules, a proxy around its autoencoder, and what a
view reports."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepweave.batching.call import Call, Target
from stepweave.batching.fingerprints import Digests, followed
from stepweave.batching.merge import cloned
from stepweave.certification.state_watch import StateWatch, some
from stepweave.compat.attention_processors import Processors, Wardrobe
from stepweave.compat.cpu_offload import Offloading, moves_only, pipelines_in
from stepweave.compat.host_times import keep_times_on_the_host
from stepweave.compat.own_state import OwnState, OwnTypes, has_code, signature
from stepweave.compat.snapshot import Given
from stepweave.compat.torch_state import current, on_device
from stepweave.contained import contained
from stepweave.engine.fiber import Fiber, Own, current_fiber, suspend, suspendable
from stepweave.engine.job import Job
from stepweave.errors import EngineMisuse
from stepweave.memory.device import ran_out
from stepweave.memory.device_health import DeviceHealth
from stepweave.scope.locks import LockedTokenizer
from stepweave.scope.pipeline import (
    ENGINE_HOOK,
    RequestScopedPipeline,
    is_autoencoder,
    swaps_processors,
    swaps_state,
    upcasts,
)
from stepweave.scope.proxy import Proxy
from stepweave.scope.view import _offload_only

logger = logging.getLogger(__name__)

Around = Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]

LOOKED = 4096  # kinds of calls of a pipeline that are known to change no module


@dataclass(frozen=True)
class Offload:
    """A fiber's wish to have `function` run on another thread; whether its code is `known`, as that
    of diffusers is."""

    function: Callable[[], Any]
    known: bool = True


class RunYourself:
    """The answer to what is to run in its own fiber."""


def call_engine(
    target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: tuple[str, ...]
) -> Any:
    """Suspend the running fiber with a call of `target` and give its result."""
    output = _answer(target, args, kwargs, kinds)
    fiber = current_fiber()
    if fiber is not None and not target.cached:
        fiber.last = output
    return output


def _answer(
    target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: tuple[str, ...]
) -> Any:
    worn = None if target.processors is None else target.processors.worn()
    call = Call(target, args, kwargs, current(kinds), worn)
    while isinstance(answer := suspend(call), RunYourself):
        given = Given(*args, *kwargs.values())
        try:
            output = _run(call)
        except BaseException as error:
            call.failed = True
            if not ran_out(error):
                raise
            call.ran_out = True  # and the error is let go of, which holds on to the memory
        else:
            if call.keep:
                call.wrote = given.wrote()
                # what cannot be copied is neither compared nor remembered
                with contextlib.suppress(Exception):
                    call.output = cloned(output)
            return output
        given.put_back()
        call.overwritten = given.overwritten()
    return answer


def _run(call: Call) -> Any:
    """What a call gives, run by its own fiber."""
    watch, own = call.target.watch, _own_state()
    run = call.run
    if call.check and watch is not None:
        run = functools.partial(watch.run, call)
    return run() if own is None else own.during(run)


def _own_state() -> OwnState | None:
    fiber = current_fiber()
    return (
        None
        if fiber is None
        else next((one for one in fiber.own if isinstance(one, OwnState)), None)
    )


class SuspendHook(ModelHook):  # type: ignore[misc]
    """Suspends the fibers of one engine in a module's forward. Other calls of the module pass
    straight through."""

    def __init__(
        self,
        name: str,
        cached: bool,
        owns: Callable[[Fiber], bool],
        kinds: tuple[str, ...],
        around: Around,
        processors: Processors | None,
    ) -> None:
        super().__init__()
        self._name = name
        self._cached = cached
        self._owns = owns
        self._kinds = kinds
        self._around = around
        self._processors = processors
        self._forward: Callable[..., Any] | None = None
        self.target: Target | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        fiber = current_fiber()
        # diffusers scales an encoder's adapters around the call of it: others must not run in
        # between, nor later have the result
        adapted = self._cached and bool(getattr(module, "peft_config", None))
        if fiber is None or adapted or not self._owns(fiber) or not suspendable():
            return forward(*args, **kwargs)
        # somebody hooked the module meanwhile
        if self.target is None or self._forward is not forward:
            self._forward = forward
            function = self._around(module, forward)
            watch = StateWatch(self._name)
            self.target = Target(
                self._name,
                module,
                function,
                cached=self._cached,
                processors=self._processors,
                watch=watch,
            )
        return call_engine(self.target, args, kwargs, self._kinds)


class EngineAutoencoder(Proxy):
    """An autoencoder whose `encode` and `decode` suspend the fiber, whole: video autoencoders keep
    state between their parts."""

    def __init__(
        self, autoencoder: nn.Module, targets: dict[str, Target], kinds: tuple[str, ...]
    ) -> None:
        super().__init__(autoencoder)
        self._self_targets = targets
        self._self_kinds = kinds

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return self._self_call("encode", args, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self._self_call("decode", args, kwargs)

    def _self_call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self._self_targets[name]
        if current_fiber() is None or not suspendable():
            return target.function(*args, **kwargs)
        return call_engine(target, args, kwargs, self._self_kinds)


class PrivateScope(RequestScopedPipeline):
    """Views with tokenizers of the engine's own, so that calls past the engine cannot change their
    padding meanwhile."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline, wrap_scheduler=False)
        self._tokenizers: dict[int, tuple[Any, int, Any]] = {}
        self._home = pipeline
        self._tokenized: Callable[[Any], Any] = lambda output: output
        self._shared = {id(module): module for _, module in _modules(pipeline)}

    def sibling(self, pipeline: Any) -> Self:
        """The same of another pipeline that has no modules but these. Raises EngineMisuse, naming
        the first that it has."""
        for name, module in _modules(pipeline):
            if id(module) not in self._shared:
                kinds = type(pipeline).__name__, type(self._home).__name__
                raise EngineMisuse(
                    f"{kinds[0]}.{name} is no module of the {kinds[1]} that the engine runs."
                )
        scope = copy.copy(self)  # locks and tokenizers are shared as the modules are
        scope.pipeline = pipeline
        return scope

    def view(self, scheduler: Any = None) -> Any:
        view = super().view(scheduler)
        if self.pipeline is not self._home:  # which offloads what both have
            view.__dict__["maybe_free_model_hooks"] = _offload_only(self._home)
        return view

    def _wrap(self, component: Any) -> Any:
        if isinstance(component, PreTrainedTokenizerBase):
            known = self._tokenizers.get(id(component))
            if (
                known is None or known[0] is not component or known[1] != len(component)
            ):  # textual inversion adds tokens
                known = self._tokenizers[id(component)] = (
                    component,
                    len(component),
                    copy.deepcopy(component),
                )
            names = (name for name, value in vars(self.pipeline).items() if value is component)
            return LockedTokenizer(
                known[2], self._tokenizer_lock, next(names, "tokenizer"), self._tokenized
            )
        return super()._wrap(component)


class EngineScope(PrivateScope):
    """Views whose modules suspend: installs the hooks, and removes them without a trace."""

    def __init__(
        self,
        pipeline: Any,
        owns: Callable[[Fiber], bool],
        kinds: tuple[str, ...],
        max_decode_rows: int,
        health: DeviceHealth | None = None,
        digests: Digests | None = None,
    ) -> None:
        super().__init__(pipeline)
        if digests is not None and health is not None and health.device.type != "cpu":
            self._tokenized = functools.partial(followed, digests=digests)
        self._kinds = kinds
        self._health = health or DeviceHealth(torch.device("cpu"))
        self._offloading = Offloading(pipeline)
        self._told: set[str] = set()
        self._keepers: dict[str, str] = {}  # hooks that keep state, by the class of a module
        # what keeps state, by its name, and what
        self.stateful: dict[str, tuple[nn.Module, str]] = {}
        # weights that a job's own code has written to, which cannot be put back
        self.spoilt: list[str] = []
        self._writers: set[type] = set()  # pipelines whose own code changes modules
        self._looked: set[Hashable] = set()  # kinds of calls of a pipeline that did not
        names = {id(module): (name, module) for name, module in reversed(list(_modules(pipeline)))}
        self._every = dict(names.values())
        self.processors = (
            Processors([one for _, one in _modules(pipeline)])
            if swaps_processors(pipeline)
            else None
        )
        self._autoencoders: dict[int, dict[str, Target]] = {}
        self._hooked: list[Any] = []
        modules: dict[int, tuple[str, Any]] = {}
        for name, module in _modules(pipeline):
            modules.setdefault(id(module), (name, module))
        for name, module in modules.values():
            if (
                getattr(module, "_diffusers_hook", None)
                and ENGINE_HOOK in module._diffusers_hook.hooks
            ):
                raise EngineMisuse(
                    f"{type(pipeline).__name__}.{name} belongs to another engine; close that first."
                )
        for name, module in modules.values():
            if is_autoencoder(module):
                self._autoencoders[id(module)] = {
                    method: Target(
                        f"{name}.{method}",
                        module,
                        self._around(module, getattr(module, method)),
                        max_decode_rows,
                        watch=StateWatch(name),
                    )
                    for method in ("encode", "decode")
                }
            else:
                cached = isinstance(module, PreTrainedModel)
                hook = SuspendHook(name, cached, owns, kinds, self._around, self.processors)
                HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, ENGINE_HOOK)
                self._hooked.append(module)

    def view(self, scheduler: Any = None) -> Any:
        view = super().view(scheduler)
        for one in pipelines_in(view):
            # other jobs may go on with the models
            one.__dict__["maybe_free_model_hooks"] = lambda: None
            for component in vars(one).values() if self._health.device.type != "cpu" else ():
                keep_times_on_the_host(component)
        return view

    def own(self, job: Job) -> list[Own]:
        """What a job's fiber has of its own: attention processors that it swaps, modules that it
        casts or changes."""
        found: list[Own] = [] if self.processors is None else [Wardrobe(self.processors)]
        if self.takes_turns():
            return found  # it is the only one
        if any(upcasts(module) for module in self._every.values()):
            found.append(OwnTypes(self._every.values()))
        code = has_code([*job.args, *job.kwargs.values()])
        if code or type(self.pipeline) in self._writers or self._signature(job) not in self._looked:
            found.insert(0, OwnState(self._every, weights=code))  # sees what the others leave
            job.watched = True
        return found

    def ended(self, job: Job) -> None:
        """A job has ended well: if its own code had changed modules, that would have been seen, if
        it was watched."""
        if job.watched and len(self._looked) < LOOKED:
            self._looked.add(self._signature(job))

    def _signature(self, job: Job) -> Hashable:
        return signature(type(self.pipeline), job.args, job.kwargs)

    def wrote(self, own: OwnState, job: Job) -> tuple[str, str]:
        """A job's own code has changed modules: its callbacks', or else its pipeline's, whose jobs
        all do; or a hook of a whole module has changed something of its own, so that the module
        keeps state. A code and a text."""
        kind, paths = type(self.pipeline), own.paths
        self.spoilt += [path for path in own.lost if path not in self.spoilt]
        if has_code([*job.args, *job.kwargs.values()]):
            return "callback", f"a job's callback changes {some(paths)}"
        hook = next((path for path in paths if "_hooks[" in path and path[-1] != "]"), None)
        name = "" if hook is None else hook.partition(".")[0]
        if name in self._every:
            self.stateful.setdefault(name, (self._every[name], f"a hook changes {hook}"))
        else:
            self._writers.add(kind)
        return "state", f"a call of {kind.__name__} changes {some(paths)}"

    def takes_turns(self) -> bool:
        return bool(self.stateful) or super().takes_turns()

    def why_turns(self) -> dict[str, tuple[str, str]]:
        """Why jobs run one at a time, by what keeps the state: a code and a text. Empty if they do
        not."""
        # read on any thread
        found = {name: ("state", what) for name, (_, what) in list(self.stateful.items())}
        found |= {
            name: ("turns", f"it carries {hook}, which keeps the state of a call")
            for name, hook in list(self._keepers.items())
        }
        if self._swaps_state():
            found[type(self.pipeline).__name__] = ("turns", "its calls change the shared modules")
        return found

    def close(self) -> None:
        """Take the hooks away, and offloaded models off the GPU, unless it has failed."""
        if self._health.failure is None:
            with contained("take models off the GPU"), on_device(self._health.device):
                self._offloading.offload()
        for module in self._hooked:
            registry = module._diffusers_hook
            _remove(registry)
            forward = module.__dict__.get("forward")
            if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
                # diffusers puts the class's own method back as an attribute
                del module.__dict__["forward"]
            if not registry.hooks:
                del module._diffusers_hook
        self._hooked.clear()

    def _around(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a heavy function of a module in every forward of jobs, alone or
        shared."""
        return self._health.guarded(self._offloading.around(module, function))

    def _swaps_state(self) -> bool:
        return swaps_state(self.pipeline, apart=self.processors is not None, casts=False)

    def _is_harmless(self, hook: Any) -> bool:
        return moves_only(hook)  # here forwards do not overlap

    def _state_keeper(self, module: nn.Module) -> str | None:
        keeper = super()._state_keeper(module)
        if keeper is not None and keeper not in self._told:
            self._told.add(keeper)
            self._keepers[type(module).__name__] = keeper
            logger.warning("jobs run one at a time: %s carries %s", type(module).__name__, keeper)
        return keeper

    def _wrap(self, component: Any) -> Any:
        targets = self._autoencoders.get(id(component))
        return (
            super()._wrap(component)
            if targets is None
            else EngineAutoencoder(component, targets, self._kinds)
        )


def _remove(registry: HookRegistry) -> None:
    """Remove our hook. Where others were registered after it, diffusers' own way would leave out
    the next of them."""
    index = registry._hook_order.index(ENGINE_HOOK)
    ours, following = registry._fn_refs[index], registry._fn_refs[index + 1 : index + 2]
    kept = [(one, one.forward) for one in following if one.original_forward is not None]
    registry.remove_hook(ENGINE_HOOK, recurse=False)
    for one, forward in kept:
        one.forward, one.original_forward = forward, ours.original_forward


def _modules(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a pipeline and of the pipelines in it, by the names of their attributes."""
    for name, component in vars(pipeline).items():
        if isinstance(component, nn.Module):
            yield name, component
        elif isinstance(component, DiffusionPipeline):
            yield from _modules(component)
