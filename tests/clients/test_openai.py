"""OpenAI's own client, curl and BentoML's clients against the real server: what they document works
unchanged."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import httpx
import numpy as np
import openai
import pytest
from PIL import Image, ImageDraw

from tests.support.environment import ROOT
from tests.support.served import Served
from tests.support.waiting import SECONDS
from tools.shapes.checker import wrong_parts

PROMPT = "a large red circle on a blue background"


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def image_of(data: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def likeness(one: Image.Image, other: Image.Image) -> float:
    """Pearson's correlation of the pixels."""
    first, second = (
        np.asarray(image.convert("RGB").resize((64, 64)), dtype=float).ravel()
        for image in (one, other)
    )
    return float(np.corrcoef(first, second)[0, 1])


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red circle on a blue ground, to be edited."""
    image = Image.new("RGB", (64, 64), (40, 60, 220))
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill=(220, 30, 40))
    path = tmp_path_factory.mktemp("drawing") / "drawing.png"
    image.save(path)
    return path


def test_generate_with_every_field_of_the_client(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt=PROMPT,
        model="shapes",
        n=2,
        size="64x64",
        quality="hd",
        style="natural",
        background="opaque",
        moderation="low",
        user="someone",
        output_format="webp",
        output_compression=80,
        response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 12},
    )
    assert answer.data is not None
    assert [item.seed for item in answer.data] == [7, 8]  # type: ignore[attr-defined]
    images = [image_of(item.b64_json or "") for item in answer.data]
    assert all(image.format == "WEBP" for image in images)
    assert wrong_parts(images[0], PROMPT) == []
    warnings: list[str] = answer.warnings  # type: ignore[attr-defined]
    assert [warning.split(":")[0] for warning in warnings] == [
        "quality",
        "style",
        "background",
        "moderation",
        "user",
    ]


def test_a_url_is_served_by_the_server_that_gave_it(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 7})
    assert answer.data is not None and answer.data[0].url is not None
    response = httpx.get(answer.data[0].url, timeout=SECONDS)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["cache-control"].startswith("private")
    assert wrong_parts(image_of(response.content), PROMPT) == []


def test_a_stream_with_previews_of_what_is_to_come(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    images = [image_of(event.b64_json) for event in events]
    assert {image.size for image in images} == {(64, 64)}
    assert wrong_parts(images[-1], PROMPT) == []
    assert likeness(images[2], images[3]) > 0.8
    whole = client.images.generate(prompt=PROMPT, extra_body={"seed": 7}).data
    assert whole is not None
    assert likeness(image_of(whole[0].b64_json or ""), images[-1]) > 0.999


def test_an_edit_keeps_what_the_mask_leaves_out(client: openai.OpenAI, drawing: Path) -> None:
    before = image_of(drawing.read_bytes()).convert("RGB")
    edited = client.images.edit(
        image=drawing, prompt=PROMPT, extra_body={"seed": 3, "strength": 0.2}, output_format="png"
    )
    assert edited.data is not None
    assert likeness(image_of(edited.data[0].b64_json or ""), before) > 0.9
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 63), fill=255)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    half = client.images.edit(
        image=drawing, mask=("mask.png", buffer.getvalue(), "image/png"),
        prompt="a small green star on a yellow background", extra_body={"seed": 3, "strength": 1.0},
    )  # fmt: skip
    assert half.data is not None
    after = image_of(half.data[0].b64_json or "").convert("RGB")
    change = np.abs(np.asarray(after, dtype=float) - np.asarray(before, dtype=float)).mean(
        axis=(0, 2)
    )
    assert change[:28].mean() > 5 * change[36:].mean()


def test_an_edit_as_a_stream(client: openai.OpenAI, drawing: Path) -> None:
    with client.images.edit(
        image=drawing, prompt=PROMPT, stream=True, partial_images=1, extra_body={"strength": 0.5}
    ) as stream:
        events = [event.type for event in stream]
    assert events == ["image_edit.partial_image", "image_edit.completed"]


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, drawing: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="the limit is 8") as caught:
        client.images.generate(prompt=PROMPT, n=9, stream=True)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="strength") as caught:
        client.images.edit(image=drawing, prompt=PROMPT, extra_body={"strength": 2})
    with pytest.raises(openai.BadRequestError, match="image") as caught:
        client.images.edit(image=("x.png", b"no image", "image/png"), prompt=PROMPT)
    assert caught.value.param == "image"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, model="other")


def test_an_error_in_a_stream_is_raised_by_the_client(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, extra_body={"num_inference_steps": 200, "n": 8, "events": "all"}
    )
    ids = []
    with pytest.raises(openai.APIError, match="cancelled"):
        for event in stream:
            if not ids:
                ids.append(event.id)  # type: ignore[union-attr]
                httpx.delete(
                    f"{str(client.base_url).removesuffix('/')}/jobs/{ids[0]}", timeout=SECONDS
                ).raise_for_status()


def test_the_blocks_of_the_document_run_in_order(served: Served, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    expected = "bash bash python bash bash bash bash bash bash python bash python bash bash"
    assert [language for language, _ in blocks] == expected.split()
    told = []
    for language, block in blocks:
        command = (
            ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        )
        block = block.replace("http://localhost:3000", served.url).replace(
            "localhost:3000", served.url
        )
        for before in ('"', "@"):
            block = block.replace(f"{before}models/shapes", f"{before}{ROOT}/models/shapes")
        run = subprocess.run(
            [*command, block], cwd=tmp_path, check=True, capture_output=True, timeout=SECONDS
        )
        told.append(run.stdout.decode())
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert [item["seed"] for item in answer["data"]] == [7, 8]
    assert image_of((tmp_path / "edited.png").read_bytes()).size == (64, 64)
    for name in ("star.png", "edited-too.png"):
        content = (tmp_path / name).read_bytes()
        assert image_of(content).size == (64, 64), content[:300]
    embedded = image_of((tmp_path / "embedded.png").read_bytes())
    assert likeness(embedded, image_of((tmp_path / "circle.png").read_bytes())) > 0.999
    guided = image_of((tmp_path / "guided.png").read_bytes())
    assert wrong_parts(guided, "a yellow star on a purple background, top left") == []
    moon = image_of((tmp_path / "moon.png").read_bytes())
    assert set(wrong_parts(moon, "a large yellow moon on a blue background")) <= {"colour"}
    pale = image_of((tmp_path / "pale.png").read_bytes())
    assert wrong_parts(pale, "a large yellow circle on a blue background", "pastel") == []
    assert told[8].count("partial_image") == 2 and "stepweave.queued" in told[8]
    assert told[9].startswith(("202 queued", "202 running")) and "succeeded 20 20" in told[9]
    assert json.loads(told[10])["state"] in ("queued", "running")
    tensors = json.loads((tmp_path / "tensors.json").read_text())
    assert [(one["name"], one["shape"]) for one in tensors["outputs"]] == [
        ("image", [1]),
        ("parameters", [1]),
    ]
    assert image_of((tmp_path / "circle.png").read_bytes()).size == (64, 64)


def curl(*arguments: str) -> bytes:
    return subprocess.run(
        ["curl", "-sSN", "--fail-with-body", *arguments], check=True, capture_output=True
    ).stdout


# what a server without keys and stored jobs answers to the commands of `GET /`, if not 200
REFUSED = {
    "POST /v1/images/variations": 400,
    "GET /v1/jobs": 404,
    "POST /v1/loras": 404,
    "POST /drain": 404,
    "DELETE /drain": 404,
}


def test_the_commands_that_the_root_lists_work(served: Served, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "image.png")
    routes = httpx.get(served.url, timeout=SECONDS).json()["routes"]
    statuses = {}
    for route in routes:
        for method, command in zip(route["methods"], route["curl"], strict=True):
            words = shlex.split(command)
            if "{" not in route["path"]:
                words += ["-w", "\n%{http_code}"]
                told = subprocess.run(words, check=True, capture_output=True, cwd=tmp_path).stdout
                statuses[f"{method} {route['path']}"] = int(told.rpartition(b"\n")[2])
    assert len(statuses) > 20
    assert statuses == dict.fromkeys(statuses, 200) | REFUSED
    with Image.open(tmp_path / "answer.png") as image:
        image.load()


def test_curl_reads_events_and_saves_images(served: Served, drawing: Path) -> None:
    url, body = f"{served.url}/v1/images/generations", json.dumps({"prompt": PROMPT, "seed": 7})
    json_type = ("-H", "Content-Type: application/json")
    told = curl(
        url, *json_type, "-d", body, "-H", "Accept: text/event-stream; profile=stepweave"
    ).decode()
    names = [
        line.removeprefix("event: ") for line in told.splitlines() if line.startswith("event: ")
    ]
    assert names[0] == "stepweave.queued" and names[-1] == "image_generation.completed"
    steps = [
        json.loads(line[6:])
        for line in told.splitlines()
        if '"stepweave.progress"' in line and line[:5] == "data:"
    ]
    assert steps[-1]["step"] == steps[-1]["total_steps"] == 20
    for accept, kind in (("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")):
        image = image_of(curl(url, *json_type, "-d", body, "-H", f"Accept: {accept}"))
        assert image.format == kind
        assert wrong_parts(image, PROMPT) == []
    edited = curl(
        f"{served.url}/edit",
        "-F",
        f"image=@{drawing}",
        "-F",
        f"prompt={PROMPT}",
        "-F",
        "strength=0.2",
    )
    assert likeness(image_of(edited), image_of(drawing.read_bytes())) > 0.9


def test_bentomls_client_streams_and_edits(served: Served, drawing: Path) -> None:
    with bentoml.SyncHTTPClient(served.url, timeout=SECONDS) as client:
        told = "".join(client.generate_stream(prompt=PROMPT, partial_images=2, events="all"))
        assert told.count("event: image_generation.partial_image") == 2
        assert told.count("event: image_generation.completed") == 1
        edited = client.edit(prompt=PROMPT, image=image_of(drawing.read_bytes()), strength=0.2)
        assert likeness(edited, image_of(drawing.read_bytes())) > 0.9


def test_bentomls_asynchronous_client(served: Served, drawing: Path) -> None:
    image = image_of(drawing.read_bytes())

    async def use() -> tuple[Any, str, Any]:
        async with bentoml.AsyncHTTPClient(served.url, timeout=SECONDS) as client:
            made = await client.generate(prompt=PROMPT, seed=7)
            told = [chunk async for chunk in client.generate_stream(prompt=PROMPT)]
            edited = await client.edit(prompt=PROMPT, image=image, strength=0.2)
            return made.copy(), "".join(told), edited.copy()

    made, told, edited = asyncio.run(use())
    assert wrong_parts(made, PROMPT) == []
    assert told.startswith("event: image_generation.completed")
    assert likeness(edited, image_of(drawing.read_bytes())) > 0.9


def test_nothing_that_a_client_sends_is_fetched(served: Served) -> None:
    """BentoML downloads what a form names as a URL: the middleware lets no such form pass."""
    fields: dict[str, Any] = {
        "prompt": (None, PROMPT),
        "image": (None, f"{served.url}/images/x.png"),
    }
    response = httpx.post(f"{served.url}/edit", files=fields, timeout=SECONDS)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "image"
