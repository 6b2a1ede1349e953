"""Clients and their API keys, read from the setting and from the file of keys.

Only SHA-256 digests of keys are kept, and no message repeats a key or a name: an operator may have
put a key into the place of a name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_CLIENTS = 1000
SHORT_KEY = 16  # characters; shorter keys can be guessed
DIGEST = "sha256:"  # in the file, before a key's digest in hex
ADMIN = "admin"
_FORM = "`name: KEY` or `name: sha256:HEX`, followed by ` admin` for an administrator"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_NO_KEY = hashlib.sha256(b"").digest()


@dataclass(frozen=True)
class Client:
    """The holder of an API key: `name` is for metrics and logs, `owner` for its stored jobs."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the key
    owner: str = field(repr=False)
    admin: bool = False
    short: bool = False  # whether the key is


def clients_of_setting(keys: Iterable[str]) -> tuple[Client, ...]:
    """The clients `key1`, `key2`, ... of `STEPWEAVE_API_KEYS`; `owner` is derived from the key, as
    names change when keys are removed. Raises ValueError over `MAX_CLIENTS`, or for equal keys."""
    clients = []
    for number, key in enumerate(keys, 1):
        digest = hashlib.sha256(key.encode()).digest()
        clients.append(
            Client(f"key{number}", digest, digest.hex()[:32], short=len(key) < SHORT_KEY)
        )
    check_clients(clients, [f"key {number}" for number in range(1, len(clients) + 1)])
    return tuple(clients)


def clients_of_file(content: bytes) -> tuple[Client, ...]:
    """The clients of a file of keys, one per line. Raises ValueError with the line's number."""
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
        raise ValueError("it has no keys")
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
        raise ValueError(f"it must be {_FORM}; comments need their own lines")
    if not _NAME.fullmatch(name):
        raise ValueError("the name must have 1 to 64 letters, digits, `.`, `_` and `-`")
    if words[:1] in ([], [ADMIN], [DIGEST]):  # as a template may write it if the key is missing
        raise ValueError("there is no key after the name")
    key = words[0]
    if key.startswith(DIGEST):
        if not _HEX.fullmatch(key[len(DIGEST) :]):
            raise ValueError(f"`{DIGEST}` must be followed by 64 hex digits")
        digest, short = bytes.fromhex(key[len(DIGEST) :]), False
    else:
        digest, short = hashlib.sha256(key.encode()).digest(), len(key) < SHORT_KEY
        if not key.isprintable():
            raise ValueError("the key has characters that HTTP headers do not allow")
    if digest == _NO_KEY:
        raise ValueError("it is the digest of an empty key")
    return Client(name, digest, owner=name, admin=words[1:] == [ADMIN], short=short)


def check_clients(clients: list[Client], places: list[str]) -> None:
    """Raise ValueError for too many clients, or equal names or keys; `places` locate them."""
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
