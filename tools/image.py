"""Builds the container image, and tries it: `make image`, `make image-test`.

Only Python's standard library is used, since neither needs the packages of the server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
BASE = "docker.io/library/debian:bookworm-slim"  # of the Dockerfile
START_SECONDS = 600.0
STOP_SECONDS = 120
PNG = b"\x89PNG\r\n\x1a\n"
# what only a build needs
UNWANTED = ("gcc", "g++", "cc", "git", "pip", "make")
PIP_KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "timeout")
ARGUMENTS = ("TORCH_INDEX_URL", "TORCH_VERSION", "WITH_COMPILER")


class Engine:
    """Docker, or podman, which needs no daemon."""

    def __init__(self, name: str) -> None:
        self.name = name
        # a container in a container, such as CI, can neither isolate more nor raise its limits
        self._podman = name == "podman"

    def call(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.name, *arguments], text=True, **options)

    def read(self, *arguments: str) -> str:
        return self.call(*arguments, check=True, stdout=subprocess.PIPE).stdout.strip()

    def build(self, tag: str, more: Sequence[str]) -> None:
        command = ["build", "--tag", tag, *more]
        if self._podman:
            self._find_base()
            command += ["--pull=never", "--isolation=chroot", "--network=host"]
        self.call(*command, str(ROOT), check=True)

    def run(self, *arguments: str) -> list[str]:
        if not self._podman:
            return [self.name, "run", *arguments]
        limits = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=30000:30000")
        # with --read-only, podman makes folders writable that Docker and Kubernetes do not
        strictly = ("--read-only-tmpfs=false",) if "--read-only" in arguments else ()
        runtime = ("--runtime", "runc") if shutil.which("runc") else ()
        return [self.name, *runtime, "run", *limits, *strictly, *arguments]

    def _find_base(self) -> None:
        """Have Debian's image: pulled, or where no registry is in reach, made from its packages."""
        if self.call("image", "exists", BASE).returncode == 0:
            return
        if self.call("pull", "--quiet", BASE).returncode == 0:
            return
        if shutil.which("debootstrap") is None:
            sys.exit(f"image: {BASE} cannot be pulled; install debootstrap to make it here")
        print(f"image: {BASE} cannot be pulled: making it with debootstrap", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "root"
            command = ["debootstrap", "--variant=minbase", "bookworm", str(root)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for kept in ("var/cache/apt/archives", "var/lib/apt/lists"):
                shutil.rmtree(root / kept)
                (root / kept / "partial").mkdir(parents=True)
            tar = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
            self.call("import", "--quiet", "-", BASE, check=True, stdin=tar.stdout)


def working_engine() -> str | None:
    """Docker if it works, that is, has a daemon; else podman if it does."""
    for name in ("docker", "podman"):
        if shutil.which(name):
            if subprocess.run([name, "info"], capture_output=True).returncode == 0:
                return name
    return None


def engine() -> Engine:
    """The one that works. Exits if there is none."""
    name = working_engine()
    if name is None:
        sys.exit("image: neither Docker nor podman works; on Debian: apt-get install podman runc")
    return Engine(name)


@contextlib.contextmanager
def pip_configuration(engine: Engine) -> Iterator[list[str]]:
    """Options of a build that give it this machine's configuration of pip: a mirror, a proxy's
    certificate. They are secrets of the build, so that no credentials get into the image."""
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    settings: dict[str, str] = {}
    for line in shown.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in PIP_KEYS:
            settings[name] = value.strip("'\"").replace("\\n", " ")
    options: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        lines = ["[global]"]
        for name, value in settings.items():
            words = []
            for word in value.split():
                path = Path(urlsplit(word).path if word.startswith("file://") else word)
                if not path.is_absolute() or not path.exists():
                    words.append(word)
                elif name == "cert":
                    options += ["--secret", f"id=pip-certificate,src={path}"]
                    words.append("/run/secrets/pip-certificate")
                elif engine.name == "podman":  # Docker mounts no folders into a build
                    top = path.parent if path.name == "simple" else path
                    options += ["--volume", f"{top}:{top}:ro"]
                    words.append(word)
            lines.append(f"{name} = {' '.join(words)}")
        if len(lines) > 1:
            file = Path(folder) / "pip.conf"
            file.write_text("\n".join(lines) + "\n")
            options += ["--secret", f"id=pip.conf,src={file}"]
        yield options


def build(options: argparse.Namespace) -> None:
    found = engine()
    more = [word for one in options.options for word in shlex.split(one)]
    for name in ARGUMENTS:
        if value := os.environ.get(name):
            more += ["--build-arg", f"{name}={value}"]
    began = time.monotonic()
    with pip_configuration(found) as configuration:
        found.build(options.tag, [*configuration, *more])
    seconds = time.monotonic() - began
    print(f"image: {options.tag}, {size(found, options.tag):.2f} GB, built in {seconds:.0f} s")


def size(engine: Engine, tag: str) -> float:
    return int(engine.read("image", "inspect", "--format", "{{.Size}}", tag)) / 1e9


class Container:
    """A running server of the image: read-only, without privileges, on a free port."""

    def __init__(self, engine: Engine, tag: str, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.name = f"stepweave-image-test-{port}"
        self._engine = engine
        command = engine.run(
            "--name", self.name, "--detach", "--network=host", "--read-only", "--cap-drop=ALL",
            "--security-opt=no-new-privileges", "--tmpfs=/tmp:mode=1777", *options, tag,
            "serve", "--host", "127.0.0.1", "--port", str(port),
        )  # fmt: skip
        self._began = time.monotonic()
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except BaseException:
            self.remove()
            raise

    def ready(self) -> float:
        """Wait until the server is ready; returns the seconds that it took."""
        while time.monotonic() < self._began + START_SECONDS:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=10) as answer:
                    if answer.status == 200:
                        return time.monotonic() - self._began
            if self.state()["Status"] != "running":
                break
            time.sleep(0.2)
        self.fail("the server did not become ready")

    def state(self) -> dict[str, Any]:
        shown = self._engine.read("inspect", "--format", "{{json .State}}", self.name)
        state: dict[str, Any] = json.loads(shown)
        return state

    def image(self, **fields: Any) -> bytes:
        body = json.dumps({"prompt": "a large red circle on a blue background", **fields})
        request = urllib.request.Request(
            f"{self.url}/generate", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            content: bytes = answer.read()
            return content

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self._engine.call("exec", self.name, *command, capture_output=True)

    def stop(self) -> int:
        """End it as an orchestrator does; returns its exit status."""
        self._engine.read("stop", "--time", str(STOP_SECONDS), self.name)
        status: int = self.state()["ExitCode"]
        return status

    def fail(self, message: str) -> Any:
        log = self._engine.call("logs", "--tail", "30", self.name, capture_output=True)
        sys.exit(f"image: {message}\n{log.stdout}{log.stderr}")

    def remove(self) -> None:
        self._engine.call("rm", "--force", self.name, capture_output=True)


def test(options: argparse.Namespace) -> None:
    """Start the image as a pod would, make an image, drain it under way, and look inside."""
    found = engine()
    print(f"image: {options.tag}, {size(found, options.tag):.2f} GB")
    container = Container(found, options.tag)
    try:
        print(f"ready after {container.ready():.1f} s, read-only, without capabilities")
        if not container.image(seed=7).startswith(PNG):
            container.fail("/generate did not answer with a PNG")
        look_inside(container, compiler=options.compiler)
        print("a request that was running when the container was stopped was answered, and the "
              f"server ended with status {drained(container)}")  # fmt: skip
    finally:
        container.remove()
    if not options.compiler:
        refuses_to_compile(found, options.tag)
    print("passed")


def look_inside(container: Container, *, compiler: bool) -> None:
    user = container.inside("id", "-u").stdout.strip()
    if user != "1034":
        container.fail(f"the user is {user}, not 1034")
    if container.inside("touch", "/var/tmp/file").returncode == 0:
        container.fail("the root file system can be written to")
    found = [
        name
        for name in UNWANTED
        if container.inside("sh", "-c", f"command -v {name}").returncode == 0
    ]
    if found and not compiler:
        container.fail(f"the image has {', '.join(found)}")
    print(f"user {user}; no {', '.join(name for name in UNWANTED if name not in found)}")


def drained(container: Container) -> int:
    """Stop the container while it makes an image of many steps; returns its exit status."""
    answers: list[Any] = []
    began = threading.Event()

    def ask() -> None:
        began.set()
        try:
            answers.append(container.image(num_inference_steps=150))
        except Exception as error:
            answers.append(error)

    request = threading.Thread(target=ask)
    request.start()
    began.wait()
    while not in_flight(container):
        if answers:
            container.fail(f"the request ended before the container was stopped: {answers}")
        time.sleep(0.02)
    status = container.stop()
    request.join(START_SECONDS)
    if not (answers and isinstance(answers[0], bytes) and answers[0].startswith(PNG)):
        container.fail(f"the request in flight was not answered: {answers}")
    if status != 0:
        container.fail(f"the server ended with status {status}")
    return status


def in_flight(container: Container) -> bool:
    with urllib.request.urlopen(f"{container.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    name = "stepweave_requests_in_flight"
    return any(line.startswith(name) and not line.endswith(" 0.0") for line in lines)


def refuses_to_compile(engine: Engine, tag: str) -> None:
    """The image without a compiler names the one that has it."""
    container = Container(engine, tag, "--env", "STEPWEAVE_COMPILE=true")
    try:
        wait(lambda: container.state()["Status"] != "running")
        log = engine.call("logs", container.name, capture_output=True)
        if "WITH_COMPILER=1" not in log.stdout + log.stderr:
            container.fail("STEPWEAVE_COMPILE was not refused with the name of the variant")
        print("STEPWEAVE_COMPILE is refused, and WITH_COMPILER=1 named")
    finally:
        container.remove()


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"image: the container still runs after {START_SECONDS:.0f} s")
        time.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.image", description=__doc__)
    parser.add_argument("--tag", default="stepweave", help="name of the image (%(default)s)")
    commands = parser.add_subparsers(required=True)
    builder = commands.add_parser("build", help="build the image")
    builder.add_argument(
        "options", nargs="*", help="more options of the build, such as --build-arg=NAME=VALUE"
    )
    builder.set_defaults(run=build)
    tester = commands.add_parser("test", help="run it read-only, make an image, drain it")
    tester.add_argument("--compiler", action="store_true", help="built with WITH_COMPILER=1")
    tester.set_defaults(run=test)
    chosen = parser.parse_args(arguments)
    chosen.run(chosen)


if __name__ == "__main__":
    main()
