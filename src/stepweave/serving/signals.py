"""Calls a function on signals, in addition to their present handlers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import FrameType


def on_signals(function: Callable[[], None], *numbers: int) -> None:
    """Have the running event loop call `function` when the process gets one of these signals; their
    handlers are called as before. Call it on the main thread."""
    loop = asyncio.get_running_loop()
    for number in numbers:
        following = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, following: object = following) -> None:
            loop.call_soon_threadsafe(function)
            if callable(following):
                following(number, frame)

        signal.signal(number, handle)
