"""API keys: of the settings and of a file, which is read again when it changes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stepweave.api.auth import authorize
from stepweave.api.context import CONTEXT, RequestContext
from stepweave.config import Settings
from stepweave.config.clients import MAX_CLIENTS, clients_of_file, clients_of_setting
from stepweave.errors import AuthenticationError, ConfigError
from stepweave.serving.keys import MAX_FILE_BYTES, ApiKeys
from stepweave.serving.server import Server
from tests.support.asgi import App, serving
from tests.support.in_process import InProcess
from tests.support.served import Served, serve
from tests.support.waiting import wait_until

ALICE, BOB, CAROL = "alice-has-a-long-key", "bob-has-a-long-key-too", "carol-has-one-of-her-own"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("stepweave"), "propagate", True)
    caplog.set_level(logging.INFO, "stepweave")
    return caplog


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def swap(file: Path, content: str) -> None:
    """Put another file in its place, as `mv` does."""
    other = file.with_name(".new")
    other.write_text(content)
    other.replace(file)


def names(keys: ApiKeys, *given: str) -> list[str | None]:
    return [None if (found := keys.find(key.encode())) is None else found.name for key in given]


# --- the file ---


def test_a_line_is_a_client() -> None:
    content = (
        "\ufeff# who may ask\r\n"
        f"alice: {ALICE}\r\n\r\n"
        f"  bob.2_x-Y :  sha256:{sha256(BOB).upper()}   admin \n"
        "carol:schlüssel:with:colons"
    )
    alice, bob, carol = clients_of_file(content.encode())
    assert [(one.name, one.owner, one.admin, one.short) for one in (alice, bob, carol)] == [
        ("alice", "alice", False, False),
        ("bob.2_x-Y", "bob.2_x-Y", True, False),
        ("carol", "carol", False, False),
    ]
    assert [one.digest.hex() for one in (alice, bob, carol)] == [
        sha256(ALICE), sha256(BOB), sha256("schlüssel:with:colons"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("SECRET", "it must be `name: KEY`"),
        ("a: SECRET root", "it must be `name: KEY`"),
        ("a: SECRET admin admin", "it must be `name: KEY`"),
        ("a: SECRET # hers", "comments need their own lines"),
        ("a: sha256: SECRET", "it must be `name: KEY`"),
        (": SECRET", "the name must have 1 to 64"),
        ("two words: SECRET", "the name must have 1 to 64"),
        ("ä: SECRET", "the name must have 1 to 64"),
        (f"{'a' * 65}: SECRET", "the name must have 1 to 64"),
        ("SECRET:", "there is no key after the name"),
        ("SECRET: ", "there is no key after the name"),
        ("SECRET: admin", "there is no key after the name"),
        ("SECRET: sha256:", "there is no key after the name"),
        ("a: sha256:SECRET", "64 hex digits"),
        (f"a: sha256:{'0' * 63}", "64 hex digits"),
        (f"a: sha256:{'0' * 65}", "64 hex digits"),
        (f"a: sha256:{sha256('')}", "the digest of an empty key"),
        ("a: SEC\x00RET", "characters that HTTP headers do not allow"),
        ("a: SECRET\x7f", "characters that HTTP headers do not allow"),
    ],
)
def test_a_malformed_line_is_named_by_its_number_alone(
    line: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# clients\nfirst: {ALICE}\n\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        ApiKeys((), str(file))
    message = caught.value.message
    assert message.startswith("STEPWEAVE_API_KEYS_FILE: line 4: "), message
    assert problem in message
    assert not any(secret in message for secret in ("SECRET", "SEC", ALICE, "first", str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it has no keys"),
        (b"# none\n\n", "it has no keys"),
        (b"a: one\nb: two\n# c\na: three", "line 1 and line 4 have the same name"),
        (b"a: one\nb: one", "line 1 and line 2 have the same key"),
        (f"a: one\nb: sha256:{sha256('one')}".encode(), "line 1 and line 2 have the same key"),
        (b"a: one\nb: \xff\xfe", "line 2: it is not UTF-8"),
        (
            b"\n".join(b"c%d: k%d" % (i, i) for i in range(MAX_CLIENTS + 1)),
            f"there are {MAX_CLIENTS + 1} keys; the limit is",
        ),
        (b"#" * (MAX_FILE_BYTES + 1), f"it has more than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_a_file_that_cannot_be_used_ends_the_start(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="STEPWEAVE_API_KEYS_FILE: ") as caught:
        Server(Settings(api_keys_file=str(file)))
    assert problem in caught.value.message


def test_what_is_no_file_ends_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path, "it is not a regular file"),
        (tmp_path / "pipe", "it is not a regular file"),
        (Path("/dev/zero"), "it is not a regular file"),
        (tmp_path / "keys", "the file cannot be read (No such file or directory)"),
        (tmp_path / "nowhere" / "keys", "the file cannot be read (No such file or directory)"),
        (tmp_path / "pipe" / "keys", "the file cannot be read (Not a directory)"),
    ):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError) as caught:
            ApiKeys((), str(path))
        assert problem in caught.value.message
        assert len(os.listdir("/proc/self/fd")) == before


def test_as_many_clients_as_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(f"client-{i}: the-key-of-client-{i}" for i in range(MAX_CLIENTS)))
    keys = ApiKeys((), str(file))
    assert names(
        keys,
        "the-key-of-client-0",
        f"the-key-of-client-{MAX_CLIENTS - 1}",
        f"the-key-of-client-{MAX_CLIENTS}",
    ) == [
        "client-0",
        f"client-{MAX_CLIENTS - 1}",
        None,
    ]


def test_both_places_together(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"carol: {CAROL}")
    settings = Settings(api_keys=f"{ALICE}, {BOB}", api_keys_file=str(file))
    assert names(Server(settings).keys, ALICE, BOB, CAROL, "x") == ["key1", "key2", "carol", None]
    for content, problem in (
        (f"key2: {CAROL}", "the same name"),
        (f"carol: {BOB}", "the same key"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=problem):
            Server(settings)


def test_the_settings_keep_no_key() -> None:
    settings = Settings(api_keys=f"{ALICE}, {BOB}")
    for text in (
        repr(settings),
        str(settings),
        repr(settings.model_dump()),
        repr(settings.api_keys),
        repr(vars(settings)),
    ):
        assert ALICE not in text
        assert BOB not in text
    assert [one.digest.hex() for one in settings.api_keys] == [sha256(ALICE), sha256(BOB)]
    with pytest.raises(ValidationError) as caught:
        Settings(api_keys=f"{ALICE},{BOB},{ALICE}")
    assert "key 1 and key 3 have the same key" in str(caught.value)
    assert ALICE not in str(caught.value)


def test_jobs_of_keys_without_names_belong_to_the_key() -> None:
    """A place in a list is nobody's name: it changes when another key is taken out."""
    first, second = clients_of_setting([ALICE, BOB])
    (moved,) = clients_of_setting([BOB])
    assert (second.name, moved.name) == ("key2", "key1")
    assert second.owner == moved.owner == sha256(BOB)[:32] != first.owner


