"""A real server in its own process, started as users start it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.support.environment import ROOT, clean_environment, free_port
from tests.support.waiting import SECONDS

PROMPT = "a large red circle on a blue background"


@dataclass
class Served:
    """A running `bentoml serve`."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    # (stage, status) of `/readyz` on the way to ready
    told: set[tuple[str, int]] = field(default_factory=set)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                live, ready = (
                    httpx.get(f"{self.url}/{probe}", timeout=SECONDS)
                    for probe in ("livez", "readyz")
                )
                assert live.status_code == 200, live.text
                self.told.add((ready.json()["stage"], ready.status_code))
                if ready.status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def stop(self) -> int:
        """Send SIGTERM, as the kubelet does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a `bentoml serve` and its worker, which has its own process group."""
    for one in (
        [*psutil.Process(process.pid).children(recursive=True), process]
        if process.poll() is None
        else ()
    ):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


@contextlib.contextmanager
def serve(
    log: Path,
    target: str = "service.py",
    directory: Path = ROOT,
    host: str | None = "127.0.0.1",
    port: int | None = None,
    wrapper: Sequence[str] = (),
    **settings: str,
) -> Iterator[Served]:
    """Run `bentoml serve` as a user does, on a free port, with no `--host` if None; killed at the
    end if it is still there.

    `wrapper` is a command that becomes the one that follows it, as `nice` does.
    """
    port = port or free_port()
    command = [
        *wrapper,
        str(Path(sys.executable).with_name("bentoml")),
        "serve",
        target,
        "--port",
        str(port),
    ]
    command += [] if host is None else ["--host", host]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=clean_environment(**settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Served(f"http://127.0.0.1:{port}", port, process, log)
        finally:
            kill_tree(process)


def metric(url: str, name: str, **labels: str) -> float:
    """The value of the series with this name and at least these labels."""
    exposition = httpx.get(f"{url}/metrics", timeout=SECONDS).text
    samples = (
        sample for family in text_string_to_metric_families(exposition) for sample in family.samples
    )
    (value,) = (
        one.value for one in samples if one.name == name and labels.items() <= one.labels.items()
    )
    return value
