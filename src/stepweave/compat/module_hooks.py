"""Hooks of diffusers on modules, installed and taken away without a trace."""

from __future__ import annotations

from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from stepweave.compat.turn_taking import ENGINE_HOOK, modules_in
from stepweave.errors import EngineMisuseError


def check_free(pipeline: Any) -> None:
    """Raises EngineMisuseError for a pipeline whose modules another engine has hooked."""
    for name, module in modules_in(pipeline):
        registry = getattr(module, "_diffusers_hook", None)
        if registry and ENGINE_HOOK in registry.hooks:
            kind = type(pipeline).__name__
            raise EngineMisuseError(f"{kind}.{name} belongs to another engine; close that first.")


def install(module: nn.Module, hook: ModelHook) -> None:
    """Have the module's forward go through the hook."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, ENGINE_HOOK)


def uninstall(module: nn.Module) -> None:
    """Take the hook away, and what diffusers leaves behind."""
    registry: Any = module._diffusers_hook
    _remove(registry)
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # diffusers puts the class's own method back as an attribute
    if not registry.hooks:
        del module._diffusers_hook


def _remove(registry: Any) -> None:
    """Where others were registered after it, diffusers' own way would leave out the next of
    them."""
    index = registry._hook_order.index(ENGINE_HOOK)
    ours, following = registry._fn_refs[index], registry._fn_refs[index + 1 : index + 2]
    kept = [(ref, ref.forward) for ref in following if ref.original_forward is not None]
    registry.remove_hook(ENGINE_HOOK, recurse=False)
    for ref, forward in kept:
        ref.forward, ref.original_forward = forward, ours.original_forward
