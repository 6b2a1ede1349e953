"""How the stores fare: what failed, why, and whether what is written arrives."""

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

# that a question about free bytes may take; a network's file system may never answer
FREE_SECONDS = 1.0

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def reason_of(error: OSError | sqlite3.Error) -> Reason:
    """`full`: no room is left, or none by quota; `busy`: another process has the file locked;
    `failed`: all else."""
    if isinstance(error, OSError):
        return "full" if error.errno in _FULL else "failed"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte; the rest tells kinds of it
    return "busy" if code in _BUSY else "full" if code == sqlite3.SQLITE_FULL else "failed"


def words_of(error: OSError | sqlite3.Error) -> str:
    """The error's own words, without a path."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


class StoreHealth:
    """One store's failures since the start, by reason, and what became of its last write.

    Told by the store's threads, asked by any.
    """

    def __init__(self) -> None:
        self.failures: Counter[Reason] = Counter()
        # as "full: No space left on device"; None while writes work
        self.problem: str | None = None
        self._lock = threading.Lock()

    @property
    def writable(self) -> bool:
        return self.problem is None

    def failed(self, error: OSError | sqlite3.Error, *, writing: bool) -> None:
        """A call failed. One that only reads tells nothing of writes."""
        reason = reason_of(error)
        with self._lock:
            self.failures[reason] += 1
            if writing:
                self.problem = f"{reason}: {words_of(error)}"

    def wrote(self) -> None:
        """Something new was written."""
        self.problem = None


class FreeBytes:
    """Bytes that are free for this process where a path is: asked on a thread of its own, one
    question at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = DaemonExecutor(1, "store-free")
        self._asked: Future[int] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """NaN if that cannot be told, or not within `FREE_SECONDS`. Not for the event loop's
        thread."""
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._thread.submit(lambda: shutil.disk_usage(self._path).free)
            asked = self._asked
        try:
            return float(asked.result(FREE_SECONDS))
        except (OSError, TimeoutError):
            return math.nan
