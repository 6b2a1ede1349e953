"""`compose.yaml`: the server with Prometheus and Grafana."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.environment import ROOT

COMPOSE = ROOT / "compose.yaml"


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def mounted(service: dict[str, Any]) -> dict[str, Path]:
    """The files that a service mounts, by their place in it."""
    pairs = (entry.split(":") for entry in service.get("volumes", ()))
    return {pair[1]: ROOT / pair[0] for pair in pairs if pair[0].startswith("./")}


def test_files_that_are_mounted_exist_and_ports_are_of_this_machine() -> None:
    ports = [port for service in services().values() for port in service["ports"]]
    assert len(ports) == len(set(ports)) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    files = [file for service in services().values() for file in mounted(service).values()]
    assert files and all(file.is_file() for file in files), files
    named = yaml.safe_load(COMPOSE.read_text())["volumes"]
    for service in services().values():
        for entry in service.get("volumes", ()):
            assert entry.startswith("./") or entry.partition(":")[0] in named


def test_the_server_has_no_more_rights_than_in_a_pod() -> None:
    server = services()["stepweave"]
    assert server["read_only"] is True and server["cap_drop"] == ["ALL"]
    writable = {entry.partition(":")[2] for entry in server["volumes"]} | {
        entry.partition(":")[0] for entry in server["tmpfs"]
    }
    image = (ROOT / "Dockerfile").read_text()
    (volumes,) = re.findall(r"^VOLUME (.*)$", image, re.MULTILINE)
    assert writable == set(json.loads(volumes))


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus() -> None:
    prometheus = mounted(services()["prometheus"])["/etc/prometheus/prometheus.yml"]
    (job,) = yaml.safe_load(prometheus.read_text())["scrape_configs"]
    (group,) = job["static_configs"]
    assert group["targets"] == ["stepweave:3000"]
    grafana = mounted(services()["grafana"])
    (source,) = yaml.safe_load(
        grafana["/etc/grafana/provisioning/datasources/stepweave.yaml"].read_text()
    )["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["isDefault"] is True
    (provider,) = yaml.safe_load(
        grafana["/etc/grafana/provisioning/dashboards/stepweave.yaml"].read_text()
    )["providers"]
    folder = provider["options"]["path"]
    assert any(place.startswith(f"{folder}/") for place in grafana)


def has_compose() -> bool:
    command = ["docker", "compose", "version"]
    return (
        bool(shutil.which("docker")) and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.mark.skipif(not has_compose(), reason="no Docker with compose")
def test_compose_accepts_the_file() -> None:
    command = ["docker", "compose", "--file", str(COMPOSE), "config", "--quiet"]
    assert subprocess.run(command).returncode == 0
