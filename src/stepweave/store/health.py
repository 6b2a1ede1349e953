"""Health of the stores: failures by reason, whether writes work, and free bytes."""

from __future__ import annotations

import errno
import math
import shutil
import sqlite3
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, get_args

from stepweave.threads import DaemonExecutor

Reason = Literal["full", "busy", "failed"]
REASONS: tuple[Reason, ...] = get_args(Reason)

FREE_SECONDS = 1.0  # timeout of reading free bytes: a network file system may never answer

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def reason_of(error: OSError | sqlite3.Error) -> Reason:
    """`full` if no space or quota is left, `busy` if another process has a lock, or `failed`."""
    if isinstance(error, OSError):
        return "full" if error.errno in _FULL else "failed"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary result code
    return "busy" if code in _BUSY else "full" if code == sqlite3.SQLITE_FULL else "failed"


def words_of(error: OSError | sqlite3.Error) -> str:
    """The error's message without a path."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


class StoreHealth:
    """A store's failures by reason, and whether its last write worked. For any thread."""

    def __init__(self) -> None:
        self.failures: Counter[Reason] = Counter()
        self.problem: str | None = None  # as "full: No space left on device"; None if writes work
        self._lock = threading.Lock()

    @property
    def writable(self) -> bool:
        return self.problem is None

    def failed(self, error: OSError | sqlite3.Error, *, writing: bool) -> None:
        """Record a failed call; with `writing`, writes count as failing until one succeeds."""
        reason = reason_of(error)
        with self._lock:
            self.failures[reason] += 1
            if writing:
                self.problem = f"{reason}: {words_of(error)}"

    def wrote(self) -> None:
        """Record a successful write."""
        self.problem = None


class FreeBytes:
    """Free bytes of a path's disk for this process, read on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = DaemonExecutor(1, "store-free")
        self._asked: Future[int] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """The free bytes, NaN if unknown after `FREE_SECONDS`. Not for the event loop's thread."""
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._thread.submit(lambda: shutil.disk_usage(self._path).free)
            asked = self._asked
        try:
            return float(asked.result(FREE_SECONDS))
        except (OSError, TimeoutError):
            return math.nan
