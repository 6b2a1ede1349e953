"""The project's folder, the environment of child processes, and free ports."""

from __future__ import annotations

import os
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without the project's settings, with threads that do not spin, and with
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
