"""`stepweave doctor` and `stepweave models`: what they find, in words."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from stepweave.cli import doctor
from stepweave.cli.inspection import inspect_model
from stepweave.cli.main import main
from stepweave.config import EMBEDDED_MODEL
from tests.pipelines.parts import controlnet
from tests.support.environment import free_port
from tests.support.original_layout import save_as_one_file
from tests.support.served import Served
from tests.support.tiny import FAMILIES


def findings(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the findings by what they are about."""
    result = CliRunner().invoke(
        main, ["doctor", "--json", "--port", str(free_port()), "--device", "cpu", *arguments]
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, {line["about"]: line for line in lines}


def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"))


def test_nothing_is_wrong_with_the_embedded_model(tmp_path: Path) -> None:
    status, found = findings("--state-dir", str(tmp_path / "state"))
    assert status == 0, found
    assert {one["state"] for one in found.values()} == {"ok"}
    assert list(found) == [
        "versions", "port", "state directory", "device", "model", "memory", "component outlines"
    ]  # fmt: skip
    assert "StableDiffusion3Pipeline" in found["model"]["message"]
    assert not (tmp_path / "state").exists()  # it only looks


def test_the_memory_is_that_of_the_weights() -> None:
    files = set(EMBEDDED_MODEL.rglob("*.safetensors"))
    for beside in ("loras", "controlnet"):  # not the model's own
        files -= set((EMBEDDED_MODEL / beside).iterdir())
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    facts = inspect_model(EMBEDDED_MODEL)
    assert facts.numbers == sum(tensor.numel() for tensor in tensors) > 1_000_000


def test_a_port_in_use_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["doctor", "--port", port])
    assert result.exit_code == 1
    assert f"PROBLEM port: port {port} of 127.0.0.1 is in use" in result.output


def test_a_file_of_keys_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    status, found = findings("--api-keys-file", str(tmp_path / "none"))
    assert status == 1 and "STEPWEAVE_API_KEYS_FILE" in found["API keys"]["message"]


@pytest.mark.parametrize(
    ("place", "state", "message"),
    [
        ("nowhere", "problem", "nowhere' is no directory"),
        ("one.safetensors", "problem", "is a file; name the directory that it is in"),
        (".", "ok", "one"),
        ("empty", "warning", "none"),
    ],
)
def test_the_directory_of_loras_is_looked_at(
    place: str, state: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    status, found = findings("--loras", place)
    assert (found["loras"]["state"], status) == (state, int(state == "problem"))
    assert message in found["loras"]["message"]


def test_a_missing_file_of_the_model_is_a_problem(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    status, found = findings(str(folder))
    assert status == 1 and found["model"]["state"] == "problem"
    assert "vae/" in found["model"]["message"] and "memory" not in found


def test_a_damaged_file_of_the_model_is_a_problem(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    status, found = findings(str(folder))
    assert status == 1 and "damaged or cut off" in found["model"]["message"]


def test_a_model_that_is_not_downloaded_yet_is_said_to_be() -> None:
    status, found = findings("owner/name", "--revision", "0" * 40)
    assert status == 0 and found["model"]["state"] == "warning"
    assert "will be downloaded" in found["model"]["message"]


def test_a_device_that_is_not_there_is_a_problem() -> None:
    status, found = findings("--device", "cuda:7")
    assert status == 1 and "cuda:7" in found["device"]["message"]
    assert found["model"]["state"] == "ok"


def test_too_little_memory_is_a_problem_and_little_a_warning() -> None:
    needed = 4 * inspect_model(EMBEDDED_MODEL).numbers
    for available, state in ((needed - 1, "problem"), (needed + 1, "warning"), (2 * needed, "ok")):
        memory = SimpleNamespace(available=available)
        with patch.object(doctor.psutil, "virtual_memory", lambda memory=memory: memory):
            status, found = findings()
        assert (found["memory"]["state"], status) == (state, int(state == "problem"))


def test_a_state_directory_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, found = findings("--state-dir", str(tmp_path / "file" / "below"))
    assert status == 1 and "cannot be written to" in found["state directory"]["message"]


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    with patch.object(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000)):
        status, found = findings()
    assert status == 0 and found["state directory"]["state"] == "warning"


def test_packages_that_do_not_fit_are_named() -> None:
    needs = ["torch>=99", "no-such-package>=1", 'pytest>=99; extra == "dev"']
    with patch.object(doctor.importlib.metadata, "requires", lambda name: needs):
        status, found = findings()
    message = found["versions"]["message"]
    assert status == 1 and "torch>=99 is needed" in message
    assert "no-such-package is not installed" in message and "pytest" not in message


def test_models_at_hand_are_listed_with_what_speaks_against_them(tmp_path: Path) -> None:
    folder = model(tmp_path)
    broken = Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "models" / "broken"))
    (broken / "tokenizer" / "tokenizer.json").unlink()
    result = CliRunner().invoke(main, ["models", "--json", str(folder), str(tmp_path / "models")])
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["model"] for one in found] == ["shapes", str(folder), str(broken)]
    assert [one["problem"] is None for one in found] == [True, True, False]
    assert "tokenizer/" in found[2]["problem"]
    result = CliRunner().invoke(main, ["models", str(folder / "tokenizer")])
    assert result.exit_code == 1 and "has no pipeline" in result.output


