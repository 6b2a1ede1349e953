"""Installs diffusers' hooks on modules, and removes them completely."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from stepweave.compat.turn_taking import ENGINE_HOOK
from stepweave.errors import EngineMisuseError


def check_free(kind: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise EngineMisuseError if another engine has hooked one of these modules, by name, of a
    pipeline of this class."""
    for name, module in modules:
        registry = getattr(module, "_diffusers_hook", None)
        if registry and ENGINE_HOOK in registry.hooks:
            raise EngineMisuseError(f"{kind}.{name} belongs to another engine; close that first.")


def install(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, ENGINE_HOOK)


def uninstall(module: nn.Module) -> None:
    """Remove the hook, and what diffusers would leave in the module."""
    registry: Any = module._diffusers_hook
    _remove(registry)
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # diffusers restores the class's method as an attribute
    if not registry.hooks:
        del module._diffusers_hook


def _remove(registry: Any) -> None:
    """Remove the hook from a registry. If others were registered after it, diffusers' `remove_hook`
    alone would skip the next one."""
    index = registry._hook_order.index(ENGINE_HOOK)
    ours, following = registry._fn_refs[index], registry._fn_refs[index + 1 : index + 2]
    kept = [(ref, ref.forward) for ref in following if ref.original_forward is not None]
    registry.remove_hook(ENGINE_HOOK, recurse=False)
    for ref, forward in kept:
        ref.forward, ref.original_forward = forward, ours.original_forward
