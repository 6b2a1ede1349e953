"""The real server with the embedded model, in a process of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bentoml
import diffusers
import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from stepweave.config import EMBEDDED_MODEL
from tests.support.environment import ROOT, clean_environment
from tests.support.served import PROMPT, Served, metric, serve
from tests.support.waiting import SECONDS, wait_until
from tools.shapes.checker import SHAPE_WORDS as SHAPES
from tools.shapes.checker import wrong_parts


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


OURS = re.compile(
    r"\d{4}-\d\d-\d\dT\S+ \[(INFO|WARNING)\] "
    r"\[(stepweave\.[\w.]+|cli|entry_service:stepweave:\d+)\] "
)


def test_it_tells_how_far_loading_is(served: Served) -> None:
    assert {("importing", 503), ("ready", 200)} <= served.told
    assert {status for stage, status in served.told if stage != "ready"} == {503}


def test_a_start_prints_nothing_but_our_lines(served: Served) -> None:
    lines = served.log.read_text().splitlines()
    [ready] = (
        number
        for number, line in enumerate(lines)
        if "[stepweave.serving.lifecycle] ready after" in line
    )
    assert [line for line in lines[:ready] if not OURS.match(line)] == []


@pytest.mark.parametrize("language", ["bash", "python"])
def test_the_readmes_clients_get_what_they_asked_for(
    served: Served, tmp_path: Path, language: str
) -> None:
    blocks = readme_blocks(language)
    assert len(blocks) == (2 if language == "bash" else 1)
    for block in blocks:
        command = ["bash", "-ec"] if language == "bash" else [sys.executable, "-c"]
        subprocess.run(
            [*command, block.replace("http://localhost:3000", served.url)],
            cwd=tmp_path,
            check=True,
            timeout=SECONDS,
            env=clean_environment(),
        )
        [made] = tmp_path.glob("*.png")
        with Image.open(made) as image:
            assert image.size == (64, 64)
            if made.name == "circle.png":
                assert wrong_parts(image, PROMPT) == []
            else:  # with a LoRA, for which tests/model has a judge
                assert json.loads(image.info["stepweave"])["lora"] == [
                    {"name": "moon", "scale": 1.0}
                ]
        made.unlink()


def test_the_openai_client_raises_its_own_errors(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [
            "shapes", "shapes:moon", "shapes:pastel",
        ]  # fmt: skip
        with pytest.raises(openai.BadRequestError, match="65x65") as caught:
            client.images.generate(prompt=PROMPT, size="65x65")  # type: ignore[call-overload]
        assert caught.value.param == "size"
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt=PROMPT, model="dall-e-3")


def test_a_deadline_that_nothing_can_meet_is_refused_before_it_runs(served: Served) -> None:
    """Of a model that has warmed up, also for numbers of steps and images that never ran; its
    client does not try again."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        for n in (1, 4):
            with pytest.raises(openai.BadRequestError) as caught:
                client.images.generate(
                    prompt=PROMPT, n=n, extra_body={"num_inference_steps": 97, "deadline_ms": 1}
                )  # fmt: skip
            assert (caught.value.code, caught.value.param) == ("deadline_too_short", "deadline_ms")
            assert re.search(
                r"deadline_ms is 1; the image takes [0-9.]+ s even on an idle server",
                str(caught.value),
            )
            assert "Retry-After" not in caught.value.response.headers
        assert client.images.generate(prompt=PROMPT, extra_body={"deadline_ms": 10**7}).data


