"""Where fibers suspend: in a hook on each of the pipeline's modules, in its autoencoder's methods,
and where it reads and makes images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from stepweave.batching.call import Attempt, Call, Target
from stepweave.batching.merge import cloned
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.own_state import OwnState
from stepweave.compat.snapshot import ArgumentSnapshot
from stepweave.compat.torch_state import current
from stepweave.engine.fiber import Fiber, current_fiber, suspend, suspendable
from stepweave.views.image_threads import ImageWork
from stepweave.views.modules import TargetOf


def call_engine(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call of `target`, for which the running fiber is suspended, if it can be."""
    fiber = current_fiber()
    if fiber is None or not suspendable():
        return target.function(*args, **kwargs)
    processors = None if target.processors is None else target.processors.installed()
    call = Call(target, args, kwargs, current(fiber.kinds), processors, fiber.owner)
    request: Call | Attempt = call
    while isinstance(answer := suspend(request), Attempt):
        request, output = answer, _run(answer, fiber)
        if not answer.ran_out:
            answer = output
            break
    if not target.cached:
        fiber.last = answer
    return answer


def _run(attempt: Attempt, fiber: Fiber) -> Any:
    """Run a call in its own fiber. Raises what that raises, unless memory ran out."""
    call = attempt.call
    run = partial(attempt.run, call)
    own = next((state for state in fiber.own if isinstance(state, OwnState)), None)
    snapshot = ArgumentSnapshot(*call.args, *call.kwargs.values())
    try:
        output = run() if own is None else own.during(run)
    except BaseException as error:
        attempt.failed = True
        if not ran_out(error):
            raise
        attempt.ran_out = True  # and the error is let go of, which holds on to the memory
    else:
        if attempt.keep:
            attempt.wrote = snapshot.wrote()
            with contextlib.suppress(
                Exception
            ):  # what cannot be copied is neither compared nor kept
                attempt.output = cloned(output)
        return output
    snapshot.put_back()
    attempt.overwritten = snapshot.overwritten()
    return None


class SuspendHook(ModelHook):  # type: ignore[misc]
    """Suspends the fibers of one engine in a module's forward. Other calls of the module pass
    straight through.

    `owns` tells whose fibers are the engine's, `target_of` makes the target of calls; `cached` are
    encoders, whose results are remembered.
    """

    def __init__(self, owns: Callable[[Fiber], bool], target_of: TargetOf, cached: bool) -> None:
        super().__init__()
        self._owns = owns
        self._target_of = target_of
        self._cached = cached
        self._forward: Callable[..., Any] | None = None
        self._target: Target | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        fiber = current_fiber()
        # diffusers scales an encoder's adapters around the call of it: others must not run in
        # between, nor later have the result
        adapted = self._cached and bool(getattr(module, "peft_config", None))
        if fiber is None or adapted or not self._owns(fiber) or not suspendable():
            return forward(*args, **kwargs)
        if self._target is None or self._forward is not forward:  # somebody hooked it meanwhile
            self._forward, self._target = forward, self._target_of(module, forward)
        return call_engine(self._target, args, kwargs)


def on_image_thread(function: Callable[[], Any], known: bool) -> Any:
    """What a function that reads or makes images gives, on another thread if it may run there."""
    if current_fiber() is None or torch.is_grad_enabled() or not suspendable():
        return function()
    work = ImageWork(function, known)
    return work.result(suspend(work))
