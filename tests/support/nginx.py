"""Debian's nginx as a proxy of a server under test."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.environment import ROOT, free_port
from tests.support.waiting import SECONDS

# nothing in Debian's nginx.conf changes how requests are passed on: all of that is nginx's default
CONFIGURATION = """
daemon off;
{user}
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {before}
    server {{
        listen 127.0.0.1:{port};
        {server}
    }}
}}
"""


def binary() -> str:
    """The path of nginx: the installed one, else Debian's, unpacked."""
    found = shutil.which("nginx")
    if found is not None:
        return found
    folder = ROOT / "build" / "nginx"
    command = [ROOT / "tools" / "unpack-debian", "nginx", folder, "usr/sbin/nginx"]
    script = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if script.returncode:
        pytest.skip(f"NOT CHECKED WITH NGINX: it is not available here: {script.stderr.strip()}")
    return str(folder / "nginx")


@dataclass
class Nginx:
    """A running nginx."""

    port: int
    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reload(self, server: str, before: str = "") -> None:
        """Reload with another configuration; open connections are served to their end."""
        self._write(server, before)
        self.process.send_signal(signal.SIGHUP)

    def _write(self, server: str, before: str) -> None:
        # who may write to the directory
        user = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
        text = CONFIGURATION.format(port=self.port, server=server, before=before, user=user)
        (self.directory / "nginx.conf").write_text(text)


@contextlib.contextmanager
def nginx(
    directory: Path, server: str, before: str = "", port: int | None = None
) -> Iterator[Nginx]:
    """Run nginx with these lines of its `server`, and those `before` it."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Nginx(port or free_port(), directory, None)  # type: ignore[arg-type]
    made._write(server, before)
    with (directory / "log.txt").open("wb") as log:
        command = [binary(), "-p", str(directory), "-c", "nginx.conf", "-e", "stderr"]
        made.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + SECONDS
            while True:
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", made.port)),
                ):
                    break
                assert made.process.poll() is None and time.monotonic() < deadline, (
                    directory / "log.txt"
                ).read_text()
                time.sleep(0.02)
            yield made
        finally:
            made.process.terminate()
            made.process.wait(SECONDS)
