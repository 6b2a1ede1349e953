"""How long forwards take, with what follows each of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

PENDING = 256  # forwards that a GPU may be behind by, before one is left untimed

Took = Callable[[float], None]  # told the seconds


class Clock(Protocol):
    """Measures without waiting for the device."""

    def start(self) -> Any:
        """What `stop` wants back."""

    def stop(self, started: Any, took: Took) -> None:
        """Tell `took` the seconds since `started`, now or at a later `stop`."""


class HostClock:
    """For devices whose forwards have been computed when the call returns."""

    def start(self) -> float:
        return time.perf_counter()

    def stop(self, started: float, took: Took) -> None:
        took(time.perf_counter() - started)


def now() -> float:
    """Seconds of the host's clock, to be subtracted from what forwards took."""
    return time.perf_counter()


class CudaClock:
    """Events in the stream: what the GPU took, or the host where the GPU had to wait for it; read
    once they have come to pass."""

    def __init__(
        self, event: Callable[[], Any] | None = None, device: torch.device | None = None
    ) -> None:
        self._event = event or partial(torch.cuda.Event, enable_timing=True)
        self._device = device  # which need not be the current one
        self._pending: deque[tuple[Any, Any, Took]] = deque()  # oldest first

    def start(self) -> Any:
        event = self._event()
        event.record(*([] if self._device is None else [torch.cuda.current_stream(self._device)]))
        return event

    def stop(self, started: Any, took: Took) -> None:
        ended = self.start()
        if len(self._pending) < PENDING:
            self._pending.append((started, ended, took))
        while self._pending and self._pending[0][1].query():
            first, last, tell = self._pending.popleft()
            tell(first.elapsed_time(last) / 1000)


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device=device) if device.type == "cuda" else HostClock()
