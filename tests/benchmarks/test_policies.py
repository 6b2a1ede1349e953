"""Servers with another policy than the default: what the benchmarks compare it with."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from benchmarks.policies import FIFO, POLICIES
from stepweave.scheduling import Policy
from stepweave.scheduling.policy import Rank
from stepweave.scheduling.task import Task
from stepweave.serving.server import Server
from tests.support.asgi import serving
from tests.support.environment import ROOT, clean_environment, free_port
from tests.support.served import Served, kill_tree
from tests.support.waiting import SECONDS


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Asked(FIFO):
    """Counts how often it is asked for the rank of a job."""

    def __init__(self) -> None:
        self.times = 0

    def rank(self, task: Task, now: float) -> Rank:
        self.times += 1
        return super().rank(task, now)


@pytest.mark.anyio
async def test_a_server_asks_the_policy_it_is_given() -> None:
    asked = Asked()
    with patch("tests.support.asgi.Server", partial(Server, policy=asked)):
        async with serving() as app:
            before = asked.times
            await app.post().done()
    assert asked.times > before


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_each_is_one_that_an_engine_takes(policy: Policy) -> None:
    assert isinstance(policy, Policy)


@pytest.mark.full
def test_the_real_server_starts_with_another_policy(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log.txt"
    command = [sys.executable, "-m", "benchmarks.serving.server", "--policy", "fifo"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=clean_environment(STEPWEAVE_POLICY="fifo"),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Served(f"http://127.0.0.1:{port}", port, process, log)
    try:
        server.wait_until_ready()
        body = {"prompt": "a red ring", "num_inference_steps": 2}
        assert httpx.post(f"{server.url}/generate", json=body, timeout=SECONDS).status_code == 200
        assert server.stop() == 0
    finally:
        kill_tree(process)
    # the setting that has been removed has no effect but one line
    assert log.read_text().count("STEPWEAVE_POLICY is ignored") == 1


def test_an_unknown_policy_is_refused_by_name() -> None:
    command = [sys.executable, "-m", "benchmarks.serving.server", "--policy", "lifo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and "invalid choice: 'lifo'" in done.stderr
