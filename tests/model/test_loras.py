"""The embedded model's LoRAs: their size, their training, the checker's view of their styles, and
their images over HTTP."""

from __future__ import annotations

import base64
import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from stepweave.config import EMBEDDED_MODEL
from tests.support.environment import ROOT, clean_environment
from tests.support.served import Served
from tests.support.waiting import SECONDS
from tools.shapes import evaluate, evaluate_loras
from tools.shapes.checker import name_pastel, wrong_parts
from tools.shapes.scenes import canonical_prompt, draw, sample_scene
from tools.shapes.train_loras import STYLES

FOLDER = EMBEDDED_MODEL / "loras"
PROMPT = "a large red star on a blue background"


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
    assert evaluate_loras.STYLES == tuple(STYLES)
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
    assert all(f"| `{name}` | {name} |" in table for name in STYLES)
    assert "](loras.png)" in card and (EMBEDDED_MODEL / "loras.png").is_file()


@pytest.mark.parametrize("style", STYLES)
def test_training_images_have_the_style(style: str) -> None:
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng) for _ in range(150)]
    wrong = [
        scene
        for scene in scenes
        if wrong_parts(Image.fromarray(STYLES[style](scene)), canonical_prompt(scene), style)
    ]
    assert len(wrong) <= 5


@pytest.mark.parametrize("style", STYLES)
def test_plain_images_have_no_style(style: str) -> None:
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng) for _ in range(150)]
    for scene in scenes:
        if not {scene.colour, scene.background} <= {"black", "white"}:
            wrong = wrong_parts(Image.fromarray(draw(scene)), canonical_prompt(scene), style)
            assert wrong and set(wrong) <= {"colour", "background"}


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
    for style in STYLES:
        image, _ = generate(served, lora=[{"name": style}])
        assert wrong_parts(image, PROMPT, style) == []
    zero, _ = generate(served, lora=[{"name": "pastel", "scale": 0}])
    assert wrong_parts(zero, PROMPT) == []
    assert generate(served)[1] == file, "and requests without one do not"


def test_they_are_listed(served: Served) -> None:
    models = httpx.get(f"{served.url}/v1/models", timeout=SECONDS).json()["data"]
    assert {"shapes", *(f"shapes:{style}" for style in STYLES)} <= {one["id"] for one in models}


def check(pipeline: StableDiffusion3Pipeline, style: str, count: int, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [evaluate.random_prompt(rng) for _ in range(count)]
    evaluate_loras.use(pipeline, style)
    styled = evaluate_loras.score(evaluate.generate(pipeline, prompts), prompts, style)
    evaluate_loras.use(pipeline)
    plain = evaluate_loras.score(evaluate.generate(pipeline, prompts), prompts, style)
    assert styled["whole"] >= LEAST[style], styled
    assert styled["background"] >= 95, styled
    assert plain["whole"] <= 5, plain


LEAST = {"pastel": 58.0}  # percent; measured: 63.5


@pytest.mark.full
@pytest.mark.parametrize("style", STYLES)
def test_images_obey_style_and_prompt_in_the_evaluation(
    pipeline: StableDiffusion3Pipeline, style: str
) -> None:
    check(pipeline, style, 200, seed=7)


@pytest.mark.full
def test_training_resumes_where_it_stood(tmp_path: Path) -> None:
    """Three steps: interrupted after two and started again, the weights equal those of one go."""

    def train(work: str, steps: int) -> bytes:
        target = tmp_path / f"{work}-loras"
        command = [
            sys.executable, "-m", "tools.shapes.train_loras", "pastel", "--device", "cpu",
            "--work", str(tmp_path / work), "--output", str(target), "--scenes", "32",
            "--steps", str(steps),
        ]  # fmt: skip
        environment = clean_environment(OMP_NUM_THREADS="1")
        subprocess.run(
            command, cwd=ROOT, check=True, env=environment, capture_output=True, timeout=SECONDS
        )
        return (target / "pastel.safetensors").read_bytes()

    whole = train("whole", 3)
    train("parts", 2)
    assert train("parts", 3) == whole
