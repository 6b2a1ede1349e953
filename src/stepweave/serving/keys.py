"""API keys: which clients a server has, from its settings and from a file that is read again when
it changes.

Of the keys themselves only SHA-256 digests are kept, and no message repeats a key, nor a name or a
path: what stands in their place may be a key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stepweave.errors import ConfigError

logger = logging.getLogger(__name__)

SETTING = "STEPWEAVE_API_KEYS_FILE"
MAX_CLIENTS = 1000
MAX_FILE_BYTES = 1_048_576  # as Kubernetes allows a Secret
SHORT_KEY = 16  # characters; a key that has fewer may be guessed
LOOK_SECONDS = 1.0  # between two looks at the file
# a file changed later than this before it was read may change again without another time or size
SETTLED_SECONDS = 2.0
DIGEST = "sha256:"  # in the file: what follows is the digest of the key, in hex
ADMIN = "admin"
_FORM = "`name: KEY` or `name: sha256:HEX`, with ` admin` after it for an administrator"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_NO_KEY = hashlib.sha256(b"").digest()

Stamp = tuple[int, int, int, int]  # what changes with a file


@dataclass(frozen=True)
class Client:
    """Who may ask: `name` is for metrics and logs, `owner` what its jobs are stored under."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of its key
    owner: str = field(repr=False)
    admin: bool = False
    short: bool = False  # its key


def clients_of_setting(keys: Iterable[str]) -> tuple[Client, ...]:
    """The clients `key1`, `key2`, ... of the keys in `STEPWEAVE_API_KEYS`.

    Their jobs belong to the key rather than to its place, which changes when keys are added or
    removed. Raises ValueError for more than `MAX_CLIENTS` keys, and where two are the same.
    """
    clients = []
    for number, key in enumerate(keys, 1):
        digest = hashlib.sha256(key.encode()).digest()
        clients.append(
            Client(f"key{number}", digest, digest.hex()[:32], short=len(key) < SHORT_KEY)
        )
    _check(clients, [f"key {number}" for number in range(1, len(clients) + 1)])
    return tuple(clients)


def clients_of_file(content: bytes) -> tuple[Client, ...]:
    """The clients of a keys file, one a line. Raises ValueError with the number of the line that is
    wrong."""
    clients, places = [], []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            client = _client_of_line(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if client is not None:
            clients.append(client)
            places.append(f"line {number}")
    if not clients:
        raise ValueError("there is no key in it")
    _check(clients, places)
    return tuple(clients)


def _client_of_line(line: bytes) -> Client | None:
    try:
        text = line.decode().strip(" \t\r")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if not text or text.startswith("#"):
        return None
    name, colon, rest = text.partition(":")
    name, words = name.strip(), rest.split()
    if not colon or len(words) > 2 or words[1:] not in ([], [ADMIN]):
        raise ValueError(f"it must be {_FORM}; a comment has a line of its own")
    if not _NAME.fullmatch(name):
        raise ValueError("the name must have 1 to 64 letters, digits, `.`, `_` and `-`")
    if words[:1] in ([], [ADMIN], [DIGEST]):  # what a template may leave of a key that is not there
        raise ValueError("there is no key after the name")
    key = words[0]
    if key.startswith(DIGEST):
        if not _HEX.fullmatch(key[len(DIGEST) :]):
            raise ValueError(f"after `{DIGEST}` must come 64 hex digits")
        digest, short = bytes.fromhex(key[len(DIGEST) :]), False
    else:
        digest, short = hashlib.sha256(key.encode()).digest(), len(key) < SHORT_KEY
        if not key.isprintable():
            raise ValueError("the key has characters that no header may have")
    if digest == _NO_KEY:
        raise ValueError("it is the digest of an empty key")
    return Client(name, digest, owner=name, admin=words[1:] == [ADMIN], short=short)


def _check(clients: list[Client], places: list[str]) -> None:
    """Raise ValueError if there are too many clients, or two of one name or key; `places` is where
    each stands."""
    if len(clients) > MAX_CLIENTS:
        raise ValueError(f"there are {len(clients)} keys; the limit is {MAX_CLIENTS}")
    names: dict[str, str] = {}
    digests: dict[bytes, str] = {}
    for client, place in zip(clients, places, strict=True):
        if client.name in names:
            raise ValueError(f"{names[client.name]} and {place} have the same name")
        if client.digest in digests:
            raise ValueError(f"{digests[client.digest]} and {place} have the same key")
        names[client.name] = digests[client.digest] = place


class ApiKeys:
    """The clients of one server: those of its settings, and those of the file at `path`, if there
    is one.

    Once keys are `required` they stay so, whatever becomes of the file: one that is gone or wrong
    leaves the last good keys.
    """

    def __init__(self, fixed: tuple[Client, ...] = (), path: str | None = None) -> None:
        """Read the file. Raises ConfigError if it cannot be used.

        A missing file is an error, too, unless its directory is empty: that is a volume of a Secret
        that may be absent.
        """
        self._fixed = fixed
        self._path = None if path is None else Path(path).expanduser()
        self._clients = fixed
        self._stamp: Stamp | None = None
        self._settled = False  # when it was read
        self._problem = ""  # of the file, as logged last
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
                "%s: there is no such file yet; until there is one, no key is needed", SETTING
            )

    def find(self, key: bytes) -> Client | None:
        """Whose key it is, if it is one, in a time that does not depend on which."""
        digest = hashlib.sha256(key).digest()
        found = [one for one in self._clients if hmac.compare_digest(digest, one.digest)]
        return found[0] if found else None

    def names(self) -> list[str]:
        """The names of the clients that have a key."""
        return [one.name for one in self._clients]

    def look(self) -> None:
        """Read the file again if it has changed; not for the event loop. What is wrong with it is
        logged once."""
        if self._path is None:
            return
        before = self._clients
        try:
            self._read()
        except (OSError, ValueError) as error:
            self.required = True
            problem = _reason(error)
            if problem != self._problem:
                logger.error("%s: %s; the last good keys stay in force", SETTING, problem)
            self._problem = problem
            return
        if self._problem or self._clients != before:
            logger.info("%s was read again: there are %d API keys", SETTING, len(self._clients))
        self._problem = ""

    def _read(self) -> None:
        """Raises OSError, or ValueError for what is wrong with the content."""
        assert self._path is not None
        try:
            # not blocking: a named pipe would wait for its writer
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if self._stamp is None and not self._problem and _is_empty(self._path.parent):
                return
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no regular file")
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
        found = clients_of_file(content)
        clients = [*self._fixed, *found]
        _check(
            clients,
            ["one of STEPWEAVE_API_KEYS"] * len(self._fixed) + ["one of the file"] * len(found),
        )
        if stamp != self._stamp:
            _warn_of_short(SETTING, found)
        self._clients, self._stamp, self._settled, self.required = (
            tuple(clients),
            stamp,
            settled,
            True,
        )


def _is_empty(directory: Path) -> bool:
    """Whether it is there and holds nothing, besides what Kubernetes keeps for itself
    (`..data`)."""
    try:
        return all(name.startswith("..") for name in os.listdir(directory))
    except OSError:
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the file cannot be read ({error.strerror})"
    return str(error)


def _warn_of_short(setting: str, clients: tuple[Client, ...]) -> None:
    count = sum(one.short for one in clients)
    if count:
        logger.warning(
            "%s: %d of %d keys have fewer than %d characters and may be guessed",
            setting,
            count,
            len(clients),
            SHORT_KEY,
        )
