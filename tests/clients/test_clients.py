"""Clients of other makers against the real server, in an environment of their own: their
dependencies conflict with ours."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import bentoml
import httpx
import pytest
from bentoml.exceptions import BentoMLException, InvalidArgument
from PIL import Image

import stepweave
from stepweave.config import EMBEDDED_MODEL
from tests.support.environment import ROOT, clean_environment
from tests.support.in_process import InProcess, listening
from tests.support.served import Served
from tests.support.waiting import SECONDS
from tools.shapes.checker import look

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
NODE = ROOT / ".venv-node"  # where npm has installed what tests/clients/node asks for
PROMPT = "a large red circle on a blue background"


def not_checked(what: str) -> NoReturn:
    """Where a client is not there: a failure in CI, else a reason that says what to do."""
    message = f"NOT CHECKED: there is no {what}; `make {what}/stamp` makes it"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@functools.cache
def run(script: str, *arguments: str) -> Any:
    """What a script of tests/clients finds."""
    if not PYTHON.exists():
        not_checked(".venv-clients")
    return found_by([str(PYTHON), str(ROOT / "tests" / "clients" / script), *arguments])


def run_on_node(script: str, *arguments: str) -> Any:
    """What a script of tests/clients/node finds: Node looks for its packages where it is
    started."""
    if shutil.which("node") is None or not (NODE / "node_modules").exists():
        not_checked(".venv-node")
    with (ROOT / "tests" / "clients" / "node" / script).open("rb") as source:
        return found_by(["node", "--input-type=module", "-", *arguments], cwd=NODE, stdin=source)


def found_by(command: list[str], **options: Any) -> Any:
    done = subprocess.run(
        command, capture_output=True, timeout=SECONDS, env=clean_environment(), **options
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_without_their_environment_clients_are_not_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(sys.modules[__name__], "PYTHON", ROOT / "nowhere")
    monkeypatch.setattr(sys.modules[__name__], "NODE", ROOT / "nowhere")
    with pytest.raises(outcome, match=r"NOT CHECKED: .* `make .venv-clients/stamp`"):
        run("triton.py")
    with pytest.raises(outcome, match=r"NOT CHECKED: .* `make .venv-node/stamp`"):
        run_on_node("images.mjs")


def pixels(encoded: str) -> bytes:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
        return image.tobytes()


def ours(served: Served, **fields: Any) -> bytes:
    """The image of the same request on the OpenAI route."""
    fields = {"num_inference_steps": 2, "reproducible": True, **fields}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=fields, timeout=SECONDS)
    return pixels(answer.json()["data"][0]["b64_json"])


def test_tritons_client_gets_the_images_of_its_seeds(served: Served) -> None:
    found = run("triton.py", f"127.0.0.1:{served.port}", "shapes")
    first, second = "a large red circle on a blue background", "ein grünes Dreieck auf weißem Grund"
    expected = [
        ours(served, prompt=first, seed=5, guidance_scale=3.5),
        ours(served, prompt=second, seed=6, guidance_scale=3.5),
    ]
    sync = found["sync"]
    assert (sync["live"], sync["ready"], sync["model_ready"]) == (
        True,
        True,
        [True, True, False, False],
    )
    assert sync["metadata"]["name"] == "stepweave"
    assert sync["metadata"]["version"] == stepweave.__version__
    assert "binary_tensor_data" in sync["metadata"]["extensions"]
    assert sync["model_metadata"]["inputs"][0] == {
        "name": "prompt",
        "datatype": "BYTES",
        "shape": [-1],
    }
    for answer, identifier in (
        *((sync[kind], "42") for kind in ("binary", "json", "gzip", "deflate")),
        (found["async"]["binary"], "43"),
    ):
        assert answer["response"] == {
            "model_name": "shapes",
            "model_version": "1",
            "id": identifier,
        }
        assert [pixels(image) for image in answer["images"]] == expected
        values = answer["parameters"]
        assert [(one["prompt"], one["seed"]) for one in values] == [(first, 5), (second, 6)]
        assert {(one["num_inference_steps"], one["guidance_scale"]) for one in values} == {(2, 3.5)}
    assert sync["only"] == ["parameters"]
    bad, unknown, version = sync["errors"]
    named = "STEPWEAVE_MODEL_NAMES sets the accepted names (* for any)."
    lost = f"There is no model 'nothing'; this server has 'shapes'. {named}"
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
        assert told["input"][0] == {
            "name": "prompt",
            "data_type": "TYPE_STRING",
            "dims": [-1],
            "optional": True,  # its embeddings may come instead
        }
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


def test_kserves_client_gets_the_images_of_its_seeds(served: Served) -> None:
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
    assert message.startswith("There is no model 'nothing'; this server has 'shapes'.")
    assert ", '404 Not Found' for url" in message
    assert why.startswith(
        "Tensor 'seed': it is given as an input and as a parameter., '400 Bad Request' for url"
    )


ASKED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a star", "size": "65x65"}, "size is '65x65'"),
    ({"prompt": "ein Stern", "scheduler": "größer"}, "scheduler is 'größer'"),
    ({"prompt": "", "seed": 1}, "prompt is ''"),
]


@pytest.mark.parametrize(("fields", "told"), ASKED)
def test_bentomls_clients_raise_what_the_server_says(
    served: Served, fields: dict[str, Any], told: str
) -> None:
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


def test_bentomls_clients_send_what_guides_a_controlnet(served: Served) -> None:
    outline = EMBEDDED_MODEL / "outline.png"
    url = f"data:image/png;base64,{base64.b64encode(outline.read_bytes()).decode()}"
    common = {"prompt": "yellow on a purple background", "controlnet": "outlines", "seed": 4}
    with bentoml.SyncHTTPClient(served.url, timeout=SECONDS) as client:
        made = [
            client.edit(control_image=outline, **common),
            client.edit(control_image=Image.open(io.BytesIO(outline.read_bytes())), **common),
            client.generate(control_image=url, **common),
        ]
        events = "".join(client.generate_stream(control_image=url, **common))
    for image in (*made, Image.open(io.BytesIO(base64.b64decode(_last_image(events))))):
        seen = look(image)
        assert (seen.shape, seen.horizontal, seen.vertical) == ("star", "left", "top"), seen


def _last_image(events: str) -> str:
    lines = [line for line in events.splitlines() if line.startswith("data: {")]
    return str(json.loads(lines[-1].removeprefix("data: "))["b64_json"])


@pytest.fixture
def source(tmp_path: Path) -> str:
    """The path of an image to be edited."""
    Image.new("RGB", (64, 64), (40, 60, 220)).save(tmp_path / "source.png")
    return str(tmp_path / "source.png")


@pytest.mark.full
def test_litellm_reads_generations_and_edits(served: Served, source: str) -> None:
    found = run("lite_llm.py", served.url, source)
    images = [pixels(one["b64_json"]) for one in found["generation"]["images"]]
    assert images == [ours(served, prompt=PROMPT, seed=seed) for seed in (5, 6)]
    usage = found["generation"]["usage"]
    assert (usage["output_tokens"], usage["total_tokens"]) == (
        2 * 64,
        usage["input_tokens"] + 2 * 64,
    )
    assert usage["input_tokens_details"] == {
        "image_tokens": 0,
        "text_tokens": usage["input_tokens"],
    }
    assert [len(pixels(one["b64_json"])) for one in found["edit"]["images"]] == [3 * 64 * 64]
    assert found["edit"]["usage"]["input_tokens_details"]["image_tokens"] == 64
    assert found["generation"]["size"] == found["edit"]["size"] == "64x64"
    (bad, limit), (unknown, names) = found["errors"]
    assert (bad, unknown) == ("BadRequestError", "NotFoundError")
    assert "n is 99; the limit is 8." in limit and "STEPWEAVE_MODEL_NAMES" in names


def test_langchains_wrapper_gets_the_url_that_it_expects(
    in_process: Callable[..., InProcess],
) -> None:
    """It has `dall-e-3` wired in, and does not say that it wants URLs."""
    with listening(in_process(model_names="*", response_format="url")) as url:
        image = httpx.get(run("langchain_dalle.py", url), timeout=SECONDS)
    assert (image.status_code, image.headers["content-type"]) == (200, "image/png")


@pytest.mark.full
def test_openais_client_for_node(served: Served, source: str, tmp_path: Path) -> None:
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    found = run_on_node("images.mjs", served.url, source, str(tmp_path / "mask.png"))
    images = [pixels(one["b64_json"]) for one in found["generation"]["images"]]
    assert images == [
        ours(served, prompt=PROMPT, seed=seed, num_inference_steps=4) for seed in (5, 6)
    ]
    linked = httpx.get(found["url"]["images"][0]["url"], timeout=SECONDS)
    assert pixels(base64.b64encode(linked.content).decode()) == images[0]
    assert (
        found["edit"]["usage"]["input_tokens_details"]["image_tokens"]
        == found["edit"]["usage"]["output_tokens"]
        == 64
    )
    assert [len(pixels(one["b64_json"])) for one in found["edit"]["images"]] == [3 * 64 * 64]
    for name, kind, previews in (
        ("stream", "image_generation", 2),
        ("edit_stream", "image_edit", 1),
    ):
        assert [event["type"] for event in found[name]] == [f"{kind}.partial_image"] * previews + [
            f"{kind}.completed"
        ]
        assert {(event["size"], event["quality"]) for event in found[name]} == {("64x64", "auto")}
        assert found[name][-1]["usage"]["output_tokens"] == 64
    assert found["models"] == ["shapes", "shapes:moon", "shapes:pastel"]
    told = [
        (error["name"], error["status"], error["code"], error["param"]) for error in found["errors"]
    ]
    assert told == [
        ("BadRequestError", 400, "invalid_value", "n"),
        ("NotFoundError", 404, "model_not_found", "model"),
        ("BadRequestError", 400, "invalid_value", "image"),
        ("BadRequestError", 400, "unsupported", None),
    ]
