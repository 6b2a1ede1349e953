"""Records of jobs, in SQLite."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from stepweave.errors import InvalidRequestError, StepweaveError, shown
from stepweave.outcome import End
from stepweave.store.health import StoreHealth, words_of
from stepweave.threads import DaemonExecutor, on_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")
JobKind = Literal["generation", "edit"]
JobState = Literal["queued", "running", End]
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job's stored state. Times are Unix seconds; dicts and lists must be JSON."""

    id: str  # 32 hex digits
    owner: str | None  # `Client.owner`; None without API keys
    kind: JobKind
    state: JobState
    created: float
    updated: float
    started: float | None = None
    finished: float | None = None
    step: int = 0
    total_steps: int = 0
    request: dict[str, Any]  # the parameters as resolved
    response: dict[str, Any] | None = None  # the answer without its images
    files: tuple[str, ...] = ()  # names in the file store, one per image, in order
    error: dict[str, Any] | None = None  # message, type, code, param
    warnings: list[str]
    idempotency_key: str | None = None
    fingerprint: str | None = None  # hex digest of the request's body

    @property
    def done(self) -> bool:
        """Whether the job succeeded, failed or was cancelled."""
        return self.state in get_args(End)

    @property
    def cursor(self) -> str:
        """The cursor after this record, for `JobStore.list`; valid even if it is deleted."""
        return f"{self.created!r}_{self.id}"


class JobStore(Protocol):
    """A store of job records. Methods raise StepweaveError (code `store_failed`) if it fails. Calls
    from one event loop take effect in order, possibly even if their task is cancelled."""

    @property
    def health(self) -> StoreHealth:
        """Failures so far, and whether writes work."""

    async def probe(self) -> None:
        """Test whether writes work, without changing anything."""

    async def put(self, record: JobRecord) -> None:
        """Insert the record, or replace the one with the same id."""

    async def get(self, id: str) -> JobRecord | None:
        """The record with that id; None if there is none, or it is no valid id."""

    async def by_key(self, owner: str | None, key: str) -> JobRecord | None:
        """The owner's newest record with that idempotency key that is not failed or cancelled."""

    async def delete(self, id: str) -> list[str]:
        """Delete the record, if there is one. Returns the names of its files."""

    async def forget(self, files: Iterable[str]) -> list[str]:
        """Delete the records that have any of these files. Returns the names of all their files."""

    async def sweep(self, now: float) -> list[str]:
        """Delete finished jobs that have expired by `now`, Unix seconds, and the oldest of those
        over the limit. Returns the names of their files."""

    async def interrupted(self) -> int:
        """Mark unfinished jobs of an earlier process as failed, before `put`; returns how many."""

    async def close(self) -> None:
        """Finish submitted calls; refuse new ones."""

    async def list(
        self, owner: str | None, limit: int, before: str | None = None
    ) -> list[JobRecord]:
        """At most `limit` records of the owner, newest first, after the cursor `before`
        (`JobRecord.cursor`). Raises InvalidRequestError if that is no cursor."""


