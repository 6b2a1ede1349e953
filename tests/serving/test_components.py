"""Components beside the model over HTTP: what they make is what diffusers' own pipelines make of
them, alone and among requests with others or none; what is wrong is refused by name."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image

from tests.pipelines.adapters import ip_adapter
from tests.pipelines.parts import HINTS, autoencoder, diffusion, diffusion_xl, trained, vision
from tests.pipelines.registry import example_image, mask
from tests.served.server import NotServedError, Served, pixels, serving
from tests.support.ip_adapters import load_ip_adapter, save_ip_adapter
from tests.support.uploads import url_of

# of diffusers, about its own pipelines with adapters
pytestmark = pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")

STEPS, SEED, SIDE = 4, 3, 16
FIRST, SECOND, SOURCE, MASK = example_image(51), example_image(57), example_image(5), mask(5)
COMMON = {"prompt": "a ring", "guidance_scale": 5.0, "num_inference_steps": STEPS}
SIZE = {"height": SIDE, "width": SIDE}


def controlnet(unet: Any) -> torch.nn.Module:
    return diffusers.ControlNetModel.from_unet(unet, **HINTS)  # type: ignore[no-any-return]


def adapter() -> diffusers.T2IAdapter:
    return diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2)


@dataclass(frozen=True)
class Models:
    """The directories of a model and of components."""

    folder: Path

    def setting(self) -> str:
        sources: dict[str, Any] = {
            name: str(self.folder / name) for name in ("canny", "sketch", "faces", "soft")
        }
        sources["depth"] = {"source": str(self.folder / "depth"), "description": "how far it is"}
        return json.dumps(sources)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("components")
    torch.manual_seed(0)
    # two levels with cross-attention at the end, as adapters need them
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    pipeline = diffusers.StableDiffusionPipeline(**diffusion(**blocks))
    pipeline.save_pretrained(folder / "model")
    (folder / "model" / "stepweave.json").write_text(
        json.dumps({**SIZE, "num_inference_steps": STEPS})
    )
    for name, model in (
        ("canny", controlnet(pipeline.unet)),
        ("depth", controlnet(pipeline.unet)),
        ("sketch", adapter()),
    ):
        trained(model).save_pretrained(folder / name)  # type: ignore[operator]
    torch.manual_seed(1)  # other weights than the model's
    autoencoder().save_pretrained(folder / "soft")
    save_ip_adapter(ip_adapter(pipeline.unet), vision(), folder / "faces")
    return Models(folder)


@pytest.fixture(scope="module")
def guided(models: Models) -> Iterator[Served]:
    with serving(
        models.folder / "model", (), 64 * 64, STEPWEAVE_COMPONENTS=models.setting()
    ) as found:
        yield found


def ask(guided: Served, *bodies: Mapping[str, Any]) -> list[Any]:
    return guided.at_once([{**COMMON, "seed": SEED, **body} for body in bodies])


@dataclass(frozen=True)
class Like:
    """What a plain call with an IP-Adapter needs."""

    scale: float = 1.0
    mask: Image.Image | None = None


class Plain:
    """diffusers' own pipelines of the same files."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.base = diffusers.StableDiffusionPipeline.from_pretrained(models.folder / "model")

    def __call__(
        self,
        name: str,
        *guides: str,
        like: Like | None = None,
        soft: bool = False,
        **arguments: Any,
    ) -> np.ndarray:
        kind = getattr(diffusers, name)
        extra: dict[str, Any] = {"requires_safety_checker": False}
        if soft:
            extra["vae"] = diffusers.AutoencoderKL.from_pretrained(self.models.folder / "soft")
        if guides == ("sketch",):
            extra["adapter"] = diffusers.T2IAdapter.from_pretrained(self.models.folder / "sketch")
        elif guides:
            nets = [
                diffusers.ControlNetModel.from_pretrained(self.models.folder / guide)
                for guide in guides
            ]
            extra["controlnet"] = nets[0] if len(nets) == 1 else nets
        taken = inspect.signature(kind.__init__).parameters
        parts = {name: one for name, one in self.base.components.items() if name in taken}
        pipeline = kind(**{**parts, **extra})
        pipeline.set_progress_bar_config(disable=True)
        if like is not None:
            pipeline.unet = copy.deepcopy(self.base.unet)
            load_ip_adapter(pipeline, self.models.folder / "faces")
            pipeline.set_ip_adapter_scale(like.scale)
            arguments["ip_adapter_image"] = SECOND
            if like.mask is not None:
                masks = IPAdapterMaskProcessor().preprocess([like.mask], height=SIDE, width=SIDE)
                arguments["cross_attention_kwargs"] = {
                    "ip_adapter_masks": [masks.reshape(1, 1, SIDE, SIDE)]
                }
        image = pipeline(**COMMON, generator=torch.Generator().manual_seed(SEED), **arguments)
        return np.asarray(image.images[0]).astype(int)


