"""Attention processors that calls swap: every job's own, though the modules are shared.

Pipelines with perturbed attention guidance (PAG, Ahn et al. 2024, arXiv:2403.17377) put processors
of their own into the denoiser's attentions for the length of a call. Here they are in place only
while the job's own code runs, or a forward of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# the processors of all attentions, in order; None for those that are there anyway
Installed = tuple[Any, ...] | None


class AttentionProcessors:
    """The processors of a pipeline's attentions. Everything here is done by the engine's thread."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._attentions = [
            part for module in modules for part in module.modules() if hasattr(part, "processor")
        ]
        self._base: tuple[Any, ...] | None = None  # while others are in place

    def install(self, installed: Installed) -> None:
        """Put a job's processors in place, until `restore`."""
        self._base = self._all()
        self._set(installed or self._base)

    def installed(self) -> Installed:
        """The processors in place, if they are a job's own."""
        found = self._all()
        return None if self._base is None or _same(found, self._base) else found

    def restore(self) -> Installed:
        """Have everything be as it was before `install`; gives what the job has put in place
        meanwhile."""
        installed, base = self.installed(), self._base
        assert base is not None
        self._base = None
        self._set(base)
        return installed

    @contextlib.contextmanager
    def installing(self, installed: Installed) -> Iterator[None]:
        """Within the block a job's processors are in place, if it has some of its own."""
        if installed is None or self._base is not None:
            yield
            return
        self.install(installed)
        try:
            yield
        finally:
            self.restore()

    def _all(self) -> tuple[Any, ...]:
        return tuple(attention.processor for attention in self._attentions)

    def _set(self, processors: tuple[Any, ...]) -> None:
        for attention, processor in zip(self._attentions, processors, strict=True):
            set_processor(attention, processor)


class ProcessorSwap:
    """One job's processors, installed and restored around its fiber's switches."""

    def __init__(self, processors: AttentionProcessors) -> None:
        self._processors = processors
        self._installed: Installed = None

    def enter(self) -> None:
        self._processors.install(self._installed)

    def leave(self) -> None:
        self._installed = self._processors.restore()


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))


def set_processor(attention: torch.nn.Module, processor: Any) -> None:
    """Put an attention's processor in place, be it a module or not; torch takes nothing else in a
    module's place."""
    if attention.processor is not processor:
        if isinstance(attention.processor, torch.nn.Module):
            del attention.processor
        attention.processor = processor
