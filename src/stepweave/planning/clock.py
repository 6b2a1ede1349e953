"""Measures how long forwards take, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

PENDING = 256  # forwards that a GPU may be behind; more are not timed

Took = Callable[[float], None]  # called with the seconds


class Clock(Protocol):
    def start(self) -> Any:
        """Start to measure. Returns the argument of `stop`."""

    def stop(self, started: Any, took: Took) -> None:
        """Call `took` with the seconds since `started`, now or at a later `stop`."""


class HostClock:
    """For devices whose forwards are done when the call returns."""

    def start(self) -> float:
        return time.perf_counter()

    def stop(self, started: float, took: Took) -> None:
        took(time.perf_counter() - started)


def now() -> float:
    """Seconds of the host's clock, for durations to subtract from those of forwards."""
    return time.perf_counter()


class CudaClock:
    """Times forwards by events in the GPU's stream, read once the GPU has reached them. If the GPU
    had to wait for the host, the host's time is measured."""

    def __init__(
        self, event: Callable[[], Any] | None = None, device: torch.device | None = None
    ) -> None:
        self._event = event or partial(torch.cuda.Event, enable_timing=True)
        self._device = device  # it need not be the current one
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
            first, last, report = self._pending.popleft()
            report(first.elapsed_time(last) / 1000)


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device=device) if device.type == "cuda" else HostClock()