# a request, and the plain call that makes the same image
CASES: dict[str, tuple[dict[str, Any], Callable[[Plain], np.ndarray]]] = {
    "none": ({}, lambda plain: plain("StableDiffusionPipeline", **SIZE)),
    "one": (
        {"controlnet": "canny", "control_image": url_of(FIRST)},
        lambda plain: plain("StableDiffusionControlNetPipeline", "canny", image=FIRST, **SIZE),
    ),
    "another": (
        {
            "controlnet": "depth",
            "control_image": url_of(FIRST),
            "controlnet_conditioning_scale": 0.5,
            "control_guidance_end": 0.5,
            "guess_mode": True,
        },
        lambda plain: plain(
            "StableDiffusionControlNetPipeline",
            "depth",
            image=FIRST,
            controlnet_conditioning_scale=0.5,
            control_guidance_end=0.5,
            guess_mode=True,
            **SIZE,
        ),
    ),
    "of another size": (
        {"controlnet": "canny", "control_image": url_of(FIRST), "size": "32x16"},
        lambda plain: plain(
            "StableDiffusionControlNetPipeline", "canny", image=FIRST, height=16, width=32
        ),
    ),
    "like, of another size": (
        {"ip_adapter": "faces", "ip_adapter_image": url_of(SECOND), "size": "32x16"},
        lambda plain: plain("StableDiffusionPipeline", like=Like(), height=16, width=32),
    ),
    "both": (
        {
            "controlnet": ["depth", "canny"],
            "control_image": [url_of(FIRST), url_of(SECOND)],
            "controlnet_conditioning_scale": [0.5, 0.8],
        },
        lambda plain: plain(
            "StableDiffusionControlNetPipeline",
            "depth",
            "canny",
            image=[FIRST, SECOND],
            controlnet_conditioning_scale=[0.5, 0.8],
            **SIZE,
        ),
    ),
    "image to image": (
        {
            "controlnet": "canny",
            "control_image": url_of(FIRST),
            "image": url_of(SOURCE),
            "strength": 0.75,
        },
        lambda plain: plain(
            "StableDiffusionControlNetImg2ImgPipeline",
            "canny",
            image=SOURCE,
            control_image=FIRST,
            strength=0.75,
        ),
    ),
    "inpainting": (
        {
            "controlnet": "depth",
            "control_image": url_of(FIRST),
            "image": url_of(SOURCE),
            "mask": url_of(MASK),
            "strength": 0.75,
        },
        lambda plain: plain(
            "StableDiffusionControlNetInpaintPipeline",
            "depth",
            image=SOURCE,
            mask_image=MASK,
            control_image=FIRST,
            strength=0.75,
            **SIZE,
        ),
    ),
    "like": (
        {"ip_adapter": "faces", "ip_adapter_image": url_of(SECOND)},
        lambda plain: plain("StableDiffusionPipeline", like=Like(), **SIZE),
    ),
    "a little like": (
        {"ip_adapter": "faces", "ip_adapter_image": url_of(SECOND), "ip_adapter_scale": 0.3},
        lambda plain: plain("StableDiffusionPipeline", like=Like(0.3), **SIZE),
    ),
    "like within a mask": (
        {
            "ip_adapter": "faces",
            "ip_adapter_image": url_of(SECOND),
            "ip_adapter_mask": url_of(MASK),
            "ip_adapter_scale": 0.8,
        },
        lambda plain: plain("StableDiffusionPipeline", like=Like(0.8, MASK), **SIZE),
    ),
    "like and guided": (
        {
            "ip_adapter": "faces",
            "ip_adapter_image": url_of(SECOND),
            "controlnet": "canny",
            "control_image": url_of(FIRST),
        },
        lambda plain: plain(
            "StableDiffusionControlNetPipeline", "canny", like=Like(), image=FIRST, **SIZE
        ),
    ),
    "image to image like": (
        {
            "ip_adapter": "faces",
            "ip_adapter_image": url_of(SECOND),
            "image": url_of(SOURCE),
            "strength": 0.75,
        },
        lambda plain: plain(
            "StableDiffusionImg2ImgPipeline", like=Like(), image=SOURCE, strength=0.75
        ),
    ),
    "adapter": (
        {"t2i_adapter": "sketch", "control_image": url_of(FIRST)},
        lambda plain: plain("StableDiffusionAdapterPipeline", "sketch", image=FIRST, **SIZE),
    ),
    "decoded": ({"vae": "soft"}, lambda plain: plain("StableDiffusionPipeline", soft=True, **SIZE)),
    "image to image decoded": (
        {"vae": "soft", "image": url_of(SOURCE), "strength": 0.75},
        lambda plain: plain(
            "StableDiffusionImg2ImgPipeline", soft=True, image=SOURCE, strength=0.75
        ),
    ),
    "inpainting decoded": (
        {"vae": "soft", "image": url_of(SOURCE), "mask": url_of(MASK), "strength": 0.75},
        lambda plain: plain(
            "StableDiffusionInpaintPipeline",
            soft=True,
            image=SOURCE,
            mask_image=MASK,
            strength=0.75,
            **SIZE,
        ),
    ),
    "guided and decoded": (
        {"vae": "soft", "controlnet": "canny", "control_image": url_of(FIRST)},
        lambda plain: plain(
            "StableDiffusionControlNetPipeline", "canny", soft=True, image=FIRST, **SIZE
        ),
    ),
    "like and decoded": (
        {"vae": "soft", "ip_adapter": "faces", "ip_adapter_image": url_of(SECOND)},
        lambda plain: plain("StableDiffusionPipeline", like=Like(), soft=True, **SIZE),
    ),
}


