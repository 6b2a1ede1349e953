"""Shared fixtures: a real server in a process of its own, and an app in this one around a fake
pipeline."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import psutil
import pytest
import torch
import uvicorn
from starlette.testclient import TestClient
from xdist.scheduler import LoadScopeScheduling

from stepweave.api.app import Api
from stepweave.api.middleware.contract import ContractMiddleware
from stepweave.config import PREFIX, Settings
from stepweave.config.preset import Preset
from stepweave.planning.cost import CostModel
from stepweave.serving.names import told_name
from stepweave.serving.server import Server
from tests.fake import FakePipeline
from tests.waiting import SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[1]


# modules whose tests ask the one real server, and those whose tests take long and are dealt out one
# by one
SERVED = {
    "clients",
    "edit_images",
    "legacy",
    "locust",
    "monitoring",
    "openai",
    "openai_types",
    "openapi",
    "server",
    "streams",
}
APART = {"docs", "pipelines", "restart", "schedulers", "scope", "starts", "switches"}


class Scheduling(LoadScopeScheduling):
    """Which tests run in one process, of several: those of the real server, and those of a module
    but for the slow ones."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        name = Path(path).stem.removeprefix("test_")
        full = self.config.option.markexpr.startswith("full")
        return (
            "served" if name in SERVED and not full else nodeid if name in APART or full else path
        )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    asking = {
        item.path.stem.removeprefix("test_")
        for item in items
        if "served" in getattr(item, "fixturenames", ())
    }
    if missing := asking - SERVED:
        raise pytest.UsageError(
            f"conftest.SERVED lacks {', '.join(missing)}: a second server would be started"
        )


@pytest.fixture(scope="module")
def quick_garbage() -> None:
    """What is there now stays, as nobody needs to find out again: where memory runs out, the engine
    collects garbage, and of all that the tests before have imported and built that takes most of a
    second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def every_row_pays() -> Iterator[None]:
    """Forwards are shared as far as they may be: on tiny modules, what pays is a matter of
    chance."""
    with patch.object(CostModel, "knee", lambda self, key, most: most):
        yield


@pytest.fixture(autouse=True)
def as_many_torch_threads_as_here() -> None:
    """Threads that a test starts compute as its own does, to the last bit: a server of a test
    before may have set another number."""
    torch.set_num_threads(torch.get_num_threads())


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Torch computes on one thread: the threads under test are enough for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has none of the server's settings, nor other variables with their prefix."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment less the project's settings and with threads that do not spin, plus
    `changes`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("STEPWEAVE_")
    }
    return environment | {"BENTOML_DO_NOT_TRACK": "True", "OMP_WAIT_POLICY": "passive"} | changes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Served:
    """A running `bentoml serve`."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=SECONDS).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def stop(self) -> int:
        """SIGTERM, as the kubelet sends it; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a `bentoml serve` that is still there, and its worker: that has a process group of its
    own."""
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


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One real server with the embedded model for the whole session; it must end cleanly on
    SIGTERM."""
    with serve(tmp_path_factory.mktemp("serve") / "log.txt") as server:
        server.wait_until_ready()
        yield server
        assert server.stop() == 0


@dataclass
class InProcess:
    """The HTTP app around a fake pipeline, or another one."""

    client: TestClient
    server: Server
    pipeline: Any

    def post(self, body: Any = None, **fields: Any) -> httpx.Response:
        return self.client.post(
            "/v1/images/generations",
            json={"prompt": "a red circle", **fields} if body is None else body,
        )

    def metric(self, name: str, **labels: str) -> float | None:
        labels = {"model_name": told_name(self.server.settings), **labels}
        if name == "stepweave_requests_total":
            labels = {"client": "", **labels}
        return self.server.metrics.registry.get_sample_value(name, labels)

    def until_metric(self, value: float, name: str, **labels: str) -> None:
        """Wait for a metric to be `value`: what a thread counts, it may do a moment after the
        answer."""
        wait_until(lambda: self.metric(name, **labels) == value)


@contextlib.contextmanager
def listening(app: InProcess) -> Iterator[str]:
    """The URL of an app in this process."""
    port = free_port()
    runner = uvicorn.Server(
        uvicorn.Config(app.client.app, "127.0.0.1", port, lifespan="off", log_level="warning")
    )
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_until(lambda: runner.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        runner.should_exit = True
        thread.join(SECONDS)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., InProcess]]:
    """Makes apps around a fake pipeline, or the one given: `in_process(max_queue=2)`."""
    for name in [name for name in os.environ if name.startswith("STEPWEAVE_")]:
        monkeypatch.delenv(name)
    with contextlib.ExitStack() as stack:

        def make(pipeline: Any = None, *, ready: bool = True, **settings: Any) -> InProcess:
            fake = FakePipeline()
            if pipeline is not None and not isinstance(pipeline, FakePipeline):
                settings = {
                    "max_pixels": 128 * 128,
                    **settings,
                }  # a tiny model's warm-up tries long images of many latents
            pipeline = pipeline or fake
            server = Server(
                Settings(**{"batching": "off", **settings}), load=lambda *_: (pipeline, Preset())
            )
            stack.callback(server.close)
            stack.callback(fake.record.release.set)  # before close: nothing may wait for ever
            app = ContractMiddleware(Api(server).app(), server)
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            if ready:
                server.start()
                wait_until(lambda: server.status.stage in ("ready", "failed"))
                assert server.status.stage == "ready", server.status.message
            return InProcess(client, server, pipeline)

        yield make
