"""Refiners and autoencoders of a Stable Diffusion XL over HTTP: what they make is what diffusers'
own two calls make, alone and together; what is wrong is refused by name."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.pipelines.adapters import ip_adapter
from tests.pipelines.parts import autoencoder, trained, vision
from tests.pipelines.registry import example_image
from tests.served.server import NotServedError, Served, pixels, serving
from tests.support.ip_adapters import load_ip_adapter, save_ip_adapter
from tests.support.loras import save_lora
from tests.support.refiners import save_refiner, save_xl
from tests.support.tiny import SIDE
from tests.support.uploads import url_of

pytestmark = pytest.mark.full  # one start of a server with all

STEPS, SEED = 6, 3
LIKE = example_image(57)
COMMON = {"prompt": "a ring", "guidance_scale": 5.0, "num_inference_steps": STEPS}
SIZE = {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories of a model and of components."""
    place = tmp_path_factory.mktemp("refiners")
    base = save_xl(place / "model")
    (place / "model" / "stepweave.json").write_text(json.dumps({**SIZE, "num_inference_steps": 4}))
    save_refiner(base, place / "fine")
    torch.manual_seed(9)
    save_refiner(base, place / "own", seed=8, vae=autoencoder())
    torch.manual_seed(1)
    autoencoder().save_pretrained(place / "soft")
    net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8))
    trained(net).save_pretrained(place / "canny")  # type: ignore[operator]
    save_ip_adapter(ip_adapter(base.unet), vision(), place / "faces")
    save_lora(
        place / "model" / "loras" / "rings.safetensors",
        lambda: diffusers.StableDiffusionXLPipeline.from_pretrained(place / "model"),
        {"unet": ("to_q", "to_k", "to_v")},
    )
    return place


@pytest.fixture(scope="module")
def refining(folder: Path) -> Iterator[Served]:
    sources: dict[str, Any] = {
        name: str(folder / name) for name in ("own", "soft", "canny", "faces")
    }
    sources["fine"] = {"source": str(folder / "fine"), "description": "for details"}
    setting = json.dumps(sources)
    with serving(folder / "model", (), 64 * 64, STEPWEAVE_COMPONENTS=setting) as found:
        yield found


def ask(refining: Served, *bodies: Mapping[str, Any]) -> list[Any]:
    return refining.at_once([{**COMMON, "seed": SEED, **body} for body in bodies])


