"""The HTTP app in this process, around a fake pipeline or another one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from starlette.testclient import TestClient

from stepweave.serving.names import told_name
from stepweave.serving.server import Server
from tests.support.environment import free_port
from tests.support.waiting import SECONDS, wait_until


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
        """Wait until a metric is `value`; threads may count after the answer."""
        wait_until(lambda: self.metric(name, **labels) == value)


@contextlib.contextmanager
def listening(app: InProcess) -> Iterator[str]:
    """Serve an app in this process; yields its URL."""
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
