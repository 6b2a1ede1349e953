"""Clients of other makers against the real server, in an environment of their own: their dependencies conflict with ours."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from typing import Any

import httpx
import pytest
from PIL import Image

import stepweave
from tests.conftest import ROOT, Served, clean_environment
from tests.waiting import SECONDS

PYTHON = ROOT / ".venv-clients" / "bin" / "python"


def run(script: str, *arguments: str) -> Any:
    """What a script of tests/clients finds."""
    if not PYTHON.exists():
        message = "NOT CHECKED: there is no .venv-clients; `make .venv-clients/stamp` makes it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    command = [str(PYTHON), str(ROOT / "tests" / "clients" / script), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=clean_environment())
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_their_environment_clients_are_not_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(sys.modules[__name__], "PYTHON", ROOT / "nowhere")
    with pytest.raises(outcome, match=r"NOT CHECKED: .* `make .venv-clients/stamp`"):
        run("triton.py")


def pixels(encoded: str) -> bytes:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (64, 64), "RGB")
        return picture.tobytes()


def ours(served: Served, **fields: Any) -> bytes:
    """The picture of the same request on the OpenAI route."""
    fields = {"num_inference_steps": 2, "reproducible": True, **fields}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=fields, timeout=SECONDS)
    return pixels(answer.json()["data"][0]["b64_json"])


def test_tritons_client_gets_the_pictures_of_its_seeds(served: Served) -> None:
    found = run("triton.py", f"127.0.0.1:{served.port}", "shapes")
    first, second = "a large red circle on a blue background", "ein grünes Dreieck auf weißem Grund"
    expected = [
        ours(served, prompt=first, seed=5, guidance_scale=3.5),
        ours(served, prompt=second, seed=6, guidance_scale=3.5),
    ]
    sync = found["sync"]
    assert (sync["live"], sync["ready"], sync["model_ready"]) == (True, True, [True, True, False, False])
    assert sync["metadata"] == {
        "name": "stepweave", "version": stepweave.__version__, "extensions": ["binary_tensor_data"],
    }  # fmt: skip
    assert sync["model_metadata"]["inputs"][0] == {"name": "prompt", "datatype": "BYTES", "shape": [-1]}
    for answer, identifier in (
        *((sync[kind], "42") for kind in ("binary", "json", "gzip", "deflate")),
        (found["async"]["binary"], "43"),
    ):
        assert answer["response"] == {"model_name": "shapes", "model_version": "1", "id": identifier}
        assert [pixels(image) for image in answer["images"]] == expected
        values = answer["parameters"]
        assert [(one["prompt"], one["seed"]) for one in values] == [(first, 5), (second, 6)]
        assert {(one["num_inference_steps"], one["guidance_scale"]) for one in values} == {(2, 3.5)}
    assert sync["only"] == ["parameters"]
    bad, unknown, version = sync["errors"]
    assert (bad[0], bad[1]["param"]) == ("400", "seed")
    assert (unknown[0], unknown[1]["code"], version[0]) == ("404", "model_not_found", "404")
    assert found["async"]["ready"] is True
    assert found["async"]["error"][0] == "404"


def test_kserves_client_gets_the_pictures_of_its_seeds(served: Served) -> None:
    found = run("kserve_rest.py", served.url, "shapes")
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, [True, False])
    expected = [
        ours(served, prompt="a large red circle on a blue background", seed=5),
        ours(served, prompt="a green triangle", seed=6),
    ]
    for answer in found["answers"]:
        assert (answer["id"], answer["model"]) == ("44", "shapes")
        assert [pixels(image) for image in answer["image"]] == expected
        assert [json.loads(one)["seed"] for one in answer["parameters"]] == [5, 6]
    status, message = found["error"]
    assert status == 404
    assert "There is no model 'nothing'; this server has 'shapes'." in message