def test_short_keys_are_warned_of_and_not_named(
    log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}\nbob: fifteen-letters\ncarol: sixteen--letters")
    ApiKeys(clients_of_setting(["short", ALICE + "2"]), str(file))
    assert [record.levelname for record in log.records] == ["WARNING", "WARNING"]
    assert "STEPWEAVE_API_KEYS: 1 of 2 API keys have fewer than 16" in log.text
    assert "STEPWEAVE_API_KEYS_FILE: 1 of 3 API keys have fewer than 16" in log.text
    assert not any(word in log.text for word in ("bob", "fifteen", "short,"))


# --- read again ---


def test_a_file_that_changes_is_read_again(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}\nbob: {BOB}")
    keys = ApiKeys((), str(file))
    swap(file, f"alice: {CAROL}\nbob: {BOB} admin")  # alice has another key
    keys.look()
    assert names(keys, ALICE, BOB, CAROL) == [None, "bob", "alice"]
    found = keys.find(BOB.encode())
    assert found is not None
    assert found.admin
    file.write_text(f"bob: {BOB}")  # in place
    keys.look()
    assert names(keys, ALICE, BOB, CAROL) == [None, "bob", None]
    assert log.text.count("reloaded") == 2
    keys.look()
    assert log.text.count("reloaded") == 2
    assert not any(secret in log.text for secret in (ALICE, BOB, CAROL))


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}")
    keys = ApiKeys((), str(file))
    before = file.stat()
    file.write_text(f"alice: {ALICE[::-1]}")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor time tells
    keys.look()
    assert names(keys, ALICE, ALICE[::-1]) == [None, "alice"]


