"""The heap: freed memory goes back to the system, and the model is not searched for garbage."""

from __future__ import annotations

import ctypes
import gc

import psutil

SLACK_BYTES = 256 * 1024 * 1024  # growth of resident memory from which on the heap is trimmed


class Heap:
    """Trims glibc's heap, which keeps freed memory between blocks in use: after many large answers
    that may be gigabytes (malloc_trim(3)). Does nothing with other C libraries."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._process = psutil.Process()
        self._least = self._process.memory_info().rss

    def look(self) -> None:
        """Trim the heap if it has grown. Takes up to tenths of a second: not for the event loop."""
        resident = self._process.memory_info().rss
        if self._trim is not None and resident > self._least + SLACK_BYTES:
            self._trim(ctypes.c_size_t(0))
            resident = self._process.memory_info().rss
            self._least = max(self._least, resident)  # the rest is in use
        self._least = min(self._least, resident)


def set_aside() -> None:
    """Have the garbage collector skip all objects that exist: model and libraries, a million or so,
    which stay. Full collections, in which no thread can run Python, otherwise take tenths of a
    second (https://docs.python.org/3/library/gc.html#gc.freeze)."""
    gc.collect()
    gc.freeze()


def take_back() -> None:
    """Let the garbage collector see all objects again."""
    gc.unfreeze()
