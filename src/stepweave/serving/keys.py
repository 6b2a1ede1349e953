"""API keys from the settings and from a file, which is read again when it changes.

Only SHA-256 digests of keys are kept, and no message repeats a key, a name or a path: an operator
may have put a key into the place of any of them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import time
from pathlib import Path

from stepweave.config.clients import SHORT_KEY, Client, check_clients, clients_of_file
from stepweave.errors import ConfigError

logger = logging.getLogger(__name__)

SETTING = "STEPWEAVE_API_KEYS_FILE"
MAX_FILE_BYTES = 1_048_576  # Kubernetes' limit of a Secret
LOOK_SECONDS = 1.0  # between two checks of the file
SETTLED_SECONDS = 2.0  # a younger file is read again: it may change with the same time and size

Stamp = tuple[int, int, int, int]  # modification time, inode, device, size


class ApiKeys:
    """The clients of one server, from its settings and the file at `path`. Once keys are `required`
    they stay so: if the file is removed or invalid, the last valid keys stay in force."""

    def __init__(self, fixed: tuple[Client, ...] = (), path: str | None = None) -> None:
        """Read the file. Raises ConfigError if it is invalid, or missing in a directory that is not
        empty (an empty one is the volume of an optional Secret)."""
        self._fixed = fixed
        self._path = None if path is None else Path(path).expanduser()
        self._clients = fixed
        self._stamp: Stamp | None = None
        self._settled = False  # whether the file was old enough when it was read
        self._problem = ""  # of the file, logged last
        self.required = bool(fixed)
        _warn_of_short("STEPWEAVE_API_KEYS", fixed)
        if self._path is None:
            return
        try:
            self._read()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{SETTING}: {_reason(error)}") from None
        if self._stamp is None and not self._clients:
            logger.warning(
                "%s: the file does not exist yet; until it does, no API key is required", SETTING
            )

    def find(self, key: bytes) -> Client | None:
        """The client with this key, or None, in constant time."""
        digest = hashlib.sha256(key).digest()
        owners = [client for client in self._clients if hmac.compare_digest(digest, client.digest)]
        return owners[0] if owners else None

    def names(self) -> list[str]:
        """The names of the clients that have a key."""
        return [client.name for client in self._clients]

    def look(self) -> None:
        """Read the file again if it has changed; not for the event loop. Logs a problem once."""
        if self._path is None:
            return
        before = self._clients
        try:
            self._read()
        except (OSError, ValueError) as error:
            self.required = True
            problem = _reason(error)
            if problem != self._problem:
                logger.error("%s: %s; the last valid keys stay in force", SETTING, problem)
            self._problem = problem
            return
        if self._problem or self._clients != before:
            logger.info("%s: reloaded, %d API keys in force", SETTING, len(self._clients))
        self._problem = ""

    def _read(self) -> None:
        """Raises OSError, or ValueError if the content is invalid."""
        assert self._path is not None
        try:
            # non-blocking: opening a named pipe would wait for its writer
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if self._stamp is None and not self._problem and _is_empty(self._path.parent):
                return
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            stamp = (status.st_mtime_ns, status.st_ino, status.st_dev, status.st_size)
            if stamp == self._stamp and self._settled and not self._problem:
                return
            settled = time.time() - status.st_mtime > SETTLED_SECONDS
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        of_file = clients_of_file(content)
        clients = [*self._fixed, *of_file]
        check_clients(
            clients,
            ["one of STEPWEAVE_API_KEYS"] * len(self._fixed) + ["one of the file"] * len(of_file),
        )
        if stamp != self._stamp:
            _warn_of_short(SETTING, of_file)
        self._clients, self._stamp = tuple(clients), stamp
        self._settled, self.required = settled, True


def _is_empty(directory: Path) -> bool:
    """Whether the directory exists and has no files but Kubernetes' own (`..data`)."""
    try:
        return all(name.startswith("..") for name in os.listdir(directory))
    except OSError:
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the file cannot be read ({error.strerror})"
    return str(error)


def _warn_of_short(setting: str, clients: tuple[Client, ...]) -> None:
    count = sum(client.short for client in clients)
    if count:
        logger.warning(
            "%s: %d of %d API keys have fewer than %d characters and can be guessed; use longer "
            "ones",
            setting,
            count,
            len(clients),
            SHORT_KEY,
        )