def test_a_file_that_rests_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}")
    os.utime(file, (1e9, 1e9))
    keys = ApiKeys((), str(file))
    monkeypatch.setattr(
        "stepweave.serving.keys.clients_of_file", lambda content: pytest.fail("it was read")
    )
    keys.look()
    assert names(keys, ALICE) == ["alice"]


def test_kubernetes_swaps_a_link(tmp_path: Path) -> None:
    for number, content in enumerate((f"alice: {ALICE}", f"bob: {BOB}")):
        directory = tmp_path / f"..{number}"
        directory.mkdir()
        (directory / "keys").write_text(content)
        os.utime(directory / "keys", (1e9, 1e9))
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = ApiKeys((), str(tmp_path / "keys"))
    assert names(keys, ALICE, BOB) == ["alice", None]
    (tmp_path / "..tmp").symlink_to("..1")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    keys.look()
    assert names(keys, ALICE, BOB) == [None, "bob"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: swap(file, "alice"), "line 1: it must be"),
        (lambda file: swap(file, ""), "it has no keys"),
        (lambda file: swap(file, f"key1: {CAROL}"), "the same name"),
        (lambda file: file.unlink(), "cannot be read (No such file"),
        (lambda file: (file.unlink(), file.mkdir()), "it is not a regular file"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "it is not a regular file"),
        (
            lambda file: (file.unlink(), file.symlink_to(file)),
            "cannot be read (Too many levels of symbolic links)",
        ),
    ],
)
def test_a_file_that_cannot_be_used_any_more_leaves_the_last_good_keys(
    change: Any, problem: str, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}")
    os.utime(file, (1e9, 1e9))
    keys = ApiKeys(clients_of_setting([BOB]), str(file))
    change(file)
    for _ in range(3):
        keys.look()
    assert keys.required
    assert names(keys, ALICE, BOB, CAROL) == ["alice", "key1", None]
    assert [(record.levelname, problem in record.message) for record in log.records] == [
        ("ERROR", True)
    ]
    if file.is_dir():
        file.rmdir()
    swap(file, f"carol: {CAROL}")
    keys.look()
    assert names(keys, ALICE, BOB, CAROL) == [None, "key1", "carol"]
    assert "reloaded, 2 API keys in force" in log.text


def test_the_volume_of_a_secret_that_is_not_there_needs_no_key_until_it_is(
    log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "..data").mkdir()
    file = tmp_path / "keys"
    keys = ApiKeys((), str(file))
    assert not keys.required
    assert "until it does, no API key is required" in log.text
    keys.look()
    assert not keys.required
    swap(file, f"alice: {ALICE}")
    keys.look()
    assert keys.required
    assert names(keys, ALICE) == ["alice"]
    file.unlink()
    keys.look()
    assert keys.required, "what was closed does not open again"
    assert names(keys, ALICE) == ["alice"]


def test_a_first_file_that_is_wrong_closes_the_server(tmp_path: Path) -> None:
    """It was to have keys from now on, and nobody's is known."""
    file = tmp_path / "keys"
    keys = ApiKeys((), str(file))
    file.write_text("alice")
    keys.look()
    assert keys.required
    file.unlink()
    keys.look()
    assert keys.required
    assert names(keys, "alice", "") == [None, None]


