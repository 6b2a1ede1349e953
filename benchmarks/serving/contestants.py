"""The contestants: servers with different settings, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import httpx
import psutil

from benchmarks.serving.client import BenchmarkError

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 180
STOP_SECONDS = 60
LOG_LINES = 15

POLICY = "BENCHMARK_POLICY"  # the environment variable that names one of benchmarks/policies.py
DEFAULT = "srpt"
CONTESTANTS: dict[str, dict[str, str]] = {
    DEFAULT: {"STEPWEAVE_BATCHING": "step"},
    **{
        name: {"STEPWEAVE_BATCHING": "step", POLICY: name}
        for name in ("aged", "fifo", "keyed_fifo", "round_robin")
    },
    **{name: {"STEPWEAVE_BATCHING": name} for name in ("request", "threads", "off")},
}
COMMON = {
    "STEPWEAVE_CPU_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
    "BENTOML_DO_NOT_TRACK": "True",
}


@dataclass
class Served:
    """A running server."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    workers: list[psutil.Process] = field(default_factory=list)  # once it is ready
    ready: str = "/readyz"  # the path that answers 200 once the server is ready

    def check(self) -> None:
        """Raise BenchmarkError, with the end of its log, if the server or a worker has ended
        (BentoML restarts workers)."""
        status = self.process.poll()
        if status is not None:
            self._fail(f"has ended with status {status}")
        for worker in self.workers:
            if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
                self._fail("has lost a worker")

    def wait_until_ready(self) -> None:
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            self.check()
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{self.url}{self.ready}", trust_env=False)
                if answer.status_code == 200:
                    self.workers = psutil.Process(self.process.pid).children(recursive=True)
                    return
                if _failed(answer):
                    self._fail("cannot start")
            time.sleep(0.2)
        self._fail(f"is not ready after {READY_SECONDS} s")

    def stop(self) -> None:
        """Send SIGTERM, and later SIGKILL, also to the worker, which has its own process group."""
        if self.process.poll() is not None:
            return
        family = [
            *psutil.Process(self.process.pid).children(recursive=True),
            psutil.Process(self.process.pid),
        ]
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()

    def _fail(self, what: str) -> NoReturn:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise BenchmarkError(f"the server of {self.name!r} {what}; its log ends:\n{tail}")


@contextlib.contextmanager
def serve(name: str, settings: dict[str, str], logs: Path) -> Iterator[Served]:
    """Run `bentoml serve` on a free loopback port until the context ends; waits for its
    readiness."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("STEPWEAVE_")
    }
    port = free_port()
    bentoml = str(Path(sys.executable).with_name("bentoml"))
    service = "benchmarks.serving.service:Stepweave" if POLICY in settings else "service.py"
    command = [bentoml, "serve", service, "--host", "127.0.0.1", "--port", str(port)]
    with launch(name, command, port, environment | COMMON | settings, logs) as server:
        yield server


@contextlib.contextmanager
def launch(
    name: str,
    command: Sequence[str],
    port: int,
    environment: Mapping[str, str],
    logs: Path,
    ready: str = "/readyz",
) -> Iterator[Served]:
    """Run a command that serves on a loopback port until the context ends; waits for its
    readiness. Its output is in the folder `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    server = Served(name, f"http://127.0.0.1:{port}", process, log, ready=ready)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def _failed(answer: httpx.Response) -> bool:
    """Whether the server says that it will not become ready."""
    try:
        return bool(answer.json()["stage"] == "failed")
    except (ValueError, LookupError, TypeError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
