"""Servers that are started for one test: how far they are, what stops them, and the built bento."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from stepweave.config import EMBEDDED_MODEL
from tests.support.environment import ROOT, clean_environment, free_port
from tests.support.served import PROMPT, kill_tree, metric, serve
from tests.support.waiting import SECONDS, wait_until
from tools.shapes.checker import wrong_parts


@pytest.mark.full
def test_it_finishes_work_on_sigterm(tmp_path: Path) -> None:
    with serve(tmp_path / "log.txt", STEPWEAVE_GRACE=f"{SECONDS:g}") as server:
        server.wait_until_ready()
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": PROMPT, "num_inference_steps": 80}
            answer = pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=SECONDS)
            wait_until(lambda: metric(server.url, "stepweave_requests_in_flight") or answer.done())
            assert not answer.done()
            assert server.stop() == 0
            assert answer.result(SECONDS).status_code == 200
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("host", "settings", "bound"),
    [("0.0.0.0", {}, "0.0.0.0"), (None, {"BENTOML_HOST": "127.0.0.1"}, "127.0.0.1")],
)
def test_the_log_names_the_address_that_is_bound_and_warns_where_it_is_open(
    host: str | None, settings: dict[str, str], bound: str, tmp_path: Path
) -> None:
    with serve(tmp_path / "log.txt", host=host, **settings) as server:
        wait_until(
            lambda: server.process.poll() is not None or "listening on " in server.log.read_text()
        )
        # what follows it, once the model is being loaded
        wait_until(
            lambda: server.process.poll() is not None or "importing:" in server.log.read_text()
        )
        log = server.log.read_text()
    assert f"[stepweave.serving.listening] listening on {bound}:{server.port}\n" in log, log
    warning = (
        f"{bound}:{server.port} is open to other machines without authentication: set "
        f"STEPWEAVE_API_KEYS, or listen with"
    )
    assert (warning in log) == (bound == "0.0.0.0"), log


def start_and_fail(port: int | None = None, **settings: str) -> tuple[int, str]:
    command = [
        str(Path(sys.executable).with_name("bentoml")),
        "serve",
        "service.py",
        "--host",
        "127.0.0.1",
        "--port",
        str(port or free_port()),
    ]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean_environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            kill_tree(process)
    return process.returncode, output


def test_a_wrong_setting_stops_the_start_with_its_name_and_value() -> None:
    status, output = start_and_fail(STEPWEAVE_MAX_STEPS="lots")
    assert status != 0
    assert "STEPWEAVE_MAX_STEPS='lots'" in output
    assert "Traceback" not in output


def test_a_port_in_use_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, output = start_and_fail(port)
    assert status == 1
    assert output.splitlines()[-1] == (
        f"stepweave: port {port} of 127.0.0.1 is in use by another process; stop it, or choose "
        f"another port "
        "(`stepweave serve --port N`, `make serve PORT=N`)"
    )
    assert "Traceback" not in output


@pytest.mark.parametrize("what", [pytest.param("model", marks=pytest.mark.full), "state"])
def test_a_server_that_cannot_start_ends_the_command_where_a_setting_says_so(
    tmp_path: Path, what: str
) -> None:
    """A process manager would restart it, and shows the last line."""
    settings = {"STEPWEAVE_EXIT_ON_FAILURE": "true"}
    if what == "model":
        shutil.copytree(EMBEDDED_MODEL, tmp_path / "shapes")
        (tmp_path / "shapes" / "vae" / "config.json").unlink()
        settings["STEPWEAVE_MODEL"] = str(tmp_path / "shapes")
        told = "the model 'shapes' cannot be loaded: vae/config.json is missing"
    else:
        (tmp_path / "file").touch()
        settings["STEPWEAVE_STATE_DIR"] = str(tmp_path / "file" / "state")
        told = (
            "STEPWEAVE_STATE_DIR: the directory cannot be created or written to (Not a directory)"
        )
    status, output = start_and_fail(**settings)
    assert status == 1, output
    assert output.splitlines()[-1] == f"stepweave: the server cannot start: {told}"


@pytest.mark.full
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
        assert (
            response.status_code
            == httpx.get(f"{server.url}/livez", timeout=SECONDS).status_code
            == 503
        )
        message = response.json()["error"]["message"]
        assert message == (
            "The server is not ready: failed, the model 'model' cannot be loaded: model_index.json "
            "is missing: the model's "
            "directory is not that of a diffusers pipeline; `save_pretrained` writes one."
        )
        assert message.split("failed, ")[1].rstrip(".") in server.log.read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    home = tmp_path_factory.mktemp("bentoml")
    built = subprocess.run(
        [str(Path(sys.executable).with_name("bentoml")), "build", "--output", "tag"],
        cwd=ROOT,
        env=clean_environment(BENTOML_HOME=str(home)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert built.returncode == 0, built.stderr
    (tag,) = re.findall(r"stepweave:\w+", built.stdout)
    yield home, tag


@pytest.mark.full
def test_the_built_bento_serves_from_an_empty_directory(
    bento: tuple[Path, str], tmp_path: Path
) -> None:
    home, tag = bento
    (tmp_path / "empty").mkdir()
    (folder,) = (home / "bentos" / "stepweave").glob("*/")
    assert not list(folder.rglob("*.pt"))
    assert (folder / "src" / "models" / "shapes" / "transformer").is_dir()
    assert "torch==" in (folder / "env" / "python" / "requirements.txt").read_text()
    preset = folder / "src" / "models" / "shapes" / "stepweave.json"
    preset.write_text(preset.read_text().replace('"shapes"', '"copy-in-the-bento"'))
    with serve(
        tmp_path / "log.txt", tag, tmp_path / "empty", BENTOML_HOME=str(home), PYTHONPATH=""
    ) as server:
        server.wait_until_ready()
        response = httpx.post(
            f"{server.url}/generate", json={"prompt": PROMPT, "seed": 7}, timeout=SECONDS
        )
        assert wrong_parts(Image.open(io.BytesIO(response.content)), PROMPT) == []
        # its own copy, not the one this test runs from
        assert (
            httpx.get(f"{server.url}/v1/models", timeout=SECONDS).json()["data"][0]["id"]
            == "copy-in-the-bento"
        )
        assert server.stop() == 0