# --- over HTTP ---


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.anyio
async def test_jobs_outlive_a_rotated_key_and_end_with_a_name(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}\nbob: {BOB}")
    async with serving(api_keys_file=str(file)) as app:
        headers = bearer(ALICE) | {"Prefer": "respond-async"}
        id = (await app.post(headers=headers).done()).json()["id"]
        await app.until_state(id, "succeeded", **bearer(ALICE))
        assert (await app.get(f"/v1/jobs/{id}", bearer(BOB))).status == 404
        swap(file, f"alice: {CAROL}\nbob: {BOB}")
        app.server.keys.look()
        assert (await app.get(f"/v1/jobs/{id}", bearer(ALICE))).status == 401
        assert (await app.job(id, **bearer(CAROL)))["state"] == "succeeded"
        listed = await app.get("/v1/jobs", bearer(CAROL))
        assert [one["id"] for one in listed.json()["data"]] == [id]
        assert (await app.get("/v1/jobs", bearer(BOB))).json()["data"] == []
        stored = await stored_owner(app, id)
        assert stored == "alice"


async def stored_owner(app: App, id: str) -> str | None:
    assert app.server.jobs is not None
    record = await app.server.jobs.store.get(id)
    assert record is not None
    return record.owner


@pytest.mark.anyio
async def test_the_digest_of_a_key_is_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: sha256:{sha256(ALICE)}")
    async with serving(api_keys_file=str(file)) as app:
        assert (await app.get("/v1/models", bearer(ALICE))).status == 200
        for given in (sha256(ALICE), f"sha256:{sha256(ALICE)}", "alice", f"alice: {ALICE}"):
            assert (await app.get("/v1/models", bearer(given))).status == 401


@pytest.mark.anyio
@pytest.mark.parametrize("key", ["voil\xe0-et-les-autres-\xe0", "\u0145-a-key-of-two-words-\u0145"])
async def test_a_key_ends_where_its_bytes_do(key: str) -> None:
    """Some bytes of UTF-8 are blanks as latin-1, in which headers come."""
    async with serving(api_keys=key) as app:
        assert (await app.get("/v1/models", bearer(key.encode().decode("latin-1")))).status == 200


def test_who_is_an_administrator(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE} admin\nbob: {BOB}")
    keys = ApiKeys(clients_of_setting([CAROL]), str(file))

    def sent(key: str) -> dict[str, Any]:
        context = RequestContext(asyncio.Semaphore())
        headers = [(b"authorization", f"Bearer {key}".encode())]
        return {"type": "http", "headers": headers, CONTEXT: context}

    for key, expected in ((ALICE, True), (BOB, False), (CAROL, False)):
        scope = sent(key)
        authorize(scope, keys)
        assert scope[CONTEXT].client.admin is expected
    scope = sent("x")
    with pytest.raises(AuthenticationError):
        authorize(scope, keys)
    assert scope[CONTEXT].client is None
    authorize(scope, ApiKeys())
    assert scope[CONTEXT].client is None, "without keys nobody is"


def test_a_running_server_looks_by_itself(in_process: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}")
    app: InProcess = in_process(api_keys_file=str(file))

    def status(key: str) -> int:
        return int(app.client.get("/v1/models", headers=bearer(key)).status_code)

    assert (status(ALICE), status(BOB)) == (200, 401)
    swap(file, f"bob: {BOB}")
    wait_until(lambda: status(BOB) == 200)
    assert status(ALICE) == 401
    file.unlink()
    wait_until(lambda: app.server.keys._problem)
    assert (status(BOB), app.client.get("/v1/models").status_code) == (200, 401)


def test_a_wrong_file_ends_the_command_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice: {ALICE}\nSECRET")
    with serve(tmp_path / "log.txt", STEPWEAVE_API_KEYS_FILE=str(file)) as server:
        assert until_it_ends(server) != 0
    text = (tmp_path / "log.txt").read_text()
    assert "STEPWEAVE_API_KEYS_FILE: line 2: " in text
    assert "SECRET" not in text
    assert ALICE not in text


def until_it_ends(server: Served) -> int:
    wait_until(lambda: server.process.poll() is not None)
    return int(server.process.returncode)