BUSY_SECONDS = 2.0  # from a call's submission, until it fails while another process has the lock
START_SECONDS = 30.0  # the same, for `interrupted` at the start
JOURNAL_BYTES = 16 * 2**20  # limit of the write-ahead log, which otherwise never shrinks
SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT, kind TEXT NOT NULL, state TEXT NOT NULL,
    created REAL NOT NULL, updated REAL NOT NULL, started REAL, finished REAL,
    step INTEGER NOT NULL, total_steps INTEGER NOT NULL,
    request TEXT NOT NULL, response TEXT, files TEXT NOT NULL, error TEXT, warnings TEXT NOT NULL,
    idempotency_key TEXT, fingerprint TEXT
);
CREATE INDEX jobs_of_owner ON jobs (owner, created, id);
CREATE INDEX jobs_of_key ON jobs (owner, idempotency_key, created, id)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_finished ON jobs (finished, id) WHERE finished IS NOT NULL;
"""
_COLUMNS = tuple(field.name for field in fields(JobRecord))
_JSON = {"request", "response", "files", "error", "warnings"}
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM jobs"
_PUT = (
    f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) ON "
    f"CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name != "id")
)
_INTERRUPT = """
UPDATE jobs SET state = 'failed', finished = ?, updated = ?, error = json_object(
    'message', 'The server was restarted while the job was ' || state || '; submit it again.',
    'type', 'server_error', 'code', 'restarted', 'param', NULL
) WHERE state IN ('queued', 'running')
"""
_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _to_row(record: JobRecord) -> tuple[Any, ...]:
    values = ((name, getattr(record, name)) for name in _COLUMNS)
    return tuple(
        json.dumps(value) if name in _JSON and value is not None else value
        for name, value in values
    )


def _to_record(row: tuple[Any, ...]) -> JobRecord:
    values = {
        name: json.loads(value) if name in _JSON and value is not None else value
        for name, value in zip(_COLUMNS, row, strict=True)
    }
    return JobRecord(**values | {"files": tuple(values["files"])})


def _to_place(cursor: str) -> tuple[float, str]:
    created, _, id = cursor.rpartition("_")
    try:
        place = float(created), id
    except ValueError:
        place = math.nan, id
    if not math.isfinite(place[0]) or not _ID.fullmatch(id):
        raise InvalidRequestError(
            f"before is {shown(cursor)}; it must be the cursor of an earlier page.", param="before"
        )
    return place


class _Unusable(Exception):
    """The file exists but cannot be used. Arguments: a suffix for the file's name, the reason."""


