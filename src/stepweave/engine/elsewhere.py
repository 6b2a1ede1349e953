"""Work of fibers on other threads than the engine's, such as reading and making pictures."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from stepweave.engine.active import Active
from stepweave.engine.ambient import use_device
from stepweave.engine.hooks import Offload

THREADS = 2


class Elsewhere:
    """Runs it; `returned` is called on one of its threads with what came of it."""

    def __init__(self, returned: Callable[[Active, Any], None], device: torch.device) -> None:
        self._returned = returned
        self.here = False  # on the engine's own thread, at once
        self._threads = ThreadPoolExecutor(
            THREADS, thread_name_prefix="stepweave-pictures", initializer=use_device, initargs=(device,)
        )

    def run(self, active: Active, work: Offload) -> None:
        active.elsewhere = True

        def run() -> None:
            answer: Any
            try:
                with torch.no_grad():
                    answer = work.function()
            except BaseException as error:
                answer = error
            self._returned(active, answer)

        if self.here:
            run()
            return
        try:
            self._threads.submit(run)
        except RuntimeError:  # the interpreter is ending
            run()

    def close(self) -> None:
        self._threads.shutdown()
