"""The directory of a server's state, locked by one server, or temporary."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepweave.errors import ConfigError, shown


@contextmanager
def state_directory(path: str | None) -> Iterator[Path]:
    """The directory for a server's state, locked for this process until the context ends.

    Created with mode 0700 if missing. With None, a temporary directory, removed when the context or
    the process ends. Raises ConfigError if it is unusable, or used by another server.
    """
    if path is None:
        with tempfile.TemporaryDirectory(
            prefix="stepweave-", ignore_cleanup_errors=True
        ) as temporary:
            yield Path(temporary)
        return
    directory = Path(path).expanduser()
    setting = f"STEPWEAVE_STATE_DIR={shown(path)}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{setting}: the directory cannot be created or written to ({error.strerror})"
        ) from None
    try:
        try:
            # ends with the process. The file stays: two servers could lock an old and a new one
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{setting}: another server uses this directory; give each server its own"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{setting}: the directory cannot be locked ({error.strerror})"
            ) from None
        yield directory
    finally:
        os.close(lock)
