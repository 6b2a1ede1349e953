"""Returns freed memory from the C library to the system."""

from __future__ import annotations

import ctypes

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
