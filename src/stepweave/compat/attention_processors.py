"""Attention processors that calls swap: every job's own, though the modules are shared.

Pipelines with perturbed attention guidance (PAG, Ahn et al. 2024, arXiv:2403.17377) put processors
of their own into the denoiser's attentions for the length of a call. Here they are in place only
while the job's own code runs, or a forward of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from stepweave.scope.pipeline import set_processor

# the processors of all attentions, in order; None for those that are there anyway
Worn = tuple[Any, ...] | None


class Processors:
    """The processors of a pipeline's attentions. Everything here is done by the engine's thread."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._attentions = [
            part for module in modules for part in module.modules() if hasattr(part, "processor")
        ]
        self._base: tuple[Any, ...] | None = None  # while others are in place

    def put_on(self, worn: Worn) -> None:
        """Put a job's processors in place, until `take_off`."""
        self._base = self._all()
        self._set(worn or self._base)

    def worn(self) -> Worn:
        """The processors in place, if they are a job's own."""
        found = self._all()
        return None if self._base is None or _same(found, self._base) else found

    def take_off(self) -> Worn:
        """Have everything be as it was before `put_on`; gives what the job has put in place
        meanwhile."""
        worn, base = self.worn(), self._base
        assert base is not None
        self._base = None
        self._set(base)
        return worn

    @contextlib.contextmanager
    def wearing(self, worn: Worn) -> Iterator[None]:
        """Within the block a job's processors are in place, if it has some of its own."""
        if worn is None or self._base is not None:
            yield
            return
        self.put_on(worn)
        try:
            yield
        finally:
            self.take_off()

    def _all(self) -> tuple[Any, ...]:
        return tuple(one.processor for one in self._attentions)

    def _set(self, processors: tuple[Any, ...]) -> None:
        for attention, processor in zip(self._attentions, processors, strict=True):
            set_processor(attention, processor)


class Wardrobe:
    """One job's processors, put on and taken off around its fiber's switches."""

    def __init__(self, processors: Processors) -> None:
        self._processors = processors
        self._worn: Worn = None

    def enter(self) -> None:
        self._processors.put_on(self._worn)

    def leave(self) -> None:
        self._worn = self._processors.take_off()


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))
