"""Stores in trouble: a file that another process has locked, a disk that is full or gone, and how
the server tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from stepweave.errors import StepweaveError
from stepweave.store import DirectoryFileStore, FreeBytes, SqliteJobStore
from stepweave.store.health import StoreHealth, reason_of
from tests.support.asgi import App, serving
from tests.support.job_records import record
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.anyio

HOUR = 3600.0
LATER = {"Prefer": "respond-async"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def job_store(path: Path) -> Any:
    store = SqliteJobStore(path, HOUR, 10_000)
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def file_store(folder: Path) -> Any:
    store = DirectoryFileStore(folder, HOUR, 2**30)
    try:
        yield store
    finally:
        await store.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Another process's lock on the file, until the block ends or it is rolled back."""
    with contextlib.closing(
        sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


async def fails(doing: Any) -> str:
    """The message of a call that fails as a store does."""
    with pytest.raises(StepweaveError) as caught:
        await doing
    assert (caught.value.code, caught.value.status) == ("store_failed", 500)
    return caught.value.message


# --- a file that is locked ---


async def test_what_waits_for_a_locked_file_fails_together(tmp_path: Path) -> None:
    """One after the other they would take longer than any test may."""
    async with job_store(tmp_path / "jobs.sqlite") as store:
        await store.put(record())
        with locked(tmp_path / "jobs.sqlite"):
            puts = [store.put(record(number)) for number in range(1, 121)]
            drops = [store.delete(record(number).id) for number in range(60)]
            async with asyncio.timeout(SECONDS):
                found = await asyncio.gather(*puts, *drops, return_exceptions=True)
            assert {str(one) for one in found} == {"The job store failed (database is locked)."}
            assert await store.get(record().id) == record(), (
                "who reads need not wait for who writes"
            )
            assert store.health.failures == {"busy": 180}
            assert store.health.problem == "busy: database is locked"
        assert await store.list(None, 200) == [record()], "what failed has no effect later"
        await store.put(record(1))
        assert store.health.writable


async def test_readers_fail_together_too(tmp_path: Path) -> None:
    async with job_store(tmp_path / "jobs.sqlite") as store:
        await store.put(record())
        # no process shares a file with one in this mode, nor its log
        with contextlib.closing(
            sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
        ) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            store._thread.submit(store._disconnect).result()
            other.execute("UPDATE jobs SET step = 1")
            with patch("stepweave.store.jobs.BUSY_SECONDS", 0.1):
                for asked in (store.get(record().id), store.list(None, 9), store.by_key(None, "k")):
                    assert "locked" in await fails(asked)
            assert store.health.failures == {"busy": 3}
            assert store.health.writable, "nothing was written"
        found = await store.get(record().id)
        assert found is not None and found.step == 1


async def test_what_waits_goes_on_once_the_lock_is_gone(tmp_path: Path) -> None:
    with patch("stepweave.store.jobs.BUSY_SECONDS", SECONDS):
        async with job_store(tmp_path / "jobs.sqlite") as store:
            await store.put(record())
            with locked(tmp_path / "jobs.sqlite") as other:
                puts = asyncio.gather(*(store.put(record(number)) for number in range(1, 20)))
                await asyncio.sleep(0.05)
                assert not puts.done()
                other.execute("ROLLBACK")
                await puts
            assert len(await store.list(None, 100)) == 20
            assert store.health.failures == {}


async def test_a_start_waits_for_a_locked_file(tmp_path: Path) -> None:
    with patch("stepweave.store.jobs.BUSY_SECONDS", 0.05):
        async with job_store(tmp_path / "jobs.sqlite") as store:
            await store.put(record())
            with locked(tmp_path / "jobs.sqlite") as other:
                interrupted = asyncio.ensure_future(store.interrupted())
                await asyncio.sleep(0.2)  # longer than any other call would wait
                assert not interrupted.done()
                other.execute("ROLLBACK")
                assert await interrupted == 1


def database(app: App) -> Path:
    assert app.server.jobs is not None
    store = app.server.jobs.store
    assert isinstance(store, SqliteJobStore)
    return store._path


def failures(app: App, store: str, reason: str) -> float:
    return app.metric("stepweave_store_failures_total", store=store, reason=reason)


def writable(app: App, store: str) -> float:
    return app.metric("stepweave_store_writable", store=store)


async def probed(app: App) -> Any:
    """What /readyz says of the stores once they were tried again."""
    assert app.server.jobs is not None
    await app.server.jobs.probe()
    ready = await app.get("/readyz")
    assert ready.status == 200, "answers without URLs need no store"
    return ready.json()["store"]


async def test_a_server_whose_store_is_locked_serves_what_needs_none_and_recovers(
    tmp_path: Path,
) -> None:
    async with serving(state_dir=str(tmp_path)) as app:
        app.record.gated = True
        accepted = await app.post(headers=LATER).done()
        id = accepted.json()["id"]
        await app.until(lambda: app.record.started.is_set())
        with locked(database(app)) as other, patch("stepweave.store.jobs.BUSY_SECONDS", SECONDS):
            waits = app.post(headers=LATER)
            await app.until(lambda: len(app.server.active) == 2)
            assert (await app.job(id))["state"] == "running", "the store is not asked for what runs"
            assert not waits.task.done()
            other.execute("ROLLBACK")
            assert (await waits.done()).status == 202
        with locked(database(app)), patch("stepweave.store.jobs.BUSY_SECONDS", 0.05):
            refused = await app.post(headers=LATER).done()
            assert (refused.status, refused.error["code"]) == (500, "store_failed")
            assert (await app.get("/readyz")).json()["store"] == "jobs busy: database is locked"
            assert await probed(app) == "jobs busy: database is locked"
            assert (writable(app, "jobs"), writable(app, "files")) == (0, 1)
            assert (await app.get("/v1/jobs/" + "0" * 32)).status == 404, "who reads goes on"
        assert (failures(app, "jobs", "busy") or 0) >= 2
        assert failures(app, "jobs", "full") == failures(app, "files", "busy") == 0
        assert await probed(app) is None
        assert writable(app, "jobs") == 1


async def test_a_result_is_kept_once_the_lock_is_gone(tmp_path: Path) -> None:
    async with serving(state_dir=str(tmp_path)) as app:
        app.record.gated = True
        id = (await app.post(headers=LATER).done()).json()["id"]
        await app.until(lambda: app.record.started.is_set())
        with locked(database(app)), patch("stepweave.store.jobs.BUSY_SECONDS", 0.05):
            app.record.release.set()
            await app.until(lambda: not app.server.active)
            # its result, twice; that it runs may have been noted before
            await app.until(lambda: (failures(app, "jobs", "busy") or 0) >= 3)
            assert (await app.job(id))["state"] == "succeeded", "it is there while it is not kept"
        await app.until(lambda: app.server.jobs is not None and not app.server.jobs.keeping())
        assert app.server.jobs is not None
        kept = await app.server.jobs.store.get(id)
        assert kept is not None and kept.state == "succeeded" and len(kept.files) == 1


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NOT TRIED ON A FULL DISK: none can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True, capture_output=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


async def test_a_disk_that_is_full_is_told_of_until_there_is_room_again(small_disk: Path) -> None:
    async with serving(state_dir=str(small_disk)) as app:
        fill(small_disk / "ballast")
        assert app.metric("stepweave_store_free_bytes") == 0
        answer = await app.post(response_format="url").done()
        assert (answer.status, answer.error["code"]) == (500, "store_failed")
        assert await probed(app) == "files full: No space left on device"
        assert (failures(app, "files", "full"), writable(app, "files")) == (2, 0)
        assert (await app.post().done()).status == 200

        for number in range(99):  # until what the log has room for is used up
            answer = await app.post(headers=LATER, prompt=f"{number} " + "x" * 3000).done()
            if answer.status != 202:
                break
        assert (answer.status, answer.error["code"]) == (500, "store_failed")
        assert "jobs full: database or disk is full" in await probed(app)
        assert writable(app, "jobs") == 0
        assert str(small_disk) not in answer.content.decode()

        os.unlink(small_disk / "ballast")
        assert await probed(app) is None
        assert (writable(app, "jobs"), writable(app, "files")) == (1, 1)
        assert (await app.post(response_format="url").done()).status == 200
        assert (app.metric("stepweave_store_free_bytes") or 0) > 0


async def test_a_database_without_room(tmp_path: Path) -> None:
    async with job_store(tmp_path / "jobs.sqlite") as store:

        def at_most(pages: int) -> None:
            store._thread.submit(
                lambda: store._connected(math.inf).execute(f"PRAGMA max_page_count = {pages}")
            ).result()

        at_most(1)  # SQLite makes that as many as there are
        large = record(1, request={"prompt": "x" * 100_000})
        assert await fails(store.put(large)) == "The job store failed (database or disk is full)."
        assert store.health.problem == "full: database or disk is full"
        at_most(10_000)
        await store.put(large)
        assert store.health.problem is None
        assert store.health.failures == {"full": 1}


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EROFS, "failed"),
        (errno.EIO, "failed"),
    ],
)
async def test_files_that_cannot_be_written(
    number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    async with file_store(tmp_path) as store:
        with monkeypatch.context() as broken:
            broken.setattr("os.fsync", fail)
            for write in (store.put(b"x", "png"), store.probe()):
                assert await fails(write) == f"The file store failed ({os.strerror(number)})."
                assert store.health.problem == f"{reason}: {os.strerror(number)}"
        assert os.listdir(tmp_path) == [], "no part of a file is left"
        assert store.health.failures == {reason: 2}
        await store.delete([])
        assert not store.health.writable, "what writes nothing tells nothing"
        await store.probe()
        assert store.health.writable
        assert os.listdir(tmp_path) == []


def test_errors_of_sqlite_are_told_apart() -> None:
    def error(code: int) -> sqlite3.Error:
        made = sqlite3.OperationalError("x")
        made.sqlite_errorcode = code  # type: ignore[misc]
        return made

    codes = {
        sqlite3.SQLITE_BUSY: "busy",
        sqlite3.SQLITE_BUSY_SNAPSHOT: "busy",
        sqlite3.SQLITE_LOCKED: "busy",
        sqlite3.SQLITE_FULL: "full",
        sqlite3.SQLITE_IOERR_WRITE: "failed",
        sqlite3.SQLITE_READONLY: "failed",
    }
    assert {code: reason_of(error(code)) for code in codes} == codes
    assert reason_of(sqlite3.ProgrammingError("closed")) == "failed"


# --- what is gone ---


async def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    """What is written to a file that was removed would be lost with the process."""
    state = tmp_path / "state"
    async with serving(state_dir=str(state)) as app:
        assert (await app.post(headers=LATER).done()).status == 202
        await app.until(lambda: app.server.jobs is not None and not app.server.jobs.keeping())
        state.rename(tmp_path / "elsewhere")
        answer = await app.post(headers=LATER).done()
        assert answer.status == 500
        assert answer.error["message"].startswith(
            "The job store failed (No such file or directory)."
        )
        assert (await app.post(response_format="url").done()).status == 500
        gone = "failed: No such file or directory"
        assert await probed(app) == f"jobs {gone}; files {gone}"
        assert math.isnan(app.metric("stepweave_store_free_bytes"))
        (tmp_path / "elsewhere").rename(state)
        assert await probed(app) is None
        assert (await app.post(headers=LATER).done()).status == 202


async def test_a_database_that_is_gone_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    async with job_store(path) as store:
        await store.put(record(1))
        path.unlink()
        await store.put(record(2))
        assert await store.list(None, 9) == [record(2)]
    async with job_store(path) as again:
        assert await again.list(None, 9) == [record(2)]
    assert os.listdir(tmp_path) == [path.name]


# --- what is told ---


async def test_free_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = FreeBytes(tmp_path)
    assert free() == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)
    assert math.isnan(FreeBytes(tmp_path / "none")())
    hanging, asked = threading.Event(), []

    def hang(path: Path) -> Any:
        asked.append(path)
        assert hanging.wait(SECONDS)
        return shutil._ntuple_diskusage(3, 2, 1)  # type: ignore[attr-defined]

    monkeypatch.setattr("stepweave.store.health.FREE_SECONDS", 0.01)
    monkeypatch.setattr("shutil.disk_usage", hang)
    assert [math.isnan(free()) for _ in range(5)] == [True] * 5
    assert len(asked) == 1, "what hangs is not asked again"
    hanging.set()
    wait_until(lambda: free() == 1)


def test_health_is_told_by_many_threads() -> None:
    health = StoreHealth()
    threads = [
        threading.Thread(
            target=lambda: [
                health.failed(OSError(errno.EIO, "x"), writing=True) for _ in range(2000)
            ]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert health.failures == {"failed": 8000}
