"""The clients of a server, by their API keys: what the setting and the file of keys say.

Of the keys themselves only SHA-256 digests are kept, and no message repeats a key, nor a name: what
stands in its place may be a key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_CLIENTS = 1000
SHORT_KEY = 16  # characters; a key that has fewer may be guessed
DIGEST = "sha256:"  # in the file: what follows is the digest of the key, in hex
ADMIN = "admin"
_FORM = "`name: KEY` or `name: sha256:HEX`, with ` admin` after it for an administrator"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_NO_KEY = hashlib.sha256(b"").digest()


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
    check_clients(clients, [f"key {number}" for number in range(1, len(clients) + 1)])
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
    check_clients(clients, places)
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


def check_clients(clients: list[Client], places: list[str]) -> None:
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
