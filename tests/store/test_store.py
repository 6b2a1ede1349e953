from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import resource
import secrets
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepweave.errors import ConfigError, InvalidRequestError, StepweaveError
from stepweave.store import DirectoryFileStore, JobRecord, SqliteJobStore, state_directory
from tests.support.environment import ROOT
from tests.support.job_records import record
from tests.support.waiting import SECONDS

HOUR = 3600.0
KEY = "5f12d0d63665a881b6f4815c8073b08f"


class Clock:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def finished(number: int = 0, **changes: Any) -> JobRecord:
    return record(
        number,
        **{
            "state": "succeeded",
            "finished": 2000.0 + number,
            "files": (f"{number}.png",),
            **changes,
        },
    )


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: as on a full disk, writes fail once
    they are half done."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def on_disk(folder: Path) -> dict[str, int]:
    """Bytes by name of all that is in the folder."""
    return {each.name: each.stat().st_size for each in folder.iterdir()}


def spawn(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )


class TestJobs:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "jobs.sqlite3"

    @pytest.fixture
    def run(
        self, path: Path, clock: Clock
    ) -> Callable[[Callable[[SqliteJobStore], Awaitable[Any]]], Any]:
        """Do something with a store that is opened for it, so that every call after the first sees
        what is on the disk."""

        def call(scenario: Callable[[SqliteJobStore], Awaitable[Any]], **changes: Any) -> Any:
            async def main() -> Any:
                store = SqliteJobStore(
                    path, **{"keep_seconds": HOUR, "keep_records": 100, "clock": clock, **changes}
                )
                try:
                    return await scenario(store)
                finally:
                    await store.close()

            return asyncio.run(main())

        return call

    def test_every_field_comes_back(self, run: Any) -> None:
        full = record(
            7,
            owner="d1",
            kind="edit",
            state="failed",
            started=1001.125,
            finished=1002.1,
            step=3,
            request={"prompt": "赤い円 \ud800 🔴", "seed": 2**53 - 1, "guidance_scale": 4.5},
            files=("a.png", "b.png"),
            response={"data": [{"seed": 1}], "usage": {"steps": 20}},
            warnings=["cut"],
            idempotency_key="k",
            fingerprint="ab",
            error={"message": "m", "type": "server_error", "code": "c", "param": None},
        )

        async def put(store: SqliteJobStore) -> None:
            for each in (full, record(8)):
                await store.put(each)

        run(put)
        for each in (full, record(8)):
            assert asdict(run(lambda store, each=each: store.get(each.id))) == asdict(each)

    def test_a_put_replaces(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            await store.put(record(1))
            await store.put(later := finished(1))
            assert await store.get(later.id) == later
            assert await store.list(None, 10) == [later]

        run(scenario)

    def test_a_put_is_of_the_record_as_it_was_then(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            mutable = record(1, warnings=["one"])
            putting = asyncio.ensure_future(store.put(mutable))
            await asyncio.sleep(0)
            mutable.warnings.append("two")
            await putting
            assert (await store.get(mutable.id)).warnings == ["one"]

        run(scenario)

    @pytest.mark.parametrize(
        "id", ["", "0", "G" * 32, "f" * 31, "f" * 32 + "\n", "../" * 11, "' OR 1=1 --", "\ud800"]
    )
    def test_ids_that_are_none(self, run: Any, id: str) -> None:
        assert run(lambda store: store.get(id)) is None

    def test_lists_are_of_one_owner(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            for number, owner in enumerate((None, "a", "b", "a", None)):
                await store.put(record(number, owner=owner))
            for owner, numbers in ((None, [4, 0]), ("a", [3, 1]), ("b", [2]), ("c", [])):
                assert await store.list(owner, 10) == [
                    record(number, owner=owner) for number in numbers
                ]

        run(scenario)

    def test_pages_are_stable(self, run: Any) -> None:
        """Under equal times, where the last one shown is gone, and where newer ones come
        meanwhile."""

        async def scenario(store: SqliteJobStore) -> None:
            for number in (3, 0, 4, 1, 2):
                await store.put(record(number, created=0.1))
            first = await store.list(None, 2)
            assert [int(each.id, 16) for each in first] == [4, 3]
            await store.delete(first[-1].id)
            await store.put(record(9, created=0.2))
            rest = await store.list(None, 10, first[-1].cursor)
            assert [int(each.id, 16) for each in rest] == [2, 1, 0]
            assert await store.list(None, 10, rest[-1].cursor) == []

        run(scenario)

    @pytest.mark.parametrize(
        "cursor",
        ["", "_", "1.5", f"nan_{KEY}", f"inf_{KEY}", f"x_{KEY}", "1.5_x", f"1.5_{KEY}0", "'"],
    )
    def test_cursors_that_are_none(self, run: Any, cursor: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            run(lambda store: store.list(None, 10, cursor))
        assert caught.value.param == "before"
        assert repr(cursor) in caught.value.message

    def test_an_idempotency_key_finds_what_may_still_be_joined(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            async def found(owner: str | None) -> int | None:
                one = await store.by_key(owner, "k")
                return None if one is None else int(one.id, 16)

            assert await found(None) is None
            await store.put(finished(1, idempotency_key="k"))
            await store.put(record(2, idempotency_key="k", state="running"))
            await store.put(record(3, idempotency_key="other"))
            await store.put(record(4, idempotency_key="k", owner="a"))
            assert (await found(None), await found("a"), await found("b")) == (2, 4, None)
            await store.put(record(2, idempotency_key="k", state="failed"))
            assert await found(None) == 1
            await store.put(record(1, idempotency_key="k", state="cancelled"))
            assert await found(None) is None

        run(scenario)

    def test_delete_and_forget_tell_whose_files(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            for number in range(3):
                await store.put(finished(number, files=(f"{number}a.png", f"{number}b.png")))
            assert await store.delete(record(0).id) == ["0a.png", "0b.png"]
            assert await store.delete(record(0).id) == []
            assert await store.forget([]) == []
            assert await store.forget(["x.png", "%", "2"]) == []
            assert await store.forget(["x.png", "2b.png"]) == ["2a.png", "2b.png"]
            assert [int(each.id, 16) for each in await store.list(None, 10)] == [1]

        run(scenario)

    def test_sweeps_drop_the_old(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            for each in (
                finished(1),
                finished(2, state="failed"),
                finished(3),
                record(4, state="running"),
            ):
                await store.put(each)
            assert await store.sweep(2001 + HOUR - 0.5) == []
            assert sorted(await store.sweep(2002 + HOUR)) == ["1.png", "2.png"]
            assert sorted(await store.sweep(1e12)) == ["3.png"]
            assert await store.list(None, 10) == [record(4, state="running")]

        run(scenario)

    def test_sweeps_drop_the_oldest_of_too_many(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            for number in range(3):
                await store.put(record(number, state="running"))
            for number in (5, 3, 6, 4):
                await store.put(finished(number, finished=3000.0 - number))
            assert sorted(await store.sweep(2000)) == ["5.png", "6.png"]  # 7 are over 5 by two
            assert await store.sweep(2000) == []
            for number in range(10, 16):
                await store.put(record(number))
            # what has not finished stays
            assert sorted(await store.sweep(2000)) == ["3.png", "4.png"]
            assert len(await store.list(None, 100)) == 9

        run(scenario, keep_records=5)

    def test_a_restart_fails_what_was_unfinished(self, run: Any, clock: Clock) -> None:
        given = [
            record(1),
            record(2, state="running", step=5),
            finished(3),
            record(4, state="cancelled", finished=5.0),
        ]

        async def put(store: SqliteJobStore) -> None:
            for each in given:
                await store.put(each)

        async def restart(store: SqliteJobStore) -> tuple[int, list[JobRecord]]:
            return await store.interrupted(), await store.list(None, 10)

        run(put)
        clock.now += 100
        expected = [
            replace(
                each,
                state="failed",
                finished=clock.now,
                updated=clock.now,
                error={
                    "message": f"The server was restarted while the job was {each.state}; "
                    "submit it again.",
                    "type": "server_error",
                    "code": "restarted",
                    "param": None,
                },
            )
            for each in given[:2]
        ]
        assert run(restart) == (2, [*reversed(given[2:]), *reversed(expected)])
        assert run(restart)[0] == 0

    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_against_a_model(self, data: st.DataObject) -> None:
        numbers, times = st.integers(0, 9), st.integers(0, 20).map(float)
        states = st.sampled_from(["queued", "running", "succeeded", "failed", "cancelled"])
        kept: dict[str, JobRecord] = {}

        def newest(records: Any) -> list[JobRecord]:
            return sorted(records, key=lambda each: (each.created, each.id), reverse=True)

        def dropped(records: list[JobRecord]) -> list[str]:
            for each in records:
                del kept[each.id]
            return sorted(name for each in records for name in each.files)

        async def main(folder: str) -> None:
            store = SqliteJobStore(f"{folder}/jobs", keep_seconds=10, keep_records=3)
            for _ in range(data.draw(st.integers(1, 25))):
                action = data.draw(
                    st.sampled_from(
                        ["put", "put", "put", "delete", "forget", "sweep", "list", "by_key"]
                    )
                )
                number, owner = data.draw(numbers), data.draw(st.sampled_from([None, "a"]))
                if action == "put":
                    state = data.draw(states)
                    one = record(
                        number,
                        owner=owner,
                        state=state,
                        created=data.draw(times),
                        idempotency_key="k",
                    )
                    if one.done:
                        one = replace(
                            one, finished=data.draw(times), files=(f"{number}x", f"{number}y")
                        )
                    await store.put(one)
                    kept[one.id] = one
                elif action == "delete":
                    gone = dropped([kept[record(number).id]] if record(number).id in kept else [])
                    assert sorted(await store.delete(record(number).id)) == gone
                elif action == "forget":
                    gone = dropped([each for each in kept.values() if f"{number}y" in each.files])
                    assert sorted(await store.forget([f"{number}y"])) == gone
                elif action == "sweep":
                    now = data.draw(times) + 10
                    done = sorted(
                        (each.finished, each.id)
                        for each in kept.values()
                        if each.finished is not None
                    )
                    excess = {id for _, id in done[: max(0, len(kept) - 3)]}
                    expired = {id for at, id in done if at <= now - 10}
                    gone = dropped([kept[id] for id in excess | expired])
                    assert sorted(await store.sweep(now)) == gone
                elif action == "list":
                    pages, size = [], data.draw(st.integers(1, 4))
                    while page := await store.list(
                        owner, size, pages[-1].cursor if pages else None
                    ):
                        pages += page
                    assert pages == newest(each for each in kept.values() if each.owner == owner)
                else:
                    live = [
                        x
                        for x in kept.values()
                        if x.owner == owner and x.state not in ("failed", "cancelled")
                    ]
                    assert await store.by_key(owner, "k") == next(iter(newest(live)), None)
            await store.close()

        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(main(folder))

    def test_a_killed_process_loses_nothing_that_was_acknowledged(
        self, run: Any, path: Path, clock: Clock
    ) -> None:
        script = """
            import asyncio, sys
            from stepweave.store import JobRecord, SqliteJobStore

            async def main():
                store = SqliteJobStore(sys.argv[1], keep_seconds=3600, keep_records=100_000)
                async def worker(start):
                    for number in range(start, 1_000_000, 4):
                        await store.put(JobRecord(
                            id=f"{number:032x}", owner=None, kind="edit", state="running",
                            created=number, updated=number,
                            request={"prompt": "x" * (number % 5000)}, warnings=[],
                        ))
                        print(number, flush=True)
                await asyncio.gather(*map(worker, range(4)))

            asyncio.run(main())
        """
        acknowledged = []
        with spawn(script, str(path)) as process:
            assert process.stdout is not None
            for line in process.stdout:
                acknowledged.append(line)
                if len(acknowledged) == 1000:
                    process.kill()
        assert process.returncode == -signal.SIGKILL
        whole = {int(line) for line in acknowledged if line.endswith("\n")}
        assert len(whole) >= 1000
        found = run(lambda store: store.list(None, 100_000))
        assert whole <= {int(each.id, 16) for each in found}
        assert all(each.request["prompt"] == "x" * (int(each.id, 16) % 5000) for each in found)
        assert run(lambda store: store.interrupted()) == len(found)

    @pytest.mark.parametrize("harm", ["text", "header", "page", "empty"])
    def test_a_corrupt_file_is_set_aside(
        self, run: Any, path: Path, harm: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def put(store: SqliteJobStore) -> None:
            for number in range(200):
                await store.put(record(number))

        run(put)
        size = path.stat().st_size
        with path.open("r+b") as file:
            if harm == "text":
                file.truncate(0)
                file.write(b"not a database, but long enough to be taken for one " * 100)
            elif harm == "header":
                file.write(bytes(100))
            elif harm == "page":
                file.seek(4096)
                file.write(b"\xff" * 8192)
            else:
                file.truncate(0)
        with caplog.at_level(logging.WARNING):
            assert run(lambda store: store.list(None, 10)) == []
        aside = Path(f"{path}.corrupt")
        if harm == "empty":  # as new
            assert not aside.exists()
            assert not caplog.records
        else:
            assert aside.stat().st_size >= min(size, 5000)
            assert "is corrupt" in caplog.text
            assert str(aside) in caplog.text
        run(put)
        assert len(run(lambda store: store.list(None, 1000))) == 200

    def test_a_log_that_belongs_to_a_corrupt_file_goes_with_it(self, run: Any, path: Path) -> None:
        run(lambda store: store.put(record(1)))
        path.write_bytes(b"no database " * 1000)
        wal = Path(f"{path}-wal")
        wal.write_bytes(b"its log")
        Path(f"{path}.corrupt-shm").write_bytes(b"of one set aside before")
        assert run(lambda store: store.list(None, 10)) == []
        assert Path(f"{path}.corrupt").read_bytes().startswith(b"no database")
        assert not Path(f"{path}.corrupt-shm").exists()
        assert not wal.exists() or wal.read_bytes() != b"its log"

    @pytest.mark.parametrize("version", [0, 2])
    def test_another_version_is_set_aside(
        self, run: Any, path: Path, version: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(f"CREATE TABLE jobs (id); PRAGMA user_version = {version};")
        with caplog.at_level(logging.WARNING):
            run(lambda store: store.put(record(1)))
        assert f"has version {version} of the schema, not 1" in caplog.text
        assert run(lambda store: store.get(record(1).id)) == record(1)
        with contextlib.closing(sqlite3.connect(f"{path}.version-{version}")) as connection:
            assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (0,)

    def test_nobody_else_may_read_the_file(self, run: Any, path: Path) -> None:
        async def modes(store: SqliteJobStore) -> dict[str, int]:
            await store.put(record(1))
            return {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}

        assert run(modes) == {f"jobs.sqlite3{part}": 0o600 for part in ("", "-wal", "-shm")}

    def test_a_full_disk(self, run: Any, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            await store.put(record(1))
            with largest_file(2**20), pytest.raises(StepweaveError) as caught:
                await store.put(record(1, request={"prompt": "x" * 2**21}))
            assert caught.value.code == "store_failed"
            assert caught.value.status == 500
            assert str(path.parent) not in caught.value.message
            assert str(path) in caplog.text
            assert await store.get(record(1).id) == record(1)
            await store.put(record(2))

        run(scenario)
        assert run(lambda store: store.list(None, 10)) == [record(2), record(1)]

    def test_the_event_loop_goes_on_while_the_file_is_locked(self, run: Any, path: Path) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            await store.put(record(1))
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                putting = asyncio.ensure_future(store.put(record(2)))
                await asyncio.sleep(0.05)
                assert not putting.done()
                other.execute("ROLLBACK")
                await putting
            assert await store.get(record(2).id) == record(2)

        run(scenario)

    def test_a_failed_transaction_leaves_nothing_behind(self, run: Any) -> None:
        async def scenario(store: SqliteJobStore) -> None:
            with pytest.raises(StepweaveError, match="NOT NULL"):
                await store.put(replace(record(1), state=None))  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                await store.put(record(1, request={"prompt": object()}))
            await store.put(record(2))
            assert await store.list(None, 10) == [record(2)]

        run(scenario)

    def test_closing(self, path: Path) -> None:
        async def main() -> None:
            store = SqliteJobStore(path, HOUR, 100)
            puts = [asyncio.ensure_future(store.put(record(number))) for number in range(50)]
            await asyncio.sleep(0)
            await store.close()
            await asyncio.gather(*puts)
            await store.close()
            with pytest.raises(StepweaveError, match="closed"):
                await store.get(record(1).id)

        asyncio.run(main())
        # the log is merged
        assert sorted(each.name for each in path.parent.iterdir()) == [path.name]
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (50,)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """What an empty file store has under a name; one store for many names, which a property test is
    quicker with."""
    with asyncio.Runner() as runner:
        store = DirectoryFileStore(tmp_path_factory.mktemp("files"), HOUR, 1000)
        yield lambda name: runner.run(store.get(name))
        runner.run(store.close())


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "files"

    @pytest.fixture
    def run(self, folder: Path, clock: Clock) -> Any:
        """Do something with a store that is opened for it, as after a restart."""

        def call(scenario: Callable[[DirectoryFileStore], Awaitable[Any]], **changes: Any) -> Any:
            async def main() -> Any:
                store = DirectoryFileStore(
                    folder, **{"keep_seconds": HOUR, "max_bytes": 1000, "clock": clock, **changes}
                )
                try:
                    return await scenario(store)
                finally:
                    await store.close()

            return asyncio.run(main())

        return call

    @pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
    def test_what_is_put_comes_back(
        self, run: Any, folder: Path, clock: Clock, suffix: Any
    ) -> None:
        async def put(store: DirectoryFileStore) -> str:
            name = await store.put(b"image", suffix)
            assert (store.bytes, store.count) == (5, 1)
            return name

        name = run(put)
        digits, _, ending = name.partition(".")
        assert (len(bytes.fromhex(digits)), ending) == (16, suffix)
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        clock.now += 60
        file = run(lambda store: store.get(name))
        assert (file.data, file.media_type, file.expires_in) == (
            b"image",
            f"image/{suffix}",
            HOUR - 60,
        )

    def test_other_suffixes_are_refused(self, run: Any, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"suffix is 'png/\.\./x'"):
            run(lambda store: store.put(b"x", "png/../x"))
        assert list(folder.iterdir()) == []

    def test_names_are_not_paths(self, run: Any, folder: Path) -> None:
        (folder / "sub").mkdir(parents=True)
        secret = folder.parent / f"{KEY}.png"
        for path in (secret, folder / "note.png", folder / "sub" / f"{KEY}.png", folder / "lock"):
            path.write_bytes(b"secret")
        link = f"{'0' * 32}.png"
        (folder / link).symlink_to(secret)
        digits = "٠١٢٣" * 8
        names = [
            "",
            ".",
            "..",
            "lock",
            "note.png",
            link,
            "sub",
            f"sub/{KEY}.png",
            f"../{KEY}.png",
            f"./../{KEY}.png",
            str(secret),
            f"..%2f{KEY}.png",
            f"{KEY}.png\0",
            f"{KEY}.png\n",
            f"{KEY}.PNG",
            f"{KEY.upper()}.png",
            f"{digits}.png",
            f"{KEY}.png/",
            f"{KEY}.gif",
            KEY,
            f"\n{KEY}.png",
            f".{KEY}.png.partial",
            "\ud800",
        ]

        async def scenario(store: DirectoryFileStore) -> None:
            own = await store.put(b"own", "png")
            for name in [
                *names,
                f"../files/{own}",
                f"{own}/",
                f"{own}\n",
                own.upper(),
                own.removesuffix(".png"),
            ]:
                assert await store.get(name) is None, name
                await store.delete([name])
            assert (await store.get(own)).data == b"own"

        run(scenario)
        assert secret.read_bytes() == b"secret"
        assert {each.name for each in folder.iterdir()} >= {"note.png", "sub", "lock", link}

    @settings(max_examples=50, deadline=None)
    @given(
        name=st.text(max_size=60)
        | st.from_regex(r"[./0-9a-fA-F]{30,34}\.(png|jpeg|webp|svg)", fullmatch=True)
    )
    def test_no_name_reaches_the_disk_but_ours(self, ask: Callable[[str], Any], name: str) -> None:
        with patch.object(Path, "read_bytes", side_effect=AssertionError):
            assert ask(name) is None

    def test_expired_files_are_not_served(self, run: Any, folder: Path, clock: Clock) -> None:
        async def scenario(store: DirectoryFileStore) -> str:
            name = await store.put(b"x", "png")
            clock.now += HOUR - 0.5
            assert (await store.get(name)).expires_in == 0.5
            later = await store.put(b"y", "png")
            clock.now += 0.5
            assert await store.get(name) is None
            assert (folder / name).exists()
            assert await store.sweep(clock.now) == [name]
            assert not (folder / name).exists()
            assert await store.sweep(clock.now) == []
            assert (store.bytes, store.count) == (1, 1)
            return later

        name = run(scenario)
        clock.now += HOUR
        assert run(lambda store: store.get(name)) is None  # not after a restart either
        assert run(lambda store: store.sweep(clock.now)) == [name]

    def test_a_clock_that_was_set_back_keeps_no_file_for_longer(
        self, run: Any, clock: Clock
    ) -> None:
        name = run(lambda store: store.put(b"x", "png"))
        clock.now -= 10 * HOUR
        assert run(lambda store: store.get(name)).expires_in == HOUR

    def test_the_oldest_make_room(self, run: Any, folder: Path, clock: Clock) -> None:
        async def scenario(store: DirectoryFileStore) -> list[str]:
            names = []
            for _ in range(4):
                names.append(await store.put(bytes(300), "png"))
                clock.now += 1
            assert (store.bytes, store.count) == (900, 3)
            names.append(await store.put(bytes(1000), "png"))
            assert (store.bytes, store.count) == (1000, 1)
            assert await store.sweep(clock.now) == names[:4]
            assert on_disk(folder) == {names[4]: 1000}
            return names

        run(scenario)

    def test_a_lower_bound_holds_from_the_start(self, run: Any, clock: Clock) -> None:
        async def fill(store: DirectoryFileStore) -> list[str]:
            names = []
            for _ in range(3):
                clock.now += 1
                names.append(await store.put(bytes(300), "png"))
            return names

        async def look(store: DirectoryFileStore) -> tuple[int, list[str]]:
            return store.bytes, await store.sweep(clock.now)

        names = run(fill)
        assert run(look, max_bytes=400) == (300, names[:2])

    def test_a_file_over_the_bound_is_refused_and_costs_no_other(self, run: Any) -> None:
        async def scenario(store: DirectoryFileStore) -> None:
            name = await store.put(bytes(1000), "png")
            with pytest.raises(
                StepweaveError, match="1001 bytes; the limit of the file store is 1000"
            ) as caught:
                await store.put(bytes(1001), "png")
            assert caught.value.code == "file_too_large"
            assert await store.get(name) is not None

        run(scenario)

    def test_a_start_clears_what_was_half_written_and_leaves_others_files(
        self, run: Any, folder: Path
    ) -> None:
        folder.mkdir()
        for name in (f".{KEY}.png.partial", ".partial", "x.partial", f"{KEY}.txt", f"{KEY}.webp"):
            (folder / name).write_bytes(b"12345")

        async def look(store: DirectoryFileStore) -> tuple[int, int]:
            return store.bytes, store.count

        assert run(look) == (5, 1)
        assert sorted(each.name for each in folder.iterdir()) == sorted(
            (".partial", "x.partial", f"{KEY}.txt", f"{KEY}.webp")
        )

    def test_files_removed_by_others_are_not_found(
        self, run: Any, folder: Path, clock: Clock
    ) -> None:
        async def scenario(store: DirectoryFileStore) -> None:
            name = await store.put(b"x", "png")
            (folder / name).unlink()
            assert await store.get(name) is None
            await store.delete([name, name])
            assert (store.bytes, store.count) == (0, 0)

        run(scenario)

    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_against_a_model(self, data: st.DataObject) -> None:
        clock, limit = Clock(), 100
        kept: dict[str, tuple[bytes, float]] = {}  # oldest first
        known: list[str] = []
        gone: list[str] = []

        def remove(name: str) -> None:
            del kept[name]
            gone.append(name)

        async def main(folder: Path) -> None:
            store = DirectoryFileStore(folder, 10, limit, clock=clock)
            for _ in range(data.draw(st.integers(1, 25))):
                clock.now += data.draw(st.integers(1, 4))
                action = data.draw(
                    st.sampled_from(["put", "put", "put", "put", "delete", "sweep", "restart"])
                )
                if action == "put":
                    content = secrets.token_bytes(data.draw(st.integers(0, limit + 5)))
                    if len(content) > limit:
                        with pytest.raises(StepweaveError):
                            await store.put(content, "png")
                    else:
                        while sum(len(each) for each, _ in kept.values()) + len(content) > limit:
                            remove(next(iter(kept)))
                        name = await store.put(
                            content, data.draw(st.sampled_from(["png", "jpeg", "webp"]))
                        )
                        kept[name] = content, clock.now
                        known.append(name)
                elif action == "delete" and known:
                    name = data.draw(st.sampled_from(known))
                    await store.delete([name])
                    kept.pop(name, None)
                elif action == "sweep":
                    for name in [
                        name for name, (_, created) in kept.items() if created + 10 <= clock.now
                    ]:
                        remove(name)
                    assert await store.sweep(clock.now) == gone
                    gone.clear()
                elif action == "restart":
                    await store.close()
                    store = DirectoryFileStore(folder, 10, limit, clock=clock)
                    gone.clear()
                sizes = on_disk(folder)
                assert sizes == {name: len(content) for name, (content, _) in kept.items()}
                assert store.bytes == sum(sizes.values()) <= limit
                assert store.count == len(sizes)
                for name in known:
                    file, (content, created) = await store.get(name), kept.get(name, (b"", 0.0))
                    if created + 10 <= clock.now:
                        assert file is None
                    else:
                        assert (file.data, file.expires_in) == (content, created + 10 - clock.now)
            await store.close()

        # the disk's own time is not under test
        with tempfile.TemporaryDirectory() as folder, patch("os.fsync"):
            asyncio.run(main(Path(folder)))

    def test_many_at_once(self, run: Any, folder: Path) -> None:
        """Whoever reads sees a whole file or none, and the bytes are bounded whenever one is
        written."""
        size, limit, rename = 100_000, 1_000_000, os.replace
        most: list[int] = []

        def watched(*paths: Any) -> None:
            most.append(sum(on_disk(folder).values()))
            rename(*paths)

        async def scenario(store: DirectoryFileStore) -> None:
            names: list[str] = []
            done = False

            async def writer(number: int) -> None:
                names.append(await store.put(bytes([number]) * size, "png"))

            async def reader() -> int:
                found = 0
                for turn in itertools.count():
                    if done:
                        break
                    await asyncio.sleep(0)
                    if names and (file := await store.get(names[turn % len(names)])) is not None:
                        assert len(file.data) == size
                        assert len(set(file.data)) == 1
                        found += 1
                return found

            readers = [asyncio.ensure_future(reader()) for _ in range(8)]
            with patch("os.replace", side_effect=watched):
                await asyncio.gather(*(writer(number) for number in range(60)))
            done = True
            assert sum(await asyncio.gather(*readers)) > 0
            assert len(set(names)) == 60
            assert (store.count, store.bytes) == (10, limit)
            assert await store.sweep(0) == names[:50]

        run(scenario, max_bytes=limit)
        assert len(most) == 60
        assert max(most) == limit

    def test_a_slow_disk_blocks_neither_the_loop_nor_readers(self, run: Any) -> None:
        async def scenario(store: DirectoryFileStore) -> None:
            name, written = await store.put(b"x", "png"), threading.Event()
            with patch("os.fsync", side_effect=lambda _: written.wait(SECONDS)):
                putting = asyncio.ensure_future(store.put(b"y", "png"))
                await asyncio.sleep(0.05)
                assert (await store.get(name)).data == b"x"
                assert not putting.done()
                written.set()
                await putting

        run(scenario)

    def test_a_full_disk_leaves_no_part_of_a_file(
        self, run: Any, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario(store: DirectoryFileStore) -> None:
            name = await store.put(b"x", "png")
            with largest_file(2**20), pytest.raises(StepweaveError) as caught:
                await store.put(bytes(2**21), "png")
            assert caught.value.code == "store_failed"
            assert str(folder) not in caught.value.message
            assert str(folder) in caplog.text
            assert on_disk(folder) == {name: 1}
            assert (store.bytes, store.count) == (1, 1)
            await store.put(b"y", "png")
            assert (store.bytes, store.count) == (2, 2)

        run(scenario, max_bytes=2**30)

    def test_a_put_that_was_killed_leaves_no_file(self, run: Any, folder: Path) -> None:
        script = """
            import asyncio, os, signal, sys
            from stepweave.store import DirectoryFileStore

            async def main():
                store = DirectoryFileStore(sys.argv[1], 3600, 10**9)
                print(await store.put(b"whole", "png"), flush=True)
                os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
                await store.put(b"half", "png")

            asyncio.run(main())
        """
        process = spawn(script, str(folder))
        name = process.communicate()[0].strip()
        assert process.returncode == -signal.SIGKILL
        assert len(list(folder.iterdir())) == 2

        async def look(store: DirectoryFileStore) -> Any:
            return store.count, (await store.get(name)).data

        assert run(look, clock=time.time) == (1, b"whole")
        assert [each.name for each in folder.iterdir()] == [name]

    def test_closing(self, folder: Path) -> None:
        async def main() -> None:
            store = DirectoryFileStore(folder, HOUR, 1000)
            puts = [asyncio.ensure_future(store.put(b"x", "png")) for _ in range(10)]
            await asyncio.sleep(0)
            await store.close()
            await asyncio.gather(*puts)
            await store.close()
            for call in (
                store.put(b"x", "png"),
                store.get(puts[0].result()),
                store.sweep(0),
                store.delete([]),
            ):
                with pytest.raises(StepweaveError, match="closed"):
                    await call

        asyncio.run(main())
        assert len(list(folder.iterdir())) == 10


def test_jobs_are_forgotten_with_their_files(tmp_path: Path, clock: Clock) -> None:
    """What a server does each minute, with both stores."""

    async def main() -> None:
        jobs = SqliteJobStore(tmp_path / "jobs", 10 * HOUR, 100, clock=clock)
        files = DirectoryFileStore(tmp_path / "files", HOUR, 500, clock=clock)
        for number in range(3):
            names = tuple([await files.put(bytes(100), "png") for _ in range(2)])
            await jobs.put(finished(number, files=names, finished=clock.now))
        assert files.count == 5
        await files.delete(await jobs.forget(await files.sweep(clock.now)))
        await files.delete(await jobs.sweep(clock.now))
        assert [int(each.id, 16) for each in await jobs.list(None, 10)] == [2, 1]
        assert files.count == 4
        clock.now += 11 * HOUR
        await files.delete(await jobs.sweep(clock.now))
        assert (files.count, await jobs.list(None, 10)) == (0, [])
        await jobs.close()
        await files.close()

    asyncio.run(main())


class TestReadOnly:
    @pytest.fixture(params=["mode", "proc"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
        """A directory that takes no files: by its mode (which does not bind root), or in Linux's
        /proc."""
        if request.param == "proc":
            if not Path("/proc/self").is_dir():
                pytest.skip("there is no /proc")
            yield Path("/proc/self")
        else:
            if os.geteuid() == 0:
                pytest.skip("root may write everywhere")
            tmp_path.chmod(0o500)
            yield tmp_path
            tmp_path.chmod(0o700)

    def test_jobs(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(StepweaveError) as caught:
            SqliteJobStore(folder / "jobs", HOUR, 100)
        assert caught.value.code == "store_failed"
        assert str(folder) not in caught.value.message
        assert str(folder) in caplog.text

    def test_files(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            store = DirectoryFileStore(folder, HOUR, 1000)
            with pytest.raises(StepweaveError) as caught:
                await store.put(b"x", "png")
            assert caught.value.code == "store_failed"
            assert str(folder) not in caught.value.message
            assert str(folder) in caplog.text
            assert (store.bytes, store.count) == (0, 0)
            await store.close()

        asyncio.run(main())

    def test_the_state(self, folder: Path) -> None:
        with pytest.raises(
            ConfigError, match="STEPWEAVE_STATE_DIR=.* cannot be created or written to"
        ):
            state_directory(str(folder)).__enter__()


class TestDirectory:
    def test_it_is_made_and_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "state"
        for _ in range(2):
            with state_directory(str(path)) as directory:
                assert directory == path
                assert stat.S_IMODE(path.stat().st_mode) == 0o700
                (path / "jobs").touch()
        assert (path / "jobs").exists()

    def test_a_second_server_is_refused(self, tmp_path: Path) -> None:
        with state_directory(str(tmp_path)):
            with pytest.raises(ConfigError) as caught, state_directory(str(tmp_path)):
                pass
            assert (
                f"STEPWEAVE_STATE_DIR={str(tmp_path)!r}: another server uses this directory"
                in caught.value.message
            )
        with state_directory(str(tmp_path)):
            pass

    def test_the_lock_of_a_killed_server_is_free(self, tmp_path: Path) -> None:
        script = """
            import sys, time
            from stepweave.store import state_directory

            with state_directory(sys.argv[1]):
                print("locked", flush=True)
                time.sleep(600)
        """
        with spawn(script, str(tmp_path)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(ConfigError, match="another server"), state_directory(str(tmp_path)):
                pass
            process.kill()
            process.wait()
        with state_directory(str(tmp_path)):
            pass

    def test_a_path_that_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with (
            pytest.raises(ConfigError, match="STEPWEAVE_STATE_DIR="),
            state_directory(str(tmp_path / "file")),
        ):
            pass

    def test_a_temporary_one_is_removed(self) -> None:
        with state_directory(None) as directory:
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            (directory / "files").mkdir()
            (directory / "files" / "x").touch()
        assert not directory.exists()

    def test_a_temporary_one_is_removed_on_sigterm(self) -> None:
        """Even where a server that ends by itself does not leave the context."""
        script = """
            import signal, sys, time
            from stepweave.store import state_directory

            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            context = state_directory(None)
            print(context.__enter__(), flush=True)
            time.sleep(600)
        """
        with spawn(script) as process:
            assert process.stdout is not None
            directory = Path(process.stdout.readline().strip())
            assert directory.is_dir()
            process.terminate()
            assert process.wait() == 0
        assert not directory.exists()


def test_the_package_needs_no_torch() -> None:
    script = (
        "import sys, stepweave.store; print([name for name in sys.modules if name.split('.')[0] in "
        "('torch', 'PIL')])"
    )
    assert json.loads(spawn(script).communicate()[0]) == []
