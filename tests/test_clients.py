"""Clients of other makers against the real server, in an environment of their own: their dependencies conflict with ours."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import os
import subprocess
import sys
from typing import Any

import bentoml
import httpx
import pytest
from bentoml.exceptions import BentoMLException, InvalidArgument
from PIL import Image

import stepweave
from tests.conftest import ROOT, Served, clean_environment
from tests.waiting import SECONDS

PYTHON = ROOT / ".venv-clients" / "bin" / "python"


@functools.cache
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
    assert sync["metadata"]["name"] == "stepweave"
    assert sync["metadata"]["version"] == stepweave.__version__
    assert "binary_tensor_data" in sync["metadata"]["extensions"]
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
    lost = "There is no model 'nothing'; this server has 'shapes'."
    assert (bad[0], bad[2]) == ("400", f"[400] {bad[1]}")
    assert bad[1].startswith("seed is -1: ")
    assert unknown == ["404", lost, f"[404] {lost}"]
    assert version[1] == "There is no version '9' of 'shapes', only '1'."
    assert [pixels(image) for image in sync["columns"]["images"]] == expected
    assert "'more'" in sync["columns"]["parameters"][0]["warnings"][0]
    assert found["async"]["ready"] is True
    assert found["async"]["error"] == ["404", lost, f"[404] {lost}"]


def test_each_method_of_tritons_client_answers_or_says_why_not(served: Served) -> None:
    found = run("triton.py", f"127.0.0.1:{served.port}", "shapes")
    sync, others = found["sync"], dict(found["sync"]["others"])
    assert sync["not called"] == []
    ready = [{"name": "shapes", "version": "1", "state": "READY", "reason": ""}]
    assert others.pop("get_model_repository_index") == found["async"]["index"] == ready
    for name in ("get_model_config", "get_model_config version"):
        told = others.pop(name)
        assert (told["name"], told["max_batch_size"]) == ("shapes", 0)
        assert told["input"][0] == {"name": "prompt", "data_type": "TYPE_STRING", "dims": [-1], "optional": False}
    reasons = {
        "load_model": "explicit model load / unload is not allowed",
        "unload_model": "explicit model load / unload is not allowed",
        "get_inference_statistics": "GET /metrics",
        "get_trace_settings": "no tracing",
        "update_trace_settings": "no tracing",
        "get_log_settings": "the log",
        "update_log_settings": "the log",
        "async_infer": "There is no model 'nothing'",
    }
    for name, (status, text) in others.items():
        assert status in ("404", "405"), name
        assert reasons.get(name.partition(" ")[0], "no shared memory") in text, name
        assert text.startswith(f"[{status}] "), name


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
    (status, message), (wrong, why) = found["errors"]
    assert (status, wrong) == (404, 400)
    assert message.startswith("There is no model 'nothing'; this server has 'shapes'., '404 Not Found' for url")
    assert why.startswith("Tensor 'seed': it is given as an input and as a parameter., '400 Bad Request' for url")


ASKED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a star", "size": "65x65"}, "size is '65x65'"),
    ({"prompt": "ein Stern", "scheduler": "größer"}, "scheduler is 'größer'"),
    ({"prompt": "", "seed": 1}, "prompt is ''"),
]


@pytest.mark.parametrize(("fields", "told"), ASKED)
def test_bentomls_clients_raise_what_the_server_says(served: Served, fields: dict[str, Any], told: str) -> None:
    errors: list[BentoMLException] = []
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    with bentoml.SyncHTTPClient(served.url, timeout=SECONDS) as client:
        for call in (
            lambda: client.generate(**fields),
            lambda: next(client.generate_stream(**fields)),
            lambda: client.edit(image=Image.open(file), **fields),
        ):
            with pytest.raises(BentoMLException) as caught:
                call()
            errors.append(caught.value)

    async def use() -> None:
        async with bentoml.AsyncHTTPClient(served.url, timeout=SECONDS) as client:
            with pytest.raises(BentoMLException) as caught:
                await client.generate(**fields)
            errors.append(caught.value)
            with pytest.raises(BentoMLException) as caught:
                await anext(client.generate_stream(**fields))
            errors.append(caught.value)

    asyncio.run(use())
    for error in errors:
        assert (type(error), error.error_code) == (InvalidArgument, 400)
        assert told in str(error) or "prompt is missing" in str(error), str(error)
        assert json.loads(str(error))["error"]["param"] in fields
