"""Image files under unguessable names, with limits of age and total size."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from stepweave.errors import StepweaveError, shown
from stepweave.parameters import MEDIA_TYPES, OutputFormat
from stepweave.store.health import StoreHealth, words_of
from stepweave.threads import DaemonExecutor, on_thread

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
READERS = 4  # threads
PROBE_BYTES = 64 * 1024  # an empty file could be written to a full disk
_NAME = re.compile(rf"[0-9a-f]{{32}}\.({'|'.join(MEDIA_TYPES)})")
_PARTIAL = re.compile(rf"\.{_NAME.pattern}\.partial")


@dataclass(frozen=True)
class StoredFile:
    """A stored file's content, for an answer."""

    data: bytes
    media_type: str
    expires_in: float  # seconds, more than 0


class FileStore(Protocol):
    """A store of image files. Methods raise StepweaveError (code `store_failed`) if it fails."""

    @property
    def health(self) -> StoreHealth:
        """Failures so far, and whether writes work."""

    async def probe(self) -> None:
        """Test whether writes work, by writing and deleting a file."""

    async def put(self, data: bytes, suffix: OutputFormat) -> str:
        """Store a file; returns its name. Raises StepweaveError (`file_too_large`) if too large."""

    async def get(self, name: str) -> StoredFile | None:
        """The file of that name; None if there is none, it has expired, or it is no valid name."""

    def has(self, name: str) -> bool:
        """Whether there is an unexpired file of that name, from memory."""

    async def delete(self, names: Iterable[str]) -> None:
        """Delete files; unknown names are ignored."""

    async def sweep(self, now: float) -> list[str]:
        """Delete files that have expired by `now`, Unix seconds. Returns the names of all that
        expired or were deleted for space since the last sweep, for `JobStore.forget`."""

    async def close(self) -> None:
        """Finish submitted calls; refuse new ones."""

    @property
    def count(self) -> int:
        """Number of files."""

    @property  # last, since the name hides the builtin from annotations below
    def bytes(self) -> int:
        """Total size of the files, never over the limit."""


@dataclass(frozen=True)
class _Entry:
    size: int  # bytes
    created: float  # Unix seconds


class DirectoryFileStore:
    """A FileStore in a directory that no other process writes to.

    A single thread writes files and changes the index, so their total size never exceeds the limit.
    A file gets its name once it is completely on the disk; its modification time is when it was
    stored. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_seconds: float,
        max_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Index the files of an earlier run. Raises StepweaveError (code `store_failed`)."""
        self._directory = Path(directory)
        self._keep_seconds = keep_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._index: dict[str, _Entry] = {}  # oldest first
        self._bytes = 0
        self._gone: list[str] = []  # deleted for space or expired, since the last sweep
        self._closed = False
        self.health = StoreHealth()
        self._writer = DaemonExecutor(1, "file-writer")
        self._readers = DaemonExecutor(READERS, "file-reader")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._read_directory()
            self._make_room(0)
        except OSError as error:
            raise self._failure(error, writing=True) from error

    def _read_directory(self) -> None:
        now, files = self._clock(), []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    continue
                if _PARTIAL.fullmatch(entry.name):
                    os.unlink(entry.path)
                elif _NAME.fullmatch(entry.name):
                    status = entry.stat(follow_symlinks=False)
                    # a future time means that the clock was set back; it must not delay expiry
                    files.append((min(status.st_mtime, now), entry.name, status.st_size))
        for created, name, size in sorted(files):
            self._index[name] = _Entry(size, created)
            self._bytes += size

    @property
    def count(self) -> int:
        return len(self._index)

    async def put(self, data: bytes, suffix: OutputFormat) -> str:
        if suffix not in MEDIA_TYPES:
            raise ValueError(f"suffix is {shown(suffix)}; allowed are {', '.join(MEDIA_TYPES)}.")
        if len(data) > self._max_bytes:
            message = (
                f"The image's file has {len(data)} bytes; the limit of the file store is "
                f"{self._max_bytes} bytes in total (STEPWEAVE_KEEP_BYTES)."
            )
            raise StepweaveError(message, code="file_too_large")
        name = await self._run(self._writer, self._write, data, suffix)
        self.health.wrote()
        return name

    async def probe(self) -> None:
        await self._run(self._writer, self._write_and_remove)
        self.health.wrote()

    def _write_and_remove(self) -> None:
        with self._partial(f"{secrets.token_hex(16)}.png", bytes(PROBE_BYTES)) as partial:
            partial.unlink()

    @contextlib.contextmanager
    def _partial(self, name: str, data: bytes) -> Iterator[Path]:
        """Write a file to the disk under a temporary name; it is deleted if the block fails."""
        partial = self._directory / f".{name}.partial"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                # otherwise a power failure could leave the name without the data
                os.fsync(file.fileno())
            yield partial
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    def _write(self, data: bytes, suffix: OutputFormat) -> str:
        name, created = f"{secrets.token_hex(16)}.{suffix}", self._clock()
        self._make_room(len(data))
        with self._partial(name, data) as partial:
            os.utime(partial, (created, created))
            os.replace(partial, self._directory / name)
        self._index[name] = _Entry(len(data), created)
        self._bytes += len(data)
        return name

    def _make_room(self, size: int) -> None:
        while self._index and self._bytes + size > self._max_bytes:
            oldest = next(iter(self._index))
            self._remove(oldest)
            self._gone.append(oldest)

    def _remove(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)
        self._bytes -= self._index.pop(name).size

    async def get(self, name: str) -> StoredFile | None:
        if not _NAME.fullmatch(name) or name not in self._index:
            return None
        return await self._run(self._readers, self._read, name)

    def _read(self, name: str) -> StoredFile | None:
        entry = self._index.get(name)
        if entry is None:
            return None
        try:
            data = (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None
        expires_in = self._expires_in(entry)
        if expires_in <= 0:
            return None
        return StoredFile(data, MEDIA_TYPES[name.partition(".")[2]], expires_in)

    def has(self, name: str) -> bool:
        entry = self._index.get(name)
        return entry is not None and self._expires_in(entry) > 0

    def _expires_in(self, entry: _Entry) -> float:
        return entry.created + self._keep_seconds - self._clock()

    async def delete(self, names: Iterable[str]) -> None:
        await self._run(self._writer, self._delete, tuple(names))

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._index:
                self._remove(name)

    async def sweep(self, now: float) -> list[str]:
        return await self._run(self._writer, self._sweep, now)

    def _sweep(self, now: float) -> list[str]:
        for name, entry in list(self._index.items()):
            if entry.created + self._keep_seconds <= now:
                self._remove(name)
                self._gone.append(name)
        gone, self._gone = self._gone, []
        return gone

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await on_thread(self._writer, lambda: None)  # after all submitted writes
            self._writer.shutdown(wait=False)
            self._readers.shutdown(wait=False)

    async def _run(
        self, executor: DaemonExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._closed:
            raise StepweaveError("The file store is closed.", code="store_failed")
        try:
            return await on_thread(executor, work, *args, **kwargs)
        except OSError as error:
            raise self._failure(error, writing=executor is self._writer) from error

    def _failure(self, error: OSError, *, writing: bool) -> StepweaveError:
        action = "write" if writing else "read"
        logger.error("the file store in %s failed to %s: %s", self._directory, action, error)
        self.health.failed(error, writing=writing)
        return StepweaveError(f"The file store failed ({words_of(error)}).", code="store_failed")

    @property
    def bytes(self) -> int:
        return self._bytes
