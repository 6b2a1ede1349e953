"""The embedded model's ControlNet: its size, its training, and its images over HTTP."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel
from PIL import Image
from safetensors.torch import load_file

from stepweave.config import EMBEDDED_MODEL
from tests.support.served import Served
from tests.support.training import check_resumes
from tests.support.waiting import SECONDS
from tools.shapes import evaluate, evaluate_controlnet
from tools.shapes.checker import look
from tools.shapes.networks import make_controlnet
from tools.shapes.scenes import draw_outline

FOLDER = EMBEDDED_MODEL / "controlnet"


def test_it_is_small_and_in_half_precision() -> None:
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 5_000_000
    tensors = load_file(FOLDER / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_it_is_of_the_class_that_is_trained() -> None:
    made = make_controlnet(evaluate.load(EMBEDDED_MODEL).transformer)
    loaded = SD3ControlNetModel.from_pretrained(FOLDER)
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in loaded.state_dict().items()
    }


def test_the_card_holds_the_evaluation() -> None:
    card = (EMBEDDED_MODEL / "README.md").read_text()
    begin = f"<!-- {evaluate_controlnet.SECTION} -->"
    table = card.partition(begin)[2].partition("<!-- end -->")[0]
    assert "200 random outlines" in table and "| `outlines` |" in table
    assert "](controlnet.png)" in card and (EMBEDDED_MODEL / "controlnet.png").is_file()


def test_outlines_are_the_contours_of_the_shapes() -> None:
    """White lines on black, nowhere outside of the shape, and around all of it."""
    for scene in evaluate_controlnet.sample(30, seed=5):
        outline = draw_outline(scene)
        assert outline.shape == (64, 64, 3) and set(outline[0, 0]) == {0}
        rows, columns = np.nonzero(outline[..., 0] > 100)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        left, top, right, bottom = box
        x, y = scene.centre
        assert abs((left + right) / 2 - x) < 3 and abs((top + bottom) / 2 - y) < 3
        assert (outline[..., 0] > 100).mean() < 0.5 * (right - left) * (bottom - top) / 64**2


def test_boxes_overlap_by_their_shared_part() -> None:
    assert evaluate_controlnet.overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1.0
    assert evaluate_controlnet.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert evaluate_controlnet.overlap((0, 0, 2, 2), (2, 2, 4, 4)) == 0.0


def test_requests_with_an_outline_obey_it(served: Served) -> None:
    for size in (64, 256):  # pixels of the outline's side; it is scaled
        outline = Image.open(EMBEDDED_MODEL / "outline.png").resize((size, size))
        outline.save(file := io.BytesIO(), "PNG")
        answer = httpx.post(
            f"{served.url}/v1/images/edits",
            files={"control_image": ("outline.png", file.getvalue())},
            data={"controlnet": "outlines", "prompt": "yellow on a purple background", "seed": "4"},
            headers={"Accept": "image/png"},
            timeout=SECONDS,
        )
        assert answer.status_code == 200, answer.text
        seen = look(Image.open(io.BytesIO(answer.content)))
        assert (seen.shape, seen.horizontal, seen.vertical) == ("star", "left", "top"), seen


def transparent(outline: Image.Image) -> bytes:
    """An outline as drawing programs save it: white on nothing."""
    lines = Image.new("RGBA", outline.size, "white")
    lines.putalpha(outline.convert("L"))
    lines.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_an_outline_on_nothing_is_one_on_black(served: Served) -> None:
    outline = transparent(Image.open(EMBEDDED_MODEL / "outline.png"))
    common = {"controlnet": "outlines", "prompt": "yellow on a purple background"}
    url = f"data:image/png;base64,{base64.b64encode(outline).decode()}"
    for answer in (
        httpx.post(
            f"{served.url}/v1/images/edits",
            files={"control_image": ("outline.png", outline)},
            data={**common, "seed": "4"},
            headers={"Accept": "image/png"},
            timeout=SECONDS,
        ),
        httpx.post(
            f"{served.url}/generate",
            json={**common, "seed": 4, "control_image": url},
            timeout=SECONDS,
        ),
    ):
        assert answer.status_code == 200, answer.text
        told = {name.removeprefix("x-stepweave-"): text for name, text in answer.headers.items()}
        assert (told["controlnet"], told["controlnet-conditioning-scale"]) == ("outlines", "1")
        text = Image.open(io.BytesIO(answer.content)).info["parameters"]
        assert 'ControlNet 0: "Module: none, Model: outlines, Weight: 1"' in text
        seen = look(Image.open(io.BytesIO(answer.content)))
        assert (seen.shape, seen.horizontal, seen.vertical) == ("star", "left", "top"), seen


def test_a_request_without_its_outline_is_told_where_to_send_it(served: Served) -> None:
    common = {"controlnet": "outlines", "prompt": "yellow on a purple background"}
    outline = (EMBEDDED_MODEL / "outline.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(outline).decode()}"
    files = [
        {"other": (None, b"")},  # a form all the same
        {"control_image": ("outline.png", b"")},
        {"control_image": ("", b"")},
    ]
    with httpx.Client(base_url=served.url, timeout=SECONDS) as client:
        without = [
            *(
                client.post(path, data=common, files=each)
                for path in ("/v1/images/edits", "/edit")
                for each in files
            ),
            *(
                client.post(path, json=common)
                for path in ("/v1/images/edits", "/edit", "/v1/images/generations", "/generate")
            ),
        ]
        edited = [
            client.post("/v1/images/edits", data=common, files={"image": ("outline.png", sent)})
            for sent in (outline, transparent(Image.open(io.BytesIO(outline))))
        ]
        edited.append(client.post("/generate", json={**common, "image": url}))
    for answer in without:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "missing_field"), answer.text
        assert error["param"] == "control_image"
        assert error["message"].startswith("control_image is missing"), error
    for answer in edited:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "controlnet"), answer.text
        assert error["message"].endswith("send the image that guides it as control_image alone.")


def test_it_is_listed(served: Served) -> None:
    (model, *_) = httpx.get(f"{served.url}/v1/models", timeout=SECONDS).json()["data"]
    (one,) = model["stepweave"]["components"]
    assert (one["name"], one["field"], one["image"]) == ("outlines", "controlnet", "control_image")
    assert "outline" in one["description"]
    arguments = {one["name"]: one["description"] for one in model["stepweave"]["arguments"]}
    assert arguments["controlnet"].endswith("white on black."), "not with two full stops"


@pytest.mark.full
def test_outlines_are_obeyed_in_the_evaluation() -> None:
    scenes = evaluate_controlnet.sample(200, seed=21)
    plain = evaluate.load(EMBEDDED_MODEL)
    without = evaluate_controlnet.generate(plain, scenes, controlled=False)
    guided = evaluate_controlnet.with_controlnet(plain, FOLDER)
    images = evaluate_controlnet.generate(guided, scenes, controlled=True)
    assert evaluate_controlnet.score(images, scenes).both >= 90
    assert evaluate_controlnet.score(without, scenes).both <= 40


@pytest.mark.full
def test_training_resumes_where_it_stood(tmp_path: Path) -> None:
    check_resumes(tmp_path, "train_controlnet", file="diffusion_pytorch_model.safetensors")