def test_a_model_in_a_single_file_is_looked_at(tmp_path: Path) -> None:
    pipeline = FAMILIES["stable_diffusion"].build()
    pipeline.save_pretrained(tmp_path / "configs")
    folder = tmp_path / "files"
    folder.mkdir()
    file = save_as_one_file(pipeline, folder / "one.safetensors")
    status, found = findings(str(file))
    assert status == 1 and "set STEPWEAVE_CONFIG_FROM" in found["model"]["message"]
    status, found = findings(str(file), "--config-from", str(tmp_path / "configs"))
    assert status == 0 and found["model"]["message"].startswith("one: StableDiffusionPipeline, ")
    assert found["memory"]["state"] == "ok"
    save_file({"clip_l": torch.zeros(1, 4)}, folder / "two.safetensors")
    result = CliRunner().invoke(main, ["models", "--json", str(folder), str(file)])
    assert result.exit_code == 0, result.output
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    files = [str(file), str(folder / "two.safetensors"), str(file)]
    assert [entry["model"] for entry in entries] == ["shapes", *files]
    assert "is a textual inversion" in entries[2]["problem"]


def test_components_are_looked_at(tmp_path: Path) -> None:
    controlnet().save_pretrained(tmp_path / "canny")
    (tmp_path / "empty").mkdir()
    components = {
        "canny": str(tmp_path / "canny"),
        "empty": str(tmp_path / "empty"),
        "nowhere": "no/such",
        "remote": f"owner/name@{'a' * 40}",
    }
    status, found = findings("--components", json.dumps(components))
    assert status == 1
    states = {about: one["state"] for about, one in found.items() if one["state"] != "ok"}
    assert states == {
        "component empty": "problem",
        "component nowhere": "problem",
        "component remote": "warning",
    }
    assert "ControlNetModel" in found["component canny"]["message"]


def test_models_of_a_server_are_listed(served: Served) -> None:
    result = CliRunner().invoke(main, ["models", "--url", served.url])
    assert result.exit_code == 0, result.output
    first, *others = result.output.splitlines()
    assert re.fullmatch(r"shapes +StableDiffusion3Pipeline on .*", first)
    assert [line.split()[:4] for line in others] == [
        [f"shapes:{file.stem}", "LoRA", "for", "shapes,"]
        for file in sorted((EMBEDDED_MODEL / "loras").iterdir())
    ]
    nowhere = f"http://127.0.0.1:{free_port()}"
    result = CliRunner().invoke(main, ["models", "--url", nowhere])
    assert result.exit_code == 1 and f"{nowhere} cannot be reached" in result.output
