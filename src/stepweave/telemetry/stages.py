"""Durations of the stages of a start: `stepweave_model_load_seconds{stage}`."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

LoadStage = Literal[
    "starting",
    "importing",
    "downloading",
    "loading",
    "warming_up",
    "certifying",
    "trying_limits",
    "profiling",
]
STAGES = get_args(LoadStage)


class StageTimes:
    """Seconds of each of `STAGES`. Written by the thread that loads, read by any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._running: str | None = None
        self._since = 0.0
        self._lock = threading.Lock()

    def enter(self, stage: str | None) -> None:
        """End the running stage and start another, or none if it is not one of `STAGES`."""
        with self._lock:
            now = self._clock()
            if self._running is not None:
                self._seconds[self._running] += now - self._since
            self._running, self._since = stage if stage in self._seconds else None, now

    def seconds(self) -> Mapping[str, float]:
        """Seconds by stage, so far for the running one, 0 for later ones."""
        with self._lock:
            seconds = dict(self._seconds)
            if self._running is not None:
                seconds[self._running] += self._clock() - self._since
        return seconds

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Record calls of `enter_stage` on this thread, within the context, in these times."""
        token = _times.set(self)
        try:
            yield
        finally:
            _times.reset(token)


_times: contextvars.ContextVar[StageTimes | None] = contextvars.ContextVar(
    "stepweave_stage_times", default=None
)


def enter_stage(name: LoadStage) -> None:
    """Start the stage `name`, if a start is timed on this thread."""
    times = _times.get()
    if times is not None:
        times.enter(name)
