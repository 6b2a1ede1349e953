"""The README's ways to a first image, its commands copied into an empty environment."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.environment import ROOT, free_port
from tests.support.served import PROMPT, kill_tree
from tests.support.waiting import wait_until
from tools.image import working_engine
from tools.shapes.checker import wrong_parts

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]
README = (ROOT / "README.md").read_text()
QUICK_START = README.split("## Quick start")[1].split("\n## ")[0]
# the last command of each way serves; it is the beginning of a line in the README
WAYS = {
    "make": ["make serve"],
    "wheel": ["make wheel", "python3 -m venv", "~/stepweave/bin/stepweave serve"],
    "container": ["make image", "docker run"],
}
INHERITED = ("PATH", "LANG", "TMPDIR")
TAG = "stepweave-readme"  # instead of the image `stepweave` that this machine may have
MAX_GB = 2.25  # that of BentoML's image
START_SECONDS = 1800.0


def commands(way: str) -> list[str]:
    """The block of the quick start that begins with a way's first command."""
    for block in re.findall(r"^```console\n(.*?)^```$", QUICK_START, re.MULTILINE | re.DOTALL):
        lines = [line.removeprefix("$ ") for line in block.splitlines()]
        if lines[0] == WAYS[way][0]:
            assert len(lines) == len(WAYS[way])
            assert all(map(str.startswith, lines, WAYS[way])), lines
            return lines
    raise AssertionError(f"the quick start has no commands for {way}")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The project's files, without what was built or installed in its folder."""
    folder = tmp_path / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment(home: Path, port: int) -> dict[str, str]:
    """That of a new user, and pip's configuration of this machine."""
    home.mkdir()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in INHERITED or name.startswith(("PIP_", "SSL_", "REQUESTS_CA"))
    }
    configured = Path.home() / ".config" / "pip"
    if configured.is_dir():
        shutil.copytree(configured, home / ".config" / "pip")
    # `make` and the command line read a port each
    ports = {"PORT": str(port), "BENTOML_PORT": str(port)}
    return inherited | ports | {"HOME": str(home), "TAG": TAG}


def in_a_container(command: str, name: str, port: int) -> str:
    """The command for the engine at hand, and this test's port."""
    words = shlex.split(command)
    at = words.index("-p")
    assert words.pop() == "stepweave"
    words.append(TAG)
    if working_engine() == "docker":
        words[at + 1] = f"127.0.0.1:{port}:3000"
        return shlex.join([*words[:2], "--name", name, *words[2:]])
    # without Docker's network of its own
    limits = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=30000:30000"]
    options = [*limits, "--name", name, "--network=host"]
    inside = ["serve", "--host", "127.0.0.1", "--port", str(port)]
    command_words = ["podman", "--runtime", "runc", "run", *options, *words[2:at], *words[at + 2 :]]
    return shlex.join([*command_words, *inside])


@contextlib.contextmanager
def running(command: str, folder: Path, variables: dict[str, str], log: Path) -> Iterator[
    subprocess.Popen[bytes]
]:  # fmt: skip
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, shell=True, executable="/bin/bash", cwd=folder, env=variables,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            # shells' background processes ignore it, and what these start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            yield process
        finally:
            kill_tree(process)


@contextlib.contextmanager
def removed(container: str) -> Iterator[None]:
    """Remove a container at the end, which outlives its command; there may be none."""
    try:
        yield
    finally:
        if (engine := working_engine()) is not None:
            subprocess.run([engine, "rm", "--force", container], capture_output=True)


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=60).status_code == 200
    return False


@pytest.mark.parametrize(
    "way",
    [
        "make",
        "wheel",
        pytest.param(
            "container",
            marks=pytest.mark.skipif(
                working_engine() is None, reason="neither Docker nor podman works"
            ),
        ),
    ],
)
def test_the_quick_starts_commands_lead_to_an_image(
    way: str, clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, log = free_port(), tmp_path / "log.txt"
    variables, url = environment(tmp_path / "home", port), f"http://127.0.0.1:{port}"
    *before, serving = commands(way)
    if way == "container":
        serving = in_a_container(serving, f"stepweave-readme-{port}", port)
    began = time.monotonic()
    for command in before:
        with log.open("ab") as output:
            ended = subprocess.run(
                command, shell=True, executable="/bin/bash", cwd=clone, env=variables,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        assert ended.returncode == 0, log.read_text()[-5000:]
    # a command that needs nothing of the folder works in an empty one
    folder = clone if serving.startswith("make") else tmp_path / "home"
    container = f"stepweave-readme-{port}"
    with removed(container), running(serving, folder, variables, log) as server:
        wait_until(lambda: server.poll() is not None or ready(url), START_SECONDS)
        assert server.poll() is None, log.read_text()[-5000:]
        asking = re.search(r"^```bash\n(.*?)^```$", QUICK_START, re.MULTILINE | re.DOTALL)
        assert asking is not None
        curl = asking[1].replace("localhost:3000", f"127.0.0.1:{port}")
        answered = subprocess.run(curl, shell=True, cwd=tmp_path, env=variables)
        minutes = (time.monotonic() - began) / 60
        assert answered.returncode == 0
        with Image.open(tmp_path / "circle.png") as image:
            assert wrong_parts(image, PROMPT) == []
        # Ctrl-C at a terminal reaches all processes of the command
        os.killpg(server.pid, signal.SIGINT)
        status = server.wait(300)
        # make has the status 2 if what it runs is interrupted, and a shell 130
        assert status in (0, 2, 130, -signal.SIGINT), (status, log.read_text()[-5000:])
    if way == "container":
        tried = subprocess.run(
            ["make", "image-test"], cwd=clone, env=variables, capture_output=True, text=True
        )
        assert tried.returncode == 0, tried.stdout + tried.stderr
        size = re.search(r"^image: .*, ([\d.]+) GB$", tried.stdout, re.MULTILINE)
        assert size is not None and float(size[1]) < MAX_GB
    with capsys.disabled():
        count = len(before) + 2
        sys.stderr.write(f"\n{way}: {count} commands, first image after {minutes:.1f} minutes\n")
    assert not ready(url)
