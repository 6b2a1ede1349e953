"""The embedded model's LoRAs: their size, their training, the checker's view of their styles, and
their images over HTTP."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from stepweave.config import EMBEDDED_MODEL
from tests.support.served import Served
from tests.support.training import check_resumes
from tests.support.waiting import SECONDS
from tools.shapes import evaluate, evaluate_loras
from tools.shapes.checker import look, name_pastel, wrong_parts
from tools.shapes.evaluate_loras import LORAS
from tools.shapes.scenes import canonical_prompt, draw, sample_scene
from tools.shapes.train_loras import STYLES

FOLDER = EMBEDDED_MODEL / "loras"
PROMPT = "a large red star on a blue background"
MOON = "a large yellow moon on a blue background"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return evaluate_loras.load(EMBEDDED_MODEL)


def generate(served: Served, **fields: Any) -> tuple[Image.Image, bytes]:
    """The image of a request, and its file."""
    answer = httpx.post(
        f"{served.url}/v1/images/generations",
        json={"prompt": PROMPT, "seed": 7, **fields},
        timeout=SECONDS,
    )
    assert answer.status_code == 200, answer.text
    file = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return Image.open(io.BytesIO(file)).convert("RGB"), file


def test_they_are_small_and_in_half_precision() -> None:
    files = sorted(FOLDER.iterdir())
    assert [file.name for file in files] == [f"{name}.safetensors" for name in sorted(STYLES)]
    assert list(evaluate_loras.LORAS) == list(STYLES)
    for file in files:
        assert file.stat().st_size <= 500_000
        tensors = load_file(file)
        assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
        assert all(key.startswith("transformer.") for key in tensors)


def test_the_card_holds_the_evaluation() -> None:
    card = (EMBEDDED_MODEL / "README.md").read_text()
    begin = f"<!-- {evaluate_loras.SECTION} -->"
    table = card.partition(begin)[2].partition("<!-- end -->")[0]
    assert "200 random prompts" in table
    assert all(row in table for row in ("| `pastel` | all shapes | pastel |", "| `moon` | moon |"))
    assert "](loras.png)" in card and (EMBEDDED_MODEL / "loras.png").is_file()


@pytest.mark.parametrize("name", STYLES)
def test_training_images_are_as_they_are_judged(name: str) -> None:
    rng, style = np.random.default_rng(1), STYLES[name]
    wrong = []
    for _ in range(150):
        scene = style.sample(rng)
        image = Image.fromarray(style.draw(scene))
        if wrong_parts(image, canonical_prompt(scene), LORAS[name].style):
            wrong.append(scene)
    assert len(wrong) <= 5


def test_plain_images_are_not_pastel() -> None:
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng) for _ in range(150)]
    for scene in scenes:
        if not {scene.colour, scene.background} <= {"black", "white"}:
            wrong = wrong_parts(Image.fromarray(draw(scene)), canonical_prompt(scene), "pastel")
            assert wrong and set(wrong) <= {"colour", "background"}


def test_other_shapes_are_no_moons() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        scene = sample_scene(rng)
        assert look(Image.fromarray(draw(scene))).shape != "moon"
        moon = draw(dataclasses.replace(scene, shape="moon"))
        assert look(Image.fromarray(moon)).shape == "moon"


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        ((240, 140, 142), "red"),
        ((226, 30, 34), ""),
        ((140, 165, 240), "blue"),
        ((34, 84, 222), ""),
        ((128, 128, 128), ""),
        ((16, 16, 16), "black"),
        ((250, 250, 250), "white"),
        ((140, 200, 150), "green"),
    ],
)
def test_pale_colours_are_named(colour: tuple[int, int, int], word: str) -> None:
    assert name_pastel(np.array(colour)) == word


def test_requests_with_a_lora_get_its_style(served: Served) -> None:
    plain, file = generate(served)
    assert wrong_parts(plain, PROMPT) == []
    pale, _ = generate(served, lora=[{"name": "pastel"}])
    assert wrong_parts(pale, PROMPT, "pastel") == []
    moon, _ = generate(served, prompt=MOON, lora=[{"name": "moon"}])
    assert wrong_parts(moon, MOON) == []
    both, _ = generate(served, prompt=MOON, lora=[{"name": "moon"}, {"name": "pastel"}])
    assert wrong_parts(both, MOON, "pastel") == []
    zero, _ = generate(served, lora=[{"name": "pastel", "scale": 0}])
    assert wrong_parts(zero, PROMPT) == []
    assert generate(served)[1] == file, "and requests without one do not"


def test_they_are_listed(served: Served) -> None:
    models = httpx.get(f"{served.url}/v1/models", timeout=SECONDS).json()["data"]
    assert {"shapes", *(f"shapes:{style}" for style in STYLES)} <= {one["id"] for one in models}


# percent of the images that are right with the LoRA, and by accident without it
LEAST = {"pastel": 58.0, "moon": 65.0}  # measured: 66 and 75
MOST = {"pastel": 5.0, "moon": 5.0}


@pytest.mark.full
@pytest.mark.parametrize("name", STYLES)
def test_images_obey_style_and_prompt_in_the_evaluation(
    pipeline: StableDiffusion3Pipeline, name: str
) -> None:
    rng, judged = random.Random(27), LORAS[name]
    prompts = judged.prompts([evaluate.random_prompt(rng) for _ in range(200)])
    shares = []
    for loras in ({name: 1.0}, {}):
        evaluate_loras.use(pipeline, loras)
        images = evaluate.generate(pipeline, prompts)
        shares.append(evaluate_loras.score(images, prompts, judged.style))
    with_it, without = shares
    assert with_it["whole"] >= LEAST[name], with_it
    assert with_it["background"] >= 95, with_it
    assert without["whole"] <= MOST[name], without


@pytest.mark.full
def test_training_resumes_where_it_stood(tmp_path: Path) -> None:
    check_resumes(tmp_path, "train_loras", "pastel", file="pastel.safetensors")
