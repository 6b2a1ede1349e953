"""The directory of a server's state: one server's alone, or a temporary one."""

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

    A missing one is made, mode 0700. None stands for a temporary directory, removed when the
    context or the process ends. Raises ConfigError if the directory cannot be used, or another
    server uses it.
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
            f"{setting}: the directory cannot be made or written to ({error.strerror})"
        ) from None
    try:
        try:
            # Of the open file, so it ends with the process, whatever ends that; the file itself
            # stays, or a third server could lock a new one while a second one still locks the old
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{setting}: another server uses this directory; give each one its own"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{setting}: the directory cannot be locked ({error.strerror})"
            ) from None
        yield directory
    finally:
        os.close(lock)
