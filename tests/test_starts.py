"""Servers that are started for one test: how far they are, what stops them, and the built bento."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.conftest import ROOT, clean_environment, free_port, serve
from tests.test_server import PROMPT, metric
from tests.waiting import SECONDS, wait_until
from tools.shapes.checker import wrong_parts


def test_it_tells_how_far_loading_is_and_finishes_work_on_sigterm(tmp_path: Path) -> None:
    with serve(tmp_path / "log.txt", STEPWEAVE_GRACE=f"{SECONDS:g}") as server:
        stages: set[str] = set()

        def look() -> bool:
            try:
                live, ready = (httpx.get(f"{server.url}{path}", timeout=SECONDS) for path in ("/livez", "/readyz"))
            except httpx.TransportError:
                return False
            assert live.status_code == 200
            assert ready.status_code == (200 if ready.json()["stage"] == "ready" else 503)
            stages.add(ready.json()["stage"])
            return "ready" in stages

        wait_until(look)
        assert {"importing", "ready"} <= stages
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": PROMPT, "num_inference_steps": 200}
            answer = pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=SECONDS)
            wait_until(lambda: metric(server.url, "stepweave_requests_in_flight") or answer.done())
            assert not answer.done()
            assert server.stop() == 0
            assert answer.result(SECONDS).status_code == 200
        assert "Traceback" not in server.log.read_text()


def start_and_fail(**settings: str) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("bentoml")), "serve", "service.py", "--port", str(free_port())]
    ended = subprocess.run(
        command, cwd=ROOT, env=clean_environment(**settings), capture_output=True, text=True, timeout=SECONDS
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_wrong_setting_stops_the_start_with_its_name_and_value() -> None:
    status, output = start_and_fail(STEPWEAVE_MAX_STEPS="lots")
    assert status != 0
    assert "STEPWEAVE_MAX_STEPS='lots'" in output
    assert "Traceback" not in output


def test_a_model_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with serve(tmp_path / "log.txt", STEPWEAVE_MODEL=str(tmp_path / "model")) as server:
        response = httpx.Response(503, json={"stage": "starting"})

        def failed() -> bool:
            nonlocal response
            with contextlib.suppress(httpx.TransportError):
                response = httpx.get(f"{server.url}/readyz", timeout=SECONDS)
            return response.json()["stage"] == "failed"

        wait_until(failed)
        assert response.status_code == httpx.get(f"{server.url}/livez", timeout=SECONDS).status_code == 503
        assert "cannot be loaded" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    home = tmp_path_factory.mktemp("bentoml")
    built = subprocess.run(
        [str(Path(sys.executable).with_name("bentoml")), "build", "--output", "tag"],
        cwd=ROOT, env=clean_environment(BENTOML_HOME=str(home)), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (tag,) = re.findall(r"stepweave:\w+", built.stdout)
    yield home, tag


def test_the_built_bento_serves_from_an_empty_directory(bento: tuple[Path, str], tmp_path: Path) -> None:
    home, tag = bento
    (tmp_path / "empty").mkdir()
    (folder,) = (home / "bentos" / "stepweave").glob("*/")
    assert not list(folder.rglob("*.pt"))
    assert (folder / "src" / "models" / "shapes" / "transformer").is_dir()
    assert "torch==" in (folder / "env" / "python" / "requirements.txt").read_text()
    preset = folder / "src" / "models" / "shapes" / "stepweave.json"
    preset.write_text(preset.read_text().replace('"shapes"', '"copy-in-the-bento"'))
    with serve(tmp_path / "log.txt", tag, tmp_path / "empty", BENTOML_HOME=str(home), PYTHONPATH="") as server:
        server.wait_until_ready()
        response = httpx.post(f"{server.url}/generate", json={"prompt": PROMPT, "seed": 7}, timeout=SECONDS)
        assert wrong_parts(Image.open(io.BytesIO(response.content)), PROMPT) == []
        # its own copy, not the one this test runs from
        assert httpx.get(f"{server.url}/v1/models", timeout=SECONDS).json()["data"][0]["id"] == "copy-in-the-bento"
        assert server.stop() == 0
