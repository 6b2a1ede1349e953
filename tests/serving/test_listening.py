"""Where the server listens: told as it is, with a warning where it is open; and where our own
commands do."""

from __future__ import annotations

import logging
import re
import socket
import subprocess

import pytest

from stepweave.serving.listening import is_loopback, listening, log_addresses
from tests.support.environment import ROOT
from tests.support.waiting import SECONDS


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize(
    ("host", "family"),
    [("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("::1", socket.AF_INET6)],
)
def test_a_listening_socket_is_found(host: str, family: socket.AddressFamily) -> None:
    try:
        bound = socket.socket(family)
        bound.bind((host, 0))
    except OSError as error:
        pytest.skip(f"NOT TRIED: {host} cannot be bound here: {error}")
    with bound:
        address = (host, bound.getsockname()[1])
        assert address not in listening(), "it only is bound"
        bound.listen()
        assert address in listening()
    assert address not in listening()


def test_what_cannot_be_told_ends_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("psutil.Process.net_connections", fail)
    assert listening() == []
    log_addresses([], keys=False)


@pytest.mark.parametrize("keys", [False, True])
def test_one_line_for_each_address_and_a_warning_where_it_is_open(
    keys: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "stepweave.serving.listening"):
        log_addresses([("127.0.0.1", 1), ("0.0.0.0", 2), ("::", 3)], keys=keys)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    told = [("INFO", f"listening on {one}") for one in ("127.0.0.1:1", "0.0.0.0:2", "[::]:3")]
    advice = (
        "is open to other machines without authentication: set STEPWEAVE_API_KEYS, or listen with "
        "--host 127.0.0.1"
    )
    warned = [("WARNING", f"{one} {advice}") for one in ("0.0.0.0:2", "[::]:3")]
    assert sorted(lines) == sorted(told + ([] if keys else warned))


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [([], "127.0.0.1", "3000"), (["HOST=0.0.0.0", "PORT=8080"], "0.0.0.0", "8080")],
)
def test_make_serve_listens_on_this_machine_alone_unless_told_otherwise(
    given: list[str], host: str, port: str
) -> None:
    plan = subprocess.run(
        ["make", "--dry-run", "serve", *given],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    assert f"bentoml serve service.py --host {host} --port {port}\n" in plan.stdout


def test_none_of_our_commands_listens_elsewhere() -> None:
    sources = [
        ROOT / "Makefile",
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    commands = [
        line
        for path in sources
        for line in re.findall(r".*\bserve\b.*service\b.*--(?:port|host).*", path.read_text())
    ]
    assert len(commands) >= 3
    for command in commands:
        assert re.search(r"--host\W+(127\.0\.0\.1|\$\(HOST\))", command), command
