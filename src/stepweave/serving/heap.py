"""Memory that the C library keeps once it has been freed."""

from __future__ import annotations

import ctypes

import psutil

# of resident memory over the least that was seen, from which on it is worth looking
SLACK_BYTES = 256 * 1024 * 1024


class Heap:
    """Gives memory that was freed back to the system.

    glibc's malloc keeps what lies between blocks in use, and after many large answers, whose
    buffers are freed in any order, that may be gigabytes (malloc_trim(3)). Elsewhere nothing is
    done.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._process = psutil.Process()
        self._least = self._process.memory_info().rss

    def look(self) -> None:
        """Trim the heap if it has grown. Takes milliseconds to tenths of a second; not for the
        event loop's thread."""
        resident = self._process.memory_info().rss
        if self._trim is not None and resident > self._least + SLACK_BYTES:
            self._trim(ctypes.c_size_t(0))
            resident = self._process.memory_info().rss
            self._least = max(self._least, resident)  # what is still there is in use
        self._least = min(self._least, resident)