@pytest.mark.full  # one start of a server with all
def test_requests_with_and_without_components_get_the_plain_images_alone_and_together(
    guided: Served, models: Models
) -> None:
    plain = Plain(models)
    expected = [make(plain) for _, make in CASES.values()]
    bodies = [body for body, _ in CASES.values()]
    distinct = {image.tobytes() for image in expected}
    assert len(distinct) == len(CASES), "so that a mix-up would show"
    before = guided.engine.stats().forwards["unet"].merged_calls
    together = ask(guided, *bodies, *bodies)
    alone = [answer for body in bodies for answer in ask(guided, body)]
    for answers in (together[: len(bodies)], together[len(bodies) :], alone):
        for name, answer, image in zip(CASES, answers, expected, strict=True):
            assert np.abs(pixels(answer) - image).max() <= 1, name
    assert guided.engine.stats().forwards["unet"].merged_calls > before
    assert guided.engine.stats().errors == 0
    names = guided.engine.stats().forwards
    assert {"controlnet.canny", "controlnet.depth", "t2i_adapter.sketch"} <= names.keys()
    assert names["vae.soft.decode"].merged_calls > 0
    assert names["ip_adapter.faces"].merged_calls > 0, "of several scales, with and without a mask"


@pytest.mark.full
def test_the_model_lists_its_components_and_the_file_names_what_guided_it(guided: Served) -> None:
    [body] = [CASES["both"][0]]
    [answer] = ask(guided, body)
    told = answer.json()["parameters"]
    assert told["controlnet"] == ["depth", "canny"]
    assert told["controlnet_conditioning_scale"] == [0.5, 0.8]

    async def model() -> Any:
        async with guided._client() as client:
            return (await client.get("/v1/models")).json()["data"][0]["stepweave"]

    details = asyncio.run(model())
    components = {one["name"]: one for one in details["components"]}
    assert components.keys() == {"canny", "depth", "sketch", "faces", "soft"}
    assert "image" not in components["soft"] and components["soft"]["field"] == "vae"
    assert components["depth"] == {
        "name": "depth",
        "field": "controlnet",
        "model": "ControlNetModel",
        "image": "control_image",
        "edits": ["image_to_image", "inpainting"],
        "generations": True,
        "default": False,
        "description": "how far it is",
    }
    assert components["sketch"]["edits"] == []
    arguments = {one["name"] for one in details["arguments"]}
    assert {"controlnet", "t2i_adapter", "controlnet_conditioning_scale"} <= arguments
    assert "control_image" in {one["name"] for one in details["images"]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such autoencoder": ({"vae": "sofd"}, "'soft'"),
    "several autoencoders": ({"vae": ["soft", "soft"]}, "vae"),
    "a refiner of no model": ({"refiner": "x"}, "refiner"),
    "no such name": ({"controlnet": "cany", "control_image": url_of(FIRST)}, "'canny' or 'depth'"),
    "no image": ({"controlnet": "canny"}, "control_image is missing"),
    "another image only": (
        {"controlnet": "canny", "image": url_of(SOURCE)},
        "control_image is missing",
    ),
    "no name": ({"control_image": url_of(FIRST)}, "set controlnet to canny, depth or t2i_adapter"),
    "too few images": (
        {"controlnet": ["canny", "depth"], "control_image": url_of(FIRST)},
        "control_image is given once; 2 are needed",
    ),
    "too many images": (
        {"controlnet": "canny", "control_image": [url_of(FIRST)] * 2},
        "control_image is given 2 times; StableDiffusionControlNetPipeline takes one",
    ),
    "two fields": (
        {"controlnet": "canny", "t2i_adapter": "sketch", "control_image": url_of(FIRST)},
        "controlnet and t2i_adapter are both set",
    ),
    "not for this task": (
        {"t2i_adapter": "sketch", "control_image": url_of(FIRST), "image": url_of(SOURCE)},
        "sketch, which this model does not use for image to image",
    ),
    "a scale of nothing": ({"controlnet_conditioning_scale": 0.5}, "has no controlnet_cond"),
    "nothing to be like": ({"ip_adapter": "faces"}, "ip_adapter_image is missing"),
    "a control image only": (
        {"ip_adapter": "faces", "control_image": url_of(FIRST)},
        "set controlnet to canny",
    ),
    "like what": ({"ip_adapter_image": url_of(FIRST)}, "set ip_adapter to faces"),
    "a large scale": (
        {"ip_adapter": "faces", "ip_adapter_image": url_of(FIRST), "ip_adapter_scale": 11},
        "less than or equal to 10",
    ),
    "a scale of no adapter": ({"ip_adapter_scale": 0.5}, "has no ip_adapter_scale"),
    "an empty list": ({"controlnet": [], "control_image": url_of(FIRST)}, "controlnet is []"),
}


@pytest.mark.full
@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_by_name(
    guided: Served, body: dict[str, Any], message: str
) -> None:
    [answer] = ask(guided, body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_component_of_another_model_ends_the_start_by_its_name(models: Models) -> None:
    setting = json.dumps({"vae": str(models.folder / "model" / "unet")})
    with pytest.raises(NotServedError, match="the component 'vae' cannot be loaded: it is a UNet"):
        with serving(models.folder / "model", (), 64 * 64, STEPWEAVE_COMPONENTS=setting):
            pass


@pytest.mark.full
def test_a_component_for_another_size_of_model_ends_the_start_by_its_name(
    models: Models, tmp_path: Path
) -> None:
    """It is of the right class, and only its calls fail."""
    xl = diffusers.StableDiffusionXLPipeline(**diffusion_xl(), add_watermarker=False)
    controlnet(xl.unet).save_pretrained(tmp_path / "xl")  # type: ignore[operator]
    setting = json.dumps({"large": str(tmp_path / "xl")})
    with pytest.raises(NotServedError, match="the component 'large' does not work with this model"):
        with serving(models.folder / "model", (), 64 * 64, STEPWEAVE_COMPONENTS=setting):
            pass