def test_same_seed_same_image_on_both_surfaces(served: Served, tmp_path: Path) -> None:
    with bentoml.SyncHTTPClient(served.url, timeout=SECONDS) as client:
        native = client.generate(prompt=PROMPT, seed=11)
    response = httpx.post(
        f"{served.url}/v1/images/generations",
        json={"prompt": PROMPT, "seed": 10, "n": 2},
        timeout=SECONDS,
    )
    data = response.json()["data"]
    assert [item["seed"] for item in data] == [10, 11]
    second = Image.open(io.BytesIO(base64.b64decode(data[1]["b64_json"])))
    pairs = zip(native.convert("RGB").tobytes(), second.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1


def test_native_answers_carry_their_parameters(served: Served) -> None:
    response = httpx.post(
        f"{served.url}/generate",
        json={"prompt": "red star", "seed": 3, "output_format": "webp"},
        timeout=SECONDS,
    )
    assert response.headers["Content-Type"] == "image/webp"
    assert response.headers["X-Stepweave-Seed"] == "3"
    assert response.headers["X-Stepweave-Size"] == "64x64"
    assert response.headers["X-Request-ID"]
    refused = httpx.post(
        f"{served.url}/generate", json={"prompt": "x", "size": "65x65"}, timeout=SECONDS
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "size"


def test_a_prompt_that_is_cut_is_warned_of_on_both_surfaces(served: Served) -> None:
    """The embedded model reads 14 tokens and two special ones."""
    body = {"prompt": f"{PROMPT}, {PROMPT} 🔴", "seed": 1, "num_inference_steps": 2}
    warning = (
        "prompt: the text encoder (tokenizer) reads 16 tokens; the text after character 62 was "
        "left out: 'a blue background 🔴'"
    )
    for fields, warnings in (
        ({}, [warning]),
        ({"prompt": PROMPT, "negative_prompt": body["prompt"]}, [f"negative_{warning}"]),
        ({"prompt": PROMPT}, []),
    ):
        answer = httpx.post(
            f"{served.url}/v1/images/generations", json=body | fields, timeout=SECONDS
        )
        assert answer.json()["warnings"] == warnings
        native = httpx.post(f"{served.url}/generate", json=body | fields, timeout=SECONDS)
        assert json.loads(native.headers.get("X-Stepweave-Warnings", "[]")) == warnings


def test_a_reproducible_image_is_that_of_diffusers_own_call(
    served: Served, plain_images: list[tuple[dict[str, Any], np.ndarray]]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        bodies = [
            body | {"reproducible": i % 4 == 0} for i, (body, _) in enumerate(plain_images[:16])
        ]
        answers = list(
            pool.map(
                lambda body: httpx.post(f"{served.url}/generate", json=body, timeout=SECONDS),
                bodies,
            )
        )
    for body, answer, (_, plain) in zip(bodies, answers, plain_images, strict=False):
        assert answer.headers.get("X-Stepweave-Reproducible") == (
            "true" if body["reproducible"] else None
        )
        if body["reproducible"]:
            assert np.array_equal(
                np.asarray(Image.open(io.BytesIO(answer.content)), np.int16), plain
            )


def test_larger_sizes_run(served: Served) -> None:
    for size in ((128, 128), (64, 192)):
        response = httpx.post(
            f"{served.url}/generate",
            json={"prompt": PROMPT, "size": f"{size[0]}x{size[1]}"},
            timeout=SECONDS,
        )
        assert Image.open(io.BytesIO(response.content)).size == size


def test_errors_of_bentomls_own_routes_have_the_contracts_shape(served: Served) -> None:
    for method, path, status in (
        ("GET", "/nope", 404),
        ("GET", "/generate", 405),
        ("DELETE", "/readyz", 405),
    ):
        response = httpx.request(method, f"{served.url}{path}", timeout=SECONDS)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "code", "param"}
        assert response.headers["Server"].startswith("stepweave/")
        assert ("Allow" in response.headers) == (status == 405)


def test_livez_answers_many_times_while_an_image_is_made(served: Served) -> None:
    """A second or two of it: an answer that waited for the engine would come after it."""
    body = {"prompt": PROMPT, "num_inference_steps": 200, "size": "256x256", "events": "all"}
    with (
        httpx.stream("POST", f"{served.url}/generate_stream", json=body, timeout=SECONDS) as image,
        httpx.Client(timeout=SECONDS) as client,
    ):
        told = image.iter_lines()
        next(line for line in told if '"step":1,' in line)
        for _ in range(20):
            assert client.get(f"{served.url}/livez").status_code == 200
        assert metric(served.url, "stepweave_requests_in_flight") >= 1


def test_metrics_of_a_real_process(served: Served) -> None:
    assert metric(served.url, "process_resident_memory_bytes") > 100e6
    # others' clients may have left
    wait_until(lambda: metric(served.url, "stepweave_requests_in_flight") == 0)
    assert metric(served.url, "stepweave_model_info", model_name="shapes", device="cpu") == 1
    before = metric(served.url, "stepweave_requests_total", client="", outcome="succeeded")
    httpx.post(
        f"{served.url}/generate", json={"prompt": PROMPT, "num_inference_steps": 1}, timeout=SECONDS
    ).raise_for_status()
    httpx.post(
        f"{served.url}/generate", json={"prompt": "", "num_inference_steps": 1}, timeout=SECONDS
    )
    wait_until(
        lambda: (
            metric(served.url, "stepweave_requests_total", client="", outcome="succeeded")
            == before + 1
        )
    )
    wait_until(
        lambda: metric(served.url, "stepweave_requests_total", client="", outcome="invalid") >= 1
    )
    for kind in ("allocated", "reserved", "peak", "free", "total"):
        assert metric(served.url, "stepweave_vram_bytes", kind=kind) == 0


def test_a_thousand_urls_add_no_series(served: Served) -> None:
    def series() -> int:
        return sum(
            1
            for line in httpx.get(f"{served.url}/metrics", timeout=SECONDS).text.splitlines()
            if not line.startswith("#")
        )

    before = series()
    with httpx.Client(timeout=SECONDS) as client:
        for i in range(1000):
            client.get(f"{served.url}/v1/models/{i}" if i % 2 else f"{served.url}/{i}")
    assert series() == before


def test_requests_leave_nothing_in_memory(served: Served) -> None:
    """BentoML's timeout middleware would keep 5 KB of each."""
    with httpx.Client(timeout=SECONDS) as client:

        def probe(times: int) -> float:
            for _ in range(times):
                client.get(f"{served.url}/livez")
            return metric(served.url, "process_resident_memory_bytes")

        before = probe(500)
        assert probe(2500) - before < 5e6


@pytest.mark.parametrize("prompt", [" red star ", "ein roter Stern — 赤い星 🔴" * 100])
def test_any_prompt_comes_through_the_native_route(served: Served, prompt: str) -> None:
    response = httpx.post(
        f"{served.url}/generate", json={"prompt": prompt, "num_inference_steps": 1}, timeout=SECONDS
    )
    assert response.status_code == 200
    image = Image.open(io.BytesIO(response.content))
    assert json.loads(image.info["stepweave"])["prompt"] == prompt  # type: ignore[attr-defined]


def test_sizes_beyond_the_models_positions_are_refused(served: Served) -> None:
    response = httpx.post(
        f"{served.url}/generate", json={"prompt": "x", "size": "1024x1024"}, timeout=SECONDS
    )
    assert response.status_code == 400
    assert "the model's limit is 512 a side" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_a_client_that_leaves_ends_its_job(served: Served, path: str) -> None:
    wait_until(lambda: metric(served.url, "stepweave_requests_in_flight") == 0)
    before = metric(served.url, "stepweave_requests_total", client="", outcome="cancelled")
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": PROMPT, "num_inference_steps": 200, "size": "256x256"}
        httpx.post(f"{served.url}{path}", json=body, timeout=httpx.Timeout(SECONDS, read=0.5))
    wait_until(
        lambda: (
            metric(served.url, "stepweave_requests_total", client="", outcome="cancelled")
            == before + 1
        )
    )
    wait_until(lambda: metric(served.url, "stepweave_requests_in_flight") == 0)


@pytest.fixture(scope="module")
def plain_images() -> list[tuple[dict[str, Any], np.ndarray]]:
    """Bodies of requests that differ in everything, and the image of diffusers' own call for
    each."""
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        EMBEDDED_MODEL, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = [
        f"a {size} {colour} {shape}"
        for size in ("small", "large")
        for colour in ("red", "blue")
        for shape in SHAPES
    ]
    pairs = []
    for seed, prompt in enumerate((prompts * 2)[:32]):
        body = {
            "prompt": prompt,
            "num_inference_steps": 3 + seed % 6,
            "guidance_scale": 1 + seed % 4,
        }
        if seed % 5 == 2:
            body["negative_prompt"] = "a white background"
        image = pipeline(
            **body, max_sequence_length=1, generator=torch.Generator().manual_seed(seed)
        ).images[0]
        pairs.append((body | {"seed": seed}, np.asarray(image, np.int16)))
    return pairs


@pytest.mark.parametrize(
    "batching",
    ["step", *(pytest.param(mode, marks=[pytest.mark.full]) for mode in ("request", "threads"))],
)
def test_images_made_together_are_those_of_diffusers_own_call(
    served: Served,
    plain_images: list[tuple[dict[str, Any], np.ndarray]],
    tmp_path: Path,
    batching: str,
) -> None:
    def draw(url: str, body: dict[str, Any]) -> np.ndarray:
        response = httpx.post(f"{url}/generate", json=body, timeout=SECONDS)
        assert response.status_code == 200, response.text
        return np.asarray(Image.open(io.BytesIO(response.content)), np.int16)

    with contextlib.ExitStack() as stack:
        server = served
        if batching != "step":
            settings = {"STEPWEAVE_BATCHING": batching, "STEPWEAVE_THREADS": "8"}
            server = stack.enter_context(serve(tmp_path / "log.txt", **settings))
            server.wait_until_ready()
        with ThreadPoolExecutor(32) as pool:
            together = list(pool.map(lambda pair: draw(server.url, pair[0]), plain_images))
        if batching != "step":
            assert server.stop() == 0
    assert (
        max(int(np.abs(a - b).max()) for a, (_, b) in zip(together, plain_images, strict=True)) <= 1
    )


def test_steps_are_shared_and_the_certificates_are_shown(served: Served) -> None:
    def shared() -> float:
        return metric(served.url, "stepweave_calls_total", module="transformer", shared="yes")

    def all_share() -> bool:
        """Most do, by far, on a quiet machine; on a busy one fewer rows may seem to pay for a
        while."""
        before = shared()
        with ThreadPoolExecutor(8) as pool:
            bodies = [
                {"prompt": PROMPT, "seed": seed, "num_inference_steps": 40 + seed}
                for seed in range(8)
            ]
            sent = pool.map(
                lambda body: httpx.post(f"{served.url}/generate", json=body, timeout=SECONDS),
                bodies,
            )
        assert {answer.status_code for answer in sent} == {200}
        return shared() - before > 0.25 * sum(40 + seed for seed in range(8))

    wait_until(all_share)
    model, *_ = httpx.get(f"{served.url}/v1/models", timeout=SECONDS).json()["data"]
    certified = [
        one["call"] for one in model["stepweave"]["certificates"] if one["state"] == "certified"
    ]
    expected = {"text_encoder", "text_encoder_2", "transformer", "vae.encode", "vae.decode"}
    expected.add("controlnet.outlines")
    assert set(certified) == expected, model["stepweave"]["certificates"]
    assert metric(served.url, "stepweave_certificates", state="certified") == len(certified)
