"""Where fibers suspend: hooks on modules, methods of autoencoders, and image processing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from stepweave.batching.call import Attempt, Call, Target
from stepweave.batching.forward import run_attempt
from stepweave.compat.own_state import OwnState
from stepweave.compat.row_adapters import with_adapters
from stepweave.compat.torch_state import current, suspendable
from stepweave.engine.fiber import Fiber, current_fiber, suspend
from stepweave.views.image_threads import ImageWork
from stepweave.views.modules import TargetOf


def call_engine(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `target` through the engine: the running fiber is suspended until the result is there.
    Outside of a fiber, call it directly."""
    fiber = current_fiber()
    if fiber is None or not suspendable():
        return target.function(*args, **kwargs)
    processors = None if target.processors is None else target.processors.installed()
    kwargs = with_adapters(target.module, kwargs, fiber.owner)
    call = Call(target, args, kwargs, current(fiber.device_types), processors, fiber.owner)
    own = next((state for state in fiber.own if isinstance(state, OwnState)), None)
    request: Call | Attempt = call
    while isinstance(answer := suspend(request), Attempt):
        request, output = answer, run_attempt(answer, own)
        if not answer.ran_out:
            answer = output
            break
    if not target.cached:
        fiber.last = answer
    return answer


class SuspendHook(ModelHook):  # type: ignore[misc]
    """Suspends the fibers of one engine in a module's forward; other callers run it directly.

    `owns` says whether a fiber is the engine's, `target_of` makes the target of calls, and `cached`
    marks an encoder, whose results are cached.
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
        # diffusers scales an encoder's adapters around its call: other jobs must not run meanwhile,
        # nor get the result from the cache
        adapted = self._cached and bool(getattr(module, "peft_config", None))
        if fiber is None or adapted or not self._owns(fiber) or not suspendable():
            return forward(*args, **kwargs)
        if self._target is None or self._forward is not forward:  # other code has hooked it since
            self._forward, self._target = forward, self._target_of(module, forward)
        return call_engine(self._target, args, kwargs)


def on_image_thread(function: Callable[[], Any], known: bool) -> Any:
    """Call a function that reads or makes images, on an image thread if possible."""
    if current_fiber() is None or torch.is_grad_enabled() or not suspendable():
        return function()
    work = ImageWork(function, known)
    return work.result(suspend(work))
