"""A job: one accepted generation request, from admission to delivery."""

from __future__ import annotations

import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from stepweave.errors import Cancelled
from stepweave.generation import Generation, Parameters


@dataclass
class Job:
    """Set by admission: id, parameters, accepted. By the engine: step, result."""

    parameters: Parameters
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    accepted: float = field(default_factory=time.monotonic)
    step: int = 0
    result: Future[Generation] = field(default_factory=Future)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        # whoever stops waiting for the result must not mark it as cancelled under the engine
        self.result.set_running_or_notify_cancel()

    def cancel(self) -> None:
        """Ask that the job end at its next step."""
        self._cancelled.set()

    def on_step(self, step: int, total: int) -> None:
        """Note progress. Raises Cancelled if the job was cancelled meanwhile."""
        self.step = step
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the job was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled

    def describe(self) -> dict[str, Any]:
        """For log lines: what identifies the job, without its prompt."""
        values = self.parameters.of_image(0)
        return {"job": self.id, "step": self.step, **{k: v for k, v in values.items() if "prompt" not in k}}
