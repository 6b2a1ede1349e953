"""Tensors in requests, on every HTTP surface: what they do, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from tests.support.asgi import serving
from tests.support.bodies import INFER, JSON, natively
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.tiny import FAMILIES
from tests.support.waiting import SECONDS

Make = Callable[..., InProcess]
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
TINY = {"size": "16x16", "num_inference_steps": 3, "seed": 7}


class Needing(FakePipeline):
    """Needs the embeddings of an image, and may be given more."""

    def __call__(  # type: ignore[override]
        self,
        image_embeds: torch.Tensor,
        image: Image.Image | None = None,
        prompt_embeds: list[torch.FloatTensor] | None = None,
        height: int | None = None,
        width: int | None = None,
        hint: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        num_inference_steps: int = 4,
        num_images_per_prompt: int = 1,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        given = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        made = super().__call__(
            "", None, height, width, num_inference_steps, 1.0,
            num_images_per_prompt, generator, output_type,
        )  # fmt: skip
        self.record.calls[-1] = given
        return made


def sent(tensor: torch.Tensor) -> str:
    return base64.b64encode(save({"any name": tensor})).decode()


def error(answer: httpx.Response) -> tuple[int, str, str]:
    told = answer.json()["error"]
    return answer.status_code, told["param"], told["message"]


def pixels(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(content)))


def photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tiny(in_process: Make) -> InProcess:
    pipeline = FAMILIES["stable_diffusion"].build()
    return in_process(pipeline, warmup=False, batching="step")


@pytest.fixture
def needing(in_process: Make) -> InProcess:
    return in_process(Needing(), max_images=4)


def encoded(app: InProcess, prompt: str) -> torch.Tensor:
    embeds: torch.Tensor = app.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
    return embeds


def post(app: InProcess, **fields: Any) -> httpx.Response:
    return app.client.post(GENERATIONS, json=fields)


# --- what they do ---


def test_embeddings_of_a_prompt_make_the_image_of_the_prompt(tiny: InProcess) -> None:
    expected = pixels(post(tiny, prompt="a red circle", **TINY))
    embeds = encoded(tiny, "a red circle")
    answer = post(tiny, prompt_embeds=sent(embeds), **TINY)
    assert np.array_equal(pixels(answer), expected)
    other = post(tiny, prompt_embeds=sent(encoded(tiny, "a blue star")), **TINY)
    assert not np.array_equal(pixels(other), expected)
    told = answer.json()["parameters"]
    assert "prompt" not in told
    assert told["prompt_embeds"].startswith(f"float32 {list(embeds.shape)} sha256:")


def test_latents_are_the_noise_of_the_image(tiny: InProcess) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    fields = {"prompt": "a", "size": "16x16", "num_inference_steps": 3, "guidance_scale": 1}
    answers = [post(tiny, latents=sent(noise), seed=seed, **fields) for seed in (1, 2)]
    assert np.array_equal(pixels(answers[0]), pixels(answers[1]))
    assert np.array_equal(pixels(post(tiny, seed=7, **fields)), pixels(answers[0]))


def test_tensors_of_other_shapes_in_one_batch_do_not_mix(tiny: InProcess) -> None:
    one, other = (encoded(tiny, prompt) for prompt in ("a red circle", "a blue star"))
    bodies = [
        {**TINY, "guidance_scale": 1, "prompt_embeds": sent(embeds), "seed": seed}
        for seed, embeds in enumerate((one, torch.cat([one, other], 1), other, one[:, :3]))
    ]
    alone = [pixels(post(tiny, **body)) for body in bodies]

    async def together() -> list[httpx.Response]:
        transport = httpx.ASGITransport(tiny.client.app)  # type: ignore[arg-type]
        options = {"base_url": "http://localhost:3000", "timeout": SECONDS}
        async with httpx.AsyncClient(transport=transport, **options) as client:  # type: ignore[arg-type]
            return await asyncio.gather(
                *(client.post(GENERATIONS, json=body) for body in 2 * bodies)
            )

    for made, expected in zip(asyncio.run(together()), 2 * alone, strict=True):
        assert np.abs(pixels(made).astype(int) - expected).max() <= 1


def test_what_a_pipeline_needs_is_passed_and_no_warm_up_makes_it_up(needing: InProcess) -> None:
    assert needing.pipeline.record.calls == []
    embeds, hint = torch.randn(1, 8).half(), torch.rand(1, 3, 64, 64)
    answer = post(needing, image_embeds=sent(embeds), hint=sent(hint), n=2)
    assert answer.status_code == 200, answer.text
    [call] = needing.pipeline.record.calls
    assert call["image_embeds"].dtype == torch.float32, "the pipeline's own type"
    assert torch.equal(call["image_embeds"], embeds.float()) and torch.equal(call["hint"], hint)
    status, param, message = error(post(needing))
    assert (status, param) == (400, "image_embeds") and "missing" in message


def test_a_list_of_tensors_has_one(needing: InProcess) -> None:
    embeds, tokens = sent(torch.zeros(1, 8)), torch.randn(5, 8)
    for value in (sent(tokens), [sent(tokens)]):
        assert post(needing, image_embeds=embeds, prompt_embeds=value).status_code == 200
        [passed] = needing.pipeline.record.calls[-1]["prompt_embeds"]
        assert torch.equal(passed, tokens)
    two = post(needing, image_embeds=embeds, prompt_embeds=2 * [sent(tokens)])
    assert error(two)[:2] == (400, "prompt_embeds")


EMBEDS = torch.randn(1, 32, 1024)  # longer than a text of a form may be


def bodies() -> dict[str, httpx.Request]:
    """An edit as a form, whose tensor is a file, and in JSON."""
    name, kind = "e.safetensors", "application/octet-stream"
    files = [
        ("image", ("a.png", photo(), "image/png")),
        ("image_embeds", (name, save({"e": EMBEDS}), kind)),
    ]
    body = {
        "image": f"data:image/png;base64,{base64.b64encode(photo()).decode()}",
        "image_embeds": f"data:application/octet-stream;base64,{sent(EMBEDS)}",
    }
    return {
        "form": httpx.Request("POST", "http://test/", data={"seed": "7"}, files=files),
        "json": httpx.Request("POST", "http://test/", json={**body, "seed": 7}),
    }


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["form", "json"])
@pytest.mark.parametrize("path", [EDITS, "/edit"])
async def test_an_edit_has_them_as_files_of_a_form_or_as_base64(path: str, kind: str) -> None:
    body = bodies()[kind]
    async with serving(Needing(), warmup=True) as app:
        if path == "/edit":
            natively(app)
        head = {"Content-Type": body.headers["content-type"]}
        answer = await app.send("POST", path, body.read(), head).done()
        assert answer.status == 200, answer.content
        [call] = app.record.calls
        assert torch.equal(call["image_embeds"], EMBEDS)
        assert call["image"].size == (64, 64)


@pytest.mark.anyio
async def test_a_native_generation_has_them() -> None:
    async with serving(Needing(), warmup=True) as app:
        natively(app)
        content = json.dumps({"image_embeds": sent(torch.ones(1, 8))}).encode()
        answer = await app.send("POST", "/generate", content, JSON).done()
        assert answer.status == 200, answer.content
        assert torch.equal(app.record.calls[-1]["image_embeds"], torch.ones(1, 8))


def test_the_open_inference_protocol_has_them_as_base64(tiny: InProcess) -> None:
    embeds = [encoded(tiny, prompt) for prompt in ("a red circle", "a blue star")]
    tensor = {
        "name": "prompt_embeds", "datatype": "BYTES", "shape": [2], "data": list(map(sent, embeds))
    }  # fmt: skip
    seeds = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [7]}
    body = {"inputs": [tensor, seeds], "parameters": {"size": "16x16", "num_inference_steps": 3}}
    answer = tiny.client.post(INFER, json=body)
    assert answer.status_code == 200, answer.text
    [images] = [one for one in answer.json()["outputs"] if one["name"] == "image"]
    for data, each in zip(images["data"], embeds, strict=True):
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        expected = pixels(post(tiny, prompt_embeds=sent(each), **TINY))
        assert np.array_equal(image, expected)


def test_requests_that_differ_in_a_tensor_are_not_one(needing: InProcess) -> None:
    headers = {"Idempotency-Key": "once"}
    answers = [
        needing.client.post(GENERATIONS, headers=headers, json={"image_embeds": sent(tensor)})
        for tensor in (torch.zeros(1, 8), torch.zeros(1, 8), torch.ones(1, 8))
    ]
    assert [one.status_code for one in answers] == [200, 200, 409]


# --- what is refused ---


MISFITS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt_embeds": torch.zeros(2, 4, 32)}, "prompt_embeds",
     "prompt_embeds is float32 [2, 4, 32]; its dimension 0 must be 1, for one prompt."),
    ({"prompt_embeds": torch.zeros(1, 513, 32)}, "prompt_embeds",
     "is float32 [1, 513, 32]; it is of 513 tokens; the limit is 512."),
    ({"prompt_embeds": torch.zeros(1, 4, 33)}, "prompt_embeds",
     "The pipeline fails with these values (RuntimeError): prompt_embeds=float32 [1, 4, 33]"),
    ({"prompt_embeds": torch.zeros(1, 32)}, "prompt_embeds", "prompt_embeds=float32 [1, 32]"),
    ({"prompt": "a", "prompt_embeds": torch.zeros(1, 4, 32)}, None, "The pipeline rejects"),
    ({"prompt_embeds": torch.full((1, 4, 32), float("nan"))}, "prompt_embeds", "NaN"),
    ({"prompt_embeds": torch.full((1, 4, 32), 65_505.0)}, "prompt_embeds", "to 65504"),
    ({"prompt": "a", "latents": torch.zeros(2, 4, 8, 8)}, "latents",
     "its dimension 0 must be 1, for one prompt."),
    ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 16)}, "latents",
     "for a result of 16x16 it must be [n, channels, rows, columns]"),
    ({"prompt": "a", "latents": torch.zeros(1, 4, 64)}, "latents", "it must be [n, channels"),
    ({"prompt": "a", "latents": torch.zeros(1, 5, 8, 8)}, "latents", "latents=float32 [1, 5,"),
    ({"negative_prompt_embeds": torch.zeros(1, 4, 32)}, "prompt", "prompt is missing"),
    ({}, "prompt", "prompt is missing"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "its content is no file of safetensors"),
    ({"prompt": "a", "masked_image_latents": "AAAA"}, "masked_image_latents", "Unknown field"),
]  # fmt: skip


def test_a_tensor_that_does_not_fit_is_told_with_its_shape(tiny: InProcess) -> None:
    for fields, param, told in MISFITS:
        given = {
            name: sent(value) if isinstance(value, torch.Tensor) else value
            for name, value in fields.items()
        }
        status, named, message = error(post(tiny, **given, **TINY))
        assert (status, named) == (400, param) and told in message, (fields, message)
        assert post(tiny, prompt="a", **TINY).status_code == 200, fields


def test_maps_are_no_larger_than_the_result(needing: InProcess) -> None:
    fields = {"image_embeds": sent(torch.zeros(1, 8)), "size": "32x32"}
    status, param, message = error(post(needing, hint=sent(torch.zeros(1, 3, 32, 64)), **fields))
    assert (status, param) == (400, "hint")
    assert message == "hint is float32 [1, 3, 32, 64]; it is larger than a result of 32x32 pixels."


def test_a_form_that_has_a_tensor_twice_is_refused(needing: InProcess) -> None:
    file = ("e.safetensors", save({"e": torch.ones(1, 8)}), "application/octet-stream")
    parts = [("image", ("a.png", photo(), "image/png")), *(2 * [("image_embeds", file)])]
    status, param, _ = error(needing.client.post(EDITS, files=parts))
    assert (status, param) == (400, "image_embeds")


# --- what is told of them ---


def test_the_model_and_the_document_list_them(needing: InProcess) -> None:
    details = needing.client.get("/v1/models").json()["data"][0]["stepweave"]
    found = {one.pop("name"): one for one in details["arguments"]}
    assert found["image_embeds"] == {
        "type": "tensor", "required": True, "default": None, "minimum": -65504, "maximum": 65504,
        "max_items": None, "max_length": None, "description": "",
    }  # fmt: skip
    schemas = needing.client.get("/openapi.json").json()["components"]["schemas"]
    generation = schemas["GenerationRequest"]
    assert "image_embeds" in generation["required"]
    embeds = generation["properties"]["image_embeds"]
    assert (embeds["type"], embeds["contentEncoding"]) == ("string", "base64")
    form = schemas["EditRequest"]
    assert form["properties"]["image_embeds"]["format"] == "binary"
    assert "image_embeds" in form["required"]


def test_a_prompt_may_be_left_out_where_embeddings_may_be_sent(tiny: InProcess) -> None:
    schemas = tiny.client.get("/openapi.json").json()["components"]["schemas"]
    assert "prompt" not in schemas["GenerationRequest"].get("required", ())
    described = schemas["GenerationRequest"]["properties"]["prompt"]["description"]
    assert described == "Description of the image; or send prompt_embeds."
    json.dumps(schemas)
