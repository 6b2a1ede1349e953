"""Keeps attention processors that calls install separate for each job.

Pipelines with perturbed attention guidance (PAG, Ahn et al. 2024, arXiv:2403.17377) replace the
denoiser's attention processors during a call. Here the replacements are installed only while the
job's fiber or one of its forwards runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# the processors of all attentions, in order; None for the pipeline's own
Installed = tuple[Any, ...] | None


class AttentionProcessors:
    """The attention processors of a pipeline's modules. For the engine's thread only."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._attentions = [
            part for module in modules for part in module.modules() if hasattr(part, "processor")
        ]
        self._base: tuple[Any, ...] | None = None  # the pipeline's own, while others are installed

    def install(self, installed: Installed) -> None:
        """Install a job's processors, until `restore`."""
        self._base = self._all()
        self._set(installed or self._base)

    def installed(self) -> Installed:
        """The installed processors, if they are a job's own."""
        processors = self._all()
        return None if self._base is None or _same(processors, self._base) else processors

    def restore(self) -> Installed:
        """Undo `install`. Returns the processors that the job has installed meanwhile."""
        installed, base = self.installed(), self._base
        assert base is not None
        self._base = None
        self._set(base)
        return installed

    @contextlib.contextmanager
    def installing(self, installed: Installed) -> Iterator[None]:
        """Within the block, a job's processors are installed, if it has any."""
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
    """Installs one job's processors while its fiber runs."""

    def __init__(self, processors: AttentionProcessors) -> None:
        self._processors = processors
        self._installed: Installed = None

    def enter(self) -> None:
        self._processors.install(self._installed)

    def leave(self) -> None:
        self._installed = self._processors.restore()


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return all(a is b for a, b in zip(first, second, strict=True))


def set_processor(attention: torch.nn.Module, processor: Any) -> None:
    """Set an attention's processor. A module is deleted first: torch allows only another module to
    replace it."""
    if attention.processor is not processor:
        if isinstance(attention.processor, torch.nn.Module):
            del attention.processor
        attention.processor = processor