class Plain:
    """diffusers' own calls of the same files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kind = diffusers.StableDiffusionXLPipeline
        self.base = kind.from_pretrained(folder / "model", add_watermarker=False)

    def __call__(
        self,
        refiner: str | None = None,
        start: float = 0.8,
        soft: bool = False,
        like: bool = False,
        rings: float = 0.0,
    ) -> np.ndarray:
        generator = torch.Generator().manual_seed(SEED)
        base = diffusers.StableDiffusionXLPipeline(**self.base.components, add_watermarker=False)
        changes: dict[str, Any] = {}
        if soft:
            changes["vae"] = diffusers.AutoencoderKL.from_pretrained(self.folder / "soft")
            base.register_modules(**changes)
        first: dict[str, Any] = {**COMMON, **SIZE, "generator": generator}
        if like:
            base.unet = copy.deepcopy(base.unet)
            load_ip_adapter(base, self.folder / "faces")
            first["ip_adapter_image"] = LIKE
        if rings:
            base.unet = copy.deepcopy(base.unet)
            base.load_lora_weights(
                self.folder / "model" / "loras",
                weight_name="rings.safetensors",
                adapter_name="rings",
            )
            base.set_adapters(["rings"], [rings])
        if refiner is None:
            return np.asarray(base(**first).images[0]).astype(int)
        latents = base(**first, denoising_end=start, output_type="latent").images
        second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
            self.folder / refiner, add_watermarker=False, **changes
        )
        made = second(**COMMON, image=latents, denoising_start=start, generator=generator)
        return np.asarray(made.images[0]).astype(int)


# a request, and the plain calls that make the same image
CASES: dict[str, tuple[dict[str, Any], Callable[[Plain], np.ndarray]]] = {
    "none": ({}, lambda plain: plain()),
    "refined": ({"refiner": "fine"}, lambda plain: plain("fine")),
    "refined early": (
        {"refiner": "fine", "refiner_start": 0.4},
        lambda plain: plain("fine", 0.4),
    ),
    "by another, with an autoencoder of its own": (
        {"refiner": "own", "refiner_start": 0.6},
        lambda plain: plain("own", 0.6),
    ),
    "decoded": ({"vae": "soft"}, lambda plain: plain(soft=True)),
    "refined and decoded": (
        {"refiner": "own", "vae": "soft"},
        lambda plain: plain("own", soft=True),
    ),
    # adapted is the model, not its refiner, whose layers have other shapes
    "adapted": ({"lora": "rings:0.8"}, lambda plain: plain(rings=0.8)),
    "adapted and refined": (
        {"lora": "rings:0.8", "refiner": "fine"},
        lambda plain: plain("fine", rings=0.8),
    ),
    "like and refined": (
        {
            "refiner": "fine",
            "refiner_start": 0.5,
            "ip_adapter": "faces",
            "ip_adapter_image": url_of(LIKE),
        },
        lambda plain: plain("fine", 0.5, like=True),
    ),
}


def test_requests_with_and_without_a_refiner_get_the_plain_images_alone_and_together(
    refining: Served, folder: Path
) -> None:
    plain = Plain(folder)
    expected = [make(plain) for _, make in CASES.values()]
    bodies = [body for body, _ in CASES.values()]
    assert len({image.tobytes() for image in expected}) == len(CASES), "so that a mix-up would show"
    before = refining.engine.stats().forwards["refiner.fine.unet"].merged_calls
    together = ask(refining, *bodies, *bodies)
    alone = [answer for body in bodies for answer in ask(refining, body)]
    for answers in (together[: len(bodies)], together[len(bodies) :], alone):
        for name, answer, image in zip(CASES, answers, expected, strict=True):
            assert np.abs(pixels(answer) - image).max() <= 1, name
    forwards = refining.engine.stats().forwards
    assert forwards["refiner.fine.unet"].merged_calls > before
    assert {"refiner.own.unet", "refiner.own.vae.decode", "vae.soft.decode"} <= forwards.keys()
    assert "refiner.fine.vae.decode" not in forwards, "it is the model's"
    told = together[2].json()["parameters"]
    assert (told["refiner"], told["refiner_start"]) == ("fine", 0.4)


def test_several_images_events_jobs_and_other_routes_refine_too(refining: Served) -> None:
    body = {**COMMON, "seed": SEED, "refiner": "fine", "refiner_start": 0.5}

    async def all_() -> tuple[Any, ...]:
        async with refining._client() as client:
            two = await client.post("/v1/images/generations", json={**body, "n": 2})
            second = await client.post("/v1/images/generations", json={**body, "seed": SEED + 1})
            streamed = await client.post(
                "/v1/images/generations",
                json={**body, "stream": True, "partial_images": 2, "events": "all"},
            )
            inferred = await client.post(
                f"/v2/models/{refining.server.ready()[0].id}/infer",
                json={
                    "inputs": [
                        {
                            "name": "prompt",
                            "shape": [1],
                            "datatype": "BYTES",
                            "data": [COMMON["prompt"]],
                        }
                    ],
                    "parameters": {name: body[name] for name in body if name != "prompt"},
                },
            )
            form = await client.post(
                "/v1/images/edits",
                data={name: str(body[name]) for name in body} | {"ip_adapter": "faces"},
                files={"ip_adapter_image": ("face.png", _png(LIKE), "image/png")},
            )
            job = await client.post(
                "/v1/images/generations", json=body, headers={"Prefer": "respond-async"}
            )
            return two, second, streamed, inferred, form, job

    two, second, streamed, inferred, form, job = asyncio.run(all_())
    assert two.status_code == 200, two.text
    images = [item["b64_json"] for item in two.json()["data"]]
    last = np.asarray(Image.open(io.BytesIO(base64.b64decode(images[1]))).convert("RGB"))
    assert np.abs(last.astype(int) - pixels(second)).max() <= 1, "each image is that of its seed"
    totals = {
        event["total_steps"]
        for line in streamed.text.splitlines()
        if line.startswith("data: {") and "total_steps" in (event := json.loads(line[6:]))
    }
    assert totals == {STEPS}
    assert inferred.status_code == 200, inferred.text
    assert form.status_code == 200, form.text
    assert job.status_code == 202, job.text


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_models_and_the_openapi_document_list_them(refining: Served) -> None:
    async def both() -> tuple[Any, Any]:
        async with refining._client() as client:
            return (await client.get("/v1/models")).json(), (
                await client.get("/openapi.json")
            ).json()

    models, document = asyncio.run(both())
    details = models["data"][0]["stepweave"]
    components = {one["name"]: one for one in details["components"]}
    assert components["fine"] == {
        "name": "fine",
        "field": "refiner",
        "model": "StableDiffusionXLImg2ImgPipeline",
        "edits": [],
        "generations": True,
        "default": False,
        "description": "for details",
    }
    assert components["soft"]["edits"] == ["image_to_image", "inpainting"]
    arguments = {one["name"]: one for one in details["arguments"]}
    assert arguments["refiner_start"]["maximum"] == 1
    assert {"refiner", "vae", "aesthetic_score"} <= arguments.keys()
    fields = json.dumps(document["components"]["schemas"])
    assert '"refiner_start"' in fields and '"refiner"' in fields and '"vae"' in fields


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such name": ({"refiner": "fin"}, "'fine'"),
    "from the beginning": ({"refiner": "fine", "refiner_start": 0}, "must be more than 0 and less"),
    "beyond the end": ({"refiner": "fine", "refiner_start": 1.5}, "less than or equal to 1"),
    "without a refiner": ({"refiner_start": 0.5}, "requests with refiner have it"),
    "too few steps": (
        {"refiner": "fine", "num_inference_steps": 1},
        "refiner_start is 0.8, of 1 steps: none is left for the model",
    ),
    "of an edit": (
        {"refiner": "fine", "image": url_of(LIKE)},
        "refiner is fine, which this model does not use for image to image",
    ),
    "with control": (
        {"refiner": "fine", "controlnet": "canny", "control_image": url_of(LIKE)},
        "refiner and controlnet are both set",
    ),
    "two": ({"refiner": ["fine", "own"]}, "refiner"),
    "an image of nothing": ({"vae": "soft", "control_image": url_of(LIKE)}, "set controlnet to"),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_by_name(
    refining: Served, body: dict[str, Any], message: str
) -> None:
    [answer] = ask(refining, body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_a_refiner_for_another_size_of_text_ends_the_start_by_its_name(
    folder: Path, tmp_path: Path
) -> None:
    """It is of the right class, and only its calls fail."""
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "model")
    save_refiner(base, tmp_path / "wide", unet=base.unet)
    setting = json.dumps({"wide": str(tmp_path / "wide")})
    with pytest.raises(NotServedError, match="the component 'wide' does not work with this model"):
        with serving(folder / "model", (), 64 * 64, STEPWEAVE_COMPONENTS=setting):
            pass
