"""Work of fibers on other threads than the engine's, such as reading and making pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from stepweave.compat.own_state import OwnState, OwnTypes
from stepweave.compat.torch_state import DefaultRandom, use_device
from stepweave.engine.active import Active
from stepweave.engine.hooks import Offload, RunYourself
from stepweave.threads import DaemonExecutor

THREADS = 2


class Elsewhere:
    """Runs it; `returned` is called on one of its threads with what came of it, or on the engine's
    with RunYourself."""

    def __init__(self, returned: Callable[[Active, Any], None], device: torch.device) -> None:
        self._returned = returned
        self.here = False  # on the engine's own thread
        self._threads = DaemonExecutor(THREADS, "stepweave-pictures", partial(use_device, device))

    def run(self, active: Active, work: Offload) -> None:
        active.elsewhere = True
        if self.here or not _may_move(active, work):
            self._returned(active, RunYourself())
            return
        self._threads.submit(_run, [active], work.function, self._returned)

    def end(self, seconds: float) -> bool:
        """Take no more work; whether all is done within some seconds."""
        return self._threads.end(seconds)


def _may_move(active: Active, work: Offload) -> bool:
    """Whether it would find on another thread what it finds on the engine's: nothing that is the
    whole process's is the job's own. Where it is looked for what a job's own code leaves in the
    modules, code that is not known stays, too."""
    fiber = active.fiber
    if fiber.dtype != torch.get_default_dtype() or any(
        isinstance(one, (OwnState, OwnTypes)) and one for one in fiber.own
    ):
        return False
    return work.known or not any(isinstance(one, (OwnState, DefaultRandom)) for one in fiber.own)


def _run(
    held: list[Active], function: Callable[[], Any], returned: Callable[[Active, Any], None]
) -> None:
    active = held.pop()  # so that nothing on this thread keeps it
    returned(active, active.fiber.beside(function))
