"""Runs a Prometheus on this machine, for tests and for drawing the dashboard."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

SECONDS = 300.0  # timeout


class NoPrometheusError(Exception):
    """Prometheus is not installed and could not be downloaded."""


def binaries() -> dict[str, str]:
    """Paths of `prometheus` and `promtool`: the installed ones, else unpacked from Debian's
    package. Raises NoPrometheusError."""
    paths = {name: shutil.which(name) for name in ("prometheus", "promtool")}
    if not all(paths.values()):
        script = Path(__file__).with_name("install-prometheus")
        ended = subprocess.run([script], capture_output=True, text=True, timeout=SECONDS)
        if ended.returncode:
            raise NoPrometheusError(ended.stderr.strip())
        paths = {name: str(Path(ended.stdout.strip()) / name) for name in paths}
    return {name: path for name, path in paths.items() if path}


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an API answer. Raises ValueError if the expression is invalid."""
        answer = httpx.get(
            f"{self.url}/api/v1/{path}", params=parameters, timeout=SECONDS, trust_env=False
        ).json()
        if answer["status"] != "success":
            raise ValueError(f"{parameters}: {answer}")
        return answer["data"]

    def values(self, expr: str) -> list[float]:
        """The current values of an expression."""
        return [float(sample["value"][1]) for sample in self.get("query", query=expr)["result"]]

    def wait_for(self, expr: str) -> None:
        """Wait until an expression has a result. Raises TimeoutError."""
        deadline = time.monotonic() + SECONDS
        while not self.values(expr):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still empty: {expr}")
            time.sleep(0.25)


@contextlib.contextmanager
def run(
    program: str,
    folder: Path,
    port: int,
    scrape: Sequence[Mapping[str, Any]],
    rules: Sequence[Path] = (),
) -> Iterator[Prometheus]:
    """Run `program` on a port, with data in a folder, until the context ends; it scrapes every
    second.

    `scrape` are the configuration's `scrape_configs`, `rules` files with rules. Raises RuntimeError
    if it does not start.
    """
    config = folder / "prometheus.yaml"
    config.write_text(
        json.dumps(  # which is YAML
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(path) for path in rules],
                "scrape_configs": list(scrape),
            }
        )
    )
    address, log = f"127.0.0.1:{port}", folder / "prometheus.log"
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"GOMAXPROCS": "1"}
        )
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus does not start: {log.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                if (
                    httpx.get(
                        f"http://{address}/-/ready", timeout=SECONDS, trust_env=False
                    ).status_code
                    == 200
                ):
                    break
            time.sleep(0.1)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