class SqliteJobStore:
    """A JobStore in one SQLite file, on a thread of its own.

    While another process has the file locked, each call fails `BUSY_SECONDS` after it was
    submitted, so that waits of queued calls do not add up; calls work again once it is unlocked.

    Records that `put` has written survive a killed process; a power failure may lose the last ones.
    A file that is corrupt, or has another version of the schema, is renamed (one of each kind is
    kept), and a new one created. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep_seconds: float,
        keep_records: int,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the file; takes milliseconds. Raises StepweaveError (code `store_failed`)."""
        self._path = Path(path)
        self._keep_seconds = keep_seconds
        self._keep_records = keep_records
        self._clock = clock
        self._closed = False
        self.health = StoreHealth()
        self._thread = DaemonExecutor(1, "job-store")
        self._connection: sqlite3.Connection | None = None  # for the thread only
        try:
            self._thread.submit(self._connected, time.monotonic() + BUSY_SECONDS).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown(wait=False)
            raise self._failure(error, writing=True) from error

    def _connected(self, until: float, writing: bool = True) -> sqlite3.Connection:
        """The connection; a new one waits for locks until `until`, seconds of the monotonic clock.
        A deleted file is created again: writes to it would be lost when this process ends."""
        if writing and self._connection is not None and not self._path.exists():
            os.stat(self._path.parent)
            logger.warning(
                "job store: %s was deleted, and its records are lost; a new file is created",
                self._path,
            )
            self._disconnect()
            # they belong to the deleted file; SQLite does not remove them
            for part in ("-wal", "-shm"):
                Path(f"{self._path}{part}").unlink(missing_ok=True)
        if self._connection is None:
            self._connection = self._open(until)
        return self._connection

    def _open(self, until: float) -> sqlite3.Connection:
        try:
            return self._connect(until)
        except _Unusable as error:
            self._set_aside(*error.args)
        return self._connect(until)

    def _connect(self, until: float) -> sqlite3.Connection:
        # SQLite gives the files beside it the mode of this one
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(self._path, timeout=max(0.0, until - time.monotonic()))
        try:
            self._prepare(connection)
        except BaseException as error:
            connection.close()
            # the low byte is the primary result code
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT:
                raise _Unusable("corrupt", f"is corrupt ({error})") from error
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
        (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise _Unusable("corrupt", f"is corrupt ({problem})")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if version == 0 and tables == 0:
            connection.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            raise _Unusable(
                f"version-{version}", f"has version {version} of the schema, not {SCHEMA_VERSION}"
            )

    def _set_aside(self, suffix: str, reason: str) -> None:
        aside = f"{self._path}.{suffix}"
        logger.warning(
            "job store: %s %s; it is renamed to %s, and a new file is created",
            self._path,
            reason,
            aside,
        )
        for part in ("-wal", "-shm", ""):
            try:
                os.replace(f"{self._path}{part}", f"{aside}{part}")
            except FileNotFoundError:
                # belongs to a file that was renamed before
                Path(f"{aside}{part}").unlink(missing_ok=True)

    async def put(self, record: JobRecord) -> None:
        row = _to_row(record)  # now, as the record may hold values that change
        await self._run(lambda connection: connection.execute(_PUT, row), writes=True)
        self.health.wrote()

    async def probe(self) -> None:
        await self._run(
            lambda connection: connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}"),
            writes=True,
        )
        self.health.wrote()

    async def get(self, id: str) -> JobRecord | None:
        if not _ID.fullmatch(id):
            return None
        return await self._one(f"{_SELECT} WHERE id = ?", (id,))

    async def by_key(self, owner: str | None, key: str) -> JobRecord | None:
        condition = "owner IS ? AND idempotency_key = ? AND state NOT IN ('failed', 'cancelled')"
        return await self._one(
            f"{_SELECT} WHERE {condition} ORDER BY created DESC, id DESC LIMIT 1", (owner, key)
        )

    async def delete(self, id: str) -> list[str]:
        return await self._drop("id = ?", (id,))

    async def forget(self, files: Iterable[str]) -> list[str]:
        names = list(files)
        if not names:
            return []
        owns = "SELECT 1 FROM json_each(jobs.files) WHERE value IN (SELECT value FROM json_each(?))"
        return await self._drop(f"EXISTS ({owns})", (json.dumps(names),))

    async def sweep(self, now: float) -> list[str]:
        excess = "max(0, (SELECT count(*) FROM jobs) - ?)"
        oldest = (
            f"SELECT id FROM jobs WHERE finished IS NOT NULL ORDER BY finished, id LIMIT {excess}"
        )
        return await self._drop(
            f"finished <= ? OR id IN ({oldest})", (now - self._keep_seconds, self._keep_records)
        )

    async def interrupted(self) -> int:
        now = self._clock()
        return await self._run(
            lambda connection: connection.execute(_INTERRUPT, (now, now)).rowcount,
            writes=True,
            patience=START_SECONDS,
        )

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await on_thread(self._thread, self._disconnect)
            self._thread.shutdown(wait=False)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    async def _one(self, query: str, arguments: tuple[Any, ...]) -> JobRecord | None:
        row = await self._run(lambda connection: connection.execute(query, arguments).fetchone())
        return None if row is None else _to_record(row)

    async def _drop(self, condition: str, arguments: tuple[Any, ...]) -> list[str]:
        def work(connection: sqlite3.Connection) -> list[str]:
            dropped = connection.execute(
                f"DELETE FROM jobs WHERE {condition} RETURNING files", arguments
            ).fetchall()
            return [name for (names,) in dropped for name in json.loads(names)]

        return await self._run(work, writes=True)

    async def _run(
        self,
        work: Callable[[sqlite3.Connection], T],
        *,
        writes: bool = False,
        patience: float | None = None,
    ) -> T:
        """Do the work on the store's thread, in one transaction, which waits at most `patience`
        seconds from now for locks, `BUSY_SECONDS` if None."""
        if self._closed:
            raise StepweaveError("The job store is closed.", code="store_failed")
        until = time.monotonic() + (BUSY_SECONDS if patience is None else patience)

        def transaction() -> T:
            connected = self._connected(until, writes)
            left = max(0.0, until - time.monotonic())
            connected.execute(f"PRAGMA busy_timeout = {int(1000 * left)}")
            with connected as connection:
                return work(connection)

        try:
            return await on_thread(self._thread, transaction)
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error, writing=writes) from error

    def _failure(self, error: OSError | sqlite3.Error, *, writing: bool) -> StepweaveError:
        action = "write" if writing else "read"
        logger.error("the job store %s failed to %s: %s", self._path, action, error)
        self.health.failed(error, writing=writing)
        return StepweaveError(f"The job store failed ({words_of(error)}).", code="store_failed")

    async def list(
        self, owner: str | None, limit: int, before: str | None = None
    ) -> list[JobRecord]:
        arguments = (owner, *(() if before is None else _to_place(before)), limit)
        after = "" if before is None else "AND (created, id) < (?, ?)"
        query = f"{_SELECT} WHERE owner IS ? {after} ORDER BY created DESC, id DESC LIMIT ?"
        rows = await self._run(lambda connection: connection.execute(query, arguments).fetchall())
        return [_to_record(row) for row in rows]
