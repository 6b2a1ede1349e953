"""`stepweave serve`, as a user runs it."""

from __future__ import annotations

import contextlib
import io
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.environment import ROOT, clean_environment, free_port
from tests.support.hub import COMMIT, hub
from tests.support.served import PROMPT, Served, kill_tree
from tests.support.waiting import SECONDS, wait_until
from tools.shapes.checker import wrong_parts

MODEL = ROOT / "models" / "shapes"


@contextlib.contextmanager
def stepweave_serve(folder: Path, *arguments: str, **variables: str) -> Iterator[Served]:
    """The command in an empty directory, killed at the end if it is still there."""
    port = free_port()
    (folder / "empty").mkdir()
    command = [sys.executable, "-m", "stepweave", "serve", *arguments, "--port", str(port)]
    with (folder / "log.txt").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder / "empty",
            env=clean_environment(PYTHONPATH=str(ROOT / "src"), **variables),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Served(f"http://127.0.0.1:{port}", port, process, folder / "log.txt")
        finally:
            kill_tree(process)


@pytest.mark.full
def test_it_serves_from_an_empty_directory_until_it_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "stepweave.yaml").write_text("max_steps: 21\n")
    arguments = ("--no-warmup", "--config", str(tmp_path / "stepweave.yaml"))
    with stepweave_serve(tmp_path, *arguments) as server:
        server.wait_until_ready()
        body = {"prompt": PROMPT, "num_inference_steps": 21, "seed": 7}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=SECONDS)
        with Image.open(io.BytesIO(answer.content)) as image:
            assert wrong_parts(image, PROMPT) == []
        refused = httpx.post(f"{server.url}/generate", json=body | {"num_inference_steps": 22})
        assert refused.status_code == 400
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(SECONDS) == 0
        assert "Traceback" not in server.log.read_text()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_port_in_use_ends_it_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "stepweave", "serve", "--port", str(port)],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(
        f"stepweave: port {port} of 127.0.0.1 is in use"
    )
    assert "--port N" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.full
def test_a_download_is_told_at_the_terminal_and_by_the_probe(tmp_path: Path) -> None:
    told: list[dict[str, object]] = []

    def halfway() -> bool:
        with contextlib.suppress(httpx.TransportError):
            told.append(httpx.get(f"{server.url}/readyz", timeout=SECONDS).json())
        return (
            any(" of " in str(one["message"]) for one in told) or server.process.poll() is not None
        )

    with hub(MODEL, "owner/shapes") as remote:
        variables = {"HF_ENDPOINT": remote.url, "HF_HUB_CACHE": str(tmp_path / "hub")}
        arguments = ("owner/shapes", "--revision", COMMIT, "--no-warmup")
        with stepweave_serve(tmp_path, *arguments, **variables) as server:
            wait_until(halfway)
            (last,) = {str(one["message"]) for one in told[-1:]}
            assert told[-1]["stage"] == "downloading"
            assert last.startswith("owner/shapes, ") and last.endswith(" MB")
            remote.let_go.set()
            server.wait_until_ready()
            log = server.log.read_text()
    assert "downloading: owner/shapes" in log
    assert "loading: owner/shapes onto cpu in torch.float32: " in log
