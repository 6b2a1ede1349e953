"""What is wrong with a result is said: numbers that are not finite, flags of a safety checker,
images of one colour."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from stepweave import StepEngine
from stepweave.errors import NonFiniteError
from stepweave.images.outputs import is_constant, outputs_of
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.tiny import FAMILIES, SIDE, WIDTH
from tests.support.waiting import SECONDS, wait_until

Make = Callable[..., InProcess]
# modes, and numbers of damages, besides all modes with the first
QUICK = (("step", 2), ("step", 3))
MODES = ("off", "threads", "request", "step")
SIZE = f"{SIDE}x{SIDE}"
FEW = {"num_inference_steps": 2, "size": SIZE}


def break_forward(module: nn.Module, change: Callable[[torch.Tensor], Any]) -> None:
    """From now on have a module change its own results in place."""
    whole = module.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        output = whole(*args, **kwargs)
        change(output if isinstance(output, torch.Tensor) else output[0])
        return output

    module.forward = broken


def one_pixel(value: float) -> Callable[[torch.Tensor], Any]:
    def change(tensor: torch.Tensor) -> None:
        tensor[..., 1, 2] = value

    return change


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "NaN of the denoiser": lambda pipeline: break_forward(
        pipeline.unet, lambda one: one.fill_(float("nan"))
    ),
    "infinite noise": lambda pipeline: break_forward(pipeline.unet, one_pixel(float("inf"))),
    "NaN of the autoencoder": lambda pipeline: break_forward(
        pipeline.vae.decoder, one_pixel(float("nan"))
    ),
    "overflow of the autoencoder": lambda pipeline: break_forward(
        pipeline.vae.decoder, one_pixel(float("-inf"))
    ),
    "NaN weights": lambda pipeline: nn.init.constant_(
        pipeline.vae.decoder.conv_out.weight, float("nan")
    ),
}


class OwnWay(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    """Makes its images without diffusers' helpers."""

    @torch.no_grad()
    @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        latents = super().__call__(*args, **kwargs | {"output_type": "latent"}).images
        image = (self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        pixels = (image.permute(0, 2, 3, 1).nan_to_num(0.0) * 255).byte().numpy()
        return SimpleNamespace(images=[Image.fromarray(one) for one in pixels])


def tiny(kind: Any = diffusers.StableDiffusionPipeline, **parts: Any) -> Any:
    made = FAMILIES["stable_diffusion"].build()
    pipeline = kind(**made.components | parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("damage", "mode"),
    [
        pytest.param(damage, mode, marks=() if (mode, number) in QUICK else pytest.mark.full)
        for number, damage in enumerate(DAMAGES)
        for mode in MODES
    ],
)
def test_numbers_that_are_not_finite_fail_the_request(
    in_process: Make, mode: str, damage: str
) -> None:
    app = in_process(tiny(), batching=mode, max_rows=4, warmup=False)
    assert app.post(**FEW).status_code == 200
    DAMAGES[damage](app.pipeline)
    answer = app.post(**FEW, n=2)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "non_finite"
    assert answer.headers["X-Should-Retry"] == "false"
    app.until_metric(2, "stepweave_images_total", result="non_finite")
    app.until_metric(1, "stepweave_requests_total", outcome="failed")
    app.until_metric(0, "stepweave_requests_in_flight")


def test_a_pipeline_that_makes_images_its_own_way(in_process: Make) -> None:
    app = in_process(tiny(OwnWay), batching="step", max_rows=4, warmup=False)
    assert app.post(**FEW).status_code == 200
    DAMAGES["NaN of the autoencoder"](app.pipeline)
    answer = app.post(**FEW)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "non_finite")


def test_numbers_beside_the_images_hide_nothing(in_process: Make) -> None:
    class Scored(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        @torch.no_grad()
        @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            made = super().__call__(*args, **kwargs)
            return SimpleNamespace(images=made.images, scores=np.array([0.5]))

    app = in_process(tiny(Scored), batching="step", max_rows=4, warmup=False)
    assert app.post(**FEW).json()["outputs"] == {"scores": [0.5]}
    DAMAGES["NaN of the autoencoder"](app.pipeline)
    answer = app.post(**FEW)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "non_finite")


class Floats(FakePipeline):
    """Its images are of floating-point numbers."""

    value = 0.5

    @functools.wraps(FakePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        made = super().__call__(*args, **kwargs)
        pixels = np.zeros((64, 64), np.float32)
        pixels[1:] = self.value
        return SimpleNamespace(images=[Image.fromarray(pixels) for _ in made.images])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_images_of_floating_point_numbers(in_process: Make, output_format: str) -> None:
    app = in_process(Floats(), warmup=False)
    app.pipeline.value = 200.0
    assert app.post(size="64x64", output_format=output_format).status_code == 200
    app.pipeline.value = float("nan")
    answer = app.post(size="64x64", output_format=output_format)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "non_finite")


def test_pixels_without_an_autoencoder() -> None:
    """A pipeline whose denoiser makes the pixels, which it clamps: infinity would be white."""
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
        ),
        diffusers.DDPMScheduler(clip_sample=False),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with StepEngine(pipeline) as engine:
        engine.submit(num_inference_steps=2).result(SECONDS)
        break_forward(pipeline.unet, lambda one: one.fill_(float("nan")))
        with pytest.raises(NonFiniteError):
            engine.submit(num_inference_steps=2).result(SECONDS)


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_tensors_that_the_caller_asked_for_are_given_as_the_plain_call_gives_them(
    output_type: str,
) -> None:
    pipeline = tiny()
    DAMAGES["NaN of the denoiser"](pipeline)
    arguments = {
        "num_inference_steps": 2,
        "height": SIDE,
        "width": SIDE,
        "output_type": output_type,
    }
    with StepEngine(pipeline) as engine:
        images = engine.submit("a circle", **arguments).result(SECONDS).images
    assert np.isnan(np.asarray(images)).any()


@pytest.mark.parametrize("mode", MODES)
def test_only_the_job_whose_numbers_overflow_fails(mode: Any) -> None:
    """In shared forwards and, with whole requests shared, in one call of the pipeline."""
    pipeline = tiny()
    arguments = {"num_inference_steps": 2, "height": SIDE, "width": SIDE}

    def request(seed: int) -> dict[str, Any]:
        return arguments | {"prompt": "a circle", "generator": torch.Generator().manual_seed(seed)}

    marked: list[float] = []
    whole = pipeline.vae.decoder.forward

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        image: torch.Tensor = whole(latents, *args, **kwargs)
        for row, mean in enumerate(latents.mean((1, 2, 3)).tolist()):
            if any(abs(mean - one) < 1e-4 for one in marked):
                image[row, 0, 0, 0] = float("nan")
        return image

    pipeline.vae.decoder.forward = decode
    latents = pipeline(**request(3), output_type="latent").images
    through = pipeline.vae.post_quant_conv(latents / pipeline.vae.config.scaling_factor)
    marked.append(float(through.detach().mean()))
    with StepEngine(pipeline, mode) as engine:
        jobs = [engine.submit(**request(seed)) for seed in (1, 2, 3, 4)]
        errors = [job.exception(SECONDS) for job in jobs]
    assert [type(one) for one in errors] == [type(None), type(None), NonFiniteError, type(None)]


def test_every_surface_says_so(in_process: Make) -> None:
    app = in_process(tiny(), batching="off", warmup=False, base_url="http://testserver")
    DAMAGES["NaN of the autoencoder"](app.pipeline)
    body = {"prompt": "a circle", **FEW}
    for path, answer in {
        "json": app.client.post("/v1/images/generations", json=body),
        "image": app.client.post(
            "/v1/images/generations", json=body, headers={"Accept": "image/png"}
        ),
        "example server": app.client.post(
            "/api/diffusers/inference", json={"prompt": "a circle", "num_inference_steps": 2}
        ),
    }.items():
        assert answer.status_code == 500, path
        assert answer.json()["error"]["code"] == "non_finite", path
    tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a circle"]}
    answer = app.client.post(
        f"/v2/models/{app.server.ready()[0].id}/infer", json={"inputs": [tensor]}
    )
    assert answer.status_code == 500
    assert "not finite" in str(answer.json()["error"])
    streamed = app.client.post("/v1/images/generations", json=body | {"stream": True})
    assert [one.name for one in read_events(streamed.text)] == ["error"]
    assert "non_finite" in streamed.text
    job = app.client.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"})
    url = job.headers["Location"]
    wait_until(lambda: app.client.get(url).json()["state"] in ("succeeded", "failed"))
    assert app.client.get(url).json()["error"]["code"] == "non_finite"


@pytest.mark.parametrize(
    "mode", [*(pytest.param(mode, marks=pytest.mark.full) for mode in MODES[:-1]), "step"]
)
def test_a_warm_up_that_is_not_finite_never_turns_ready(in_process: Make, mode: str) -> None:
    pipeline = tiny()
    DAMAGES["NaN weights"](pipeline)
    app = in_process(pipeline, batching=mode, max_rows=4, ready=False)
    app.server.start()
    wait_until(lambda: app.server.status.stage in ("ready", "failed"))
    answer = app.client.get("/readyz")
    assert answer.status_code == 503
    assert "not finite" in answer.text
    assert "STEPWEAVE_DTYPE" in answer.text


def read_events(text: str) -> list[SimpleNamespace]:
    """The events of a stream, in order: `name` and `data`."""
    blocks = [block for block in text.split("\n\n") if block.startswith("event")]
    pairs = [tuple(line.partition(": ")[2] for line in block.split("\n")) for block in blocks]
    return [SimpleNamespace(name=name, data=json.loads(data)) for name, data in pairs]


# Flags


class Flagging(FakePipeline):
    """Says more than its images."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, Any] = {}

    @functools.wraps(FakePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        vars(output).update(self.said)
        return output


@pytest.mark.parametrize(
    "name", ["nsfw_content_detected", "nsfw_detected", "watermark_detected", "unsafe"]
)
def test_flags_come_with_every_image(in_process: Make, name: str) -> None:
    pipeline = Flagging()
    app = in_process(pipeline, base_url="http://testserver")
    pipeline.said = {name: [False, True]}
    answer = app.post(n=2).json()
    assert [one["flagged"] for one in answer["data"]] == [False, True]
    [warning] = answer["warnings"]
    assert name in warning
    assert "image 1" in warning
    assert app.metric("stepweave_images_total", result="flagged") == 1
    url = app.post(n=2, response_format="url").json()
    assert [one["flagged"] for one in url["data"]] == [False, True]

    pipeline.said = {name: [np.True_]}
    image = app.client.post(
        "/v1/images/generations", json={"prompt": "a circle"}, headers={"Accept": "image/png"}
    )
    assert image.headers["X-Stepweave-Flagged"] == "true"
    assert name in image.headers["X-Stepweave-Warnings"]
    streamed = app.client.post(
        "/v1/images/generations", json={"prompt": "a circle", "stream": True}
    )
    [done] = [one for one in read_events(streamed.text) if one.name.endswith("completed")]
    assert done.data["flagged"] is True
    tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a circle"]}
    answer = app.client.post(
        f"/v2/models/{app.server.ready()[0].id}/infer", json={"inputs": [tensor]}
    )
    outputs = {one["name"]: one["data"][0] for one in answer.json()["outputs"]}
    assert json.loads(outputs["parameters"])["flagged"] is True
    legacy = app.client.post("/api/diffusers/inference", json={"prompt": "a circle"})
    assert name in legacy.headers["X-Stepweave-Warnings"]


def test_flags_of_a_job_are_kept(in_process: Make) -> None:
    pipeline = Flagging()
    app = in_process(pipeline)
    pipeline.said = {"nsfw_content_detected": [True]}
    job = app.client.post(
        "/v1/images/generations", json={"prompt": "a circle"}, headers={"Prefer": "respond-async"}
    )
    url = job.headers["Location"]
    wait_until(lambda: app.client.get(url).json()["state"] == "succeeded")
    wait_until(lambda: app.metric("stepweave_requests_in_flight") == 0)  # it is kept now
    kept = app.client.get(url).json()
    assert kept["result"]["data"][0]["flagged"] is True
    assert "flagged" not in kept["result"]
    assert any("nsfw_content_detected" in one for one in kept["warnings"])


def test_flagged_images_are_refused_if_a_setting_says_so(in_process: Make) -> None:
    pipeline = Flagging()
    app = in_process(pipeline, flagged_images="refuse")
    pipeline.said = {"nsfw_content_detected": [False, True]}
    answer = app.post(n=2)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "content_policy_violation"
    assert "Image 1" in answer.json()["error"]["message"]
    assert app.metric("stepweave_images_total", result="flagged") == 1
    pipeline.said = {"nsfw_content_detected": [False, False]}
    assert app.post(n=2).status_code == 200
    pipeline.said = {"nsfw_content_detected": None}
    assert app.post(n=2).status_code == 200


def test_other_outputs_are_passed_on_or_named(in_process: Make) -> None:
    pipeline = Flagging()
    app = in_process(pipeline)
    pipeline.said = {
        "applied_safety_concept": "a concept",
        "scores": torch.tensor([0.5]),
        "depth": torch.zeros(64, 64),
    }
    answer = app.post().json()
    assert answer["outputs"] == {"applied_safety_concept": "a concept", "scores": [0.5]}
    [warning] = answer["warnings"]
    assert "'depth'" in warning
    assert answer["data"][0]["flagged"] is False


@pytest.mark.parametrize("value", [np.array([1.0]), [[True]], torch.ones(1), [1.0]])
def test_a_flag_of_other_types_is_one_too(value: Any) -> None:
    assert outputs_of(SimpleNamespace(images=[None], nsfw_content_detected=value), 1).flagged == [
        True
    ]


@pytest.mark.parametrize("value", [["yes"], "blocked", [[True, False]]])
def test_what_may_be_a_flag_and_cannot_be_read_is_a_warning(value: Any) -> None:
    found = outputs_of(SimpleNamespace(images=[None], nsfw_content_detected=value), 1)
    assert found.flagged == [False] and "nsfw_content_detected" in found.warnings[0]


@pytest.mark.parametrize("value", [10**5000, "\ud800", -(2**60)], ids=["huge", "half", "large"])
def test_what_json_cannot_carry_is_named(value: Any) -> None:
    found = outputs_of(SimpleNamespace(images=[None], extra=value), 1)
    assert found.others == {} and "extra" in found.warnings[0]


def test_a_verdict_of_another_length_is_no_verdict_on_single_images() -> None:
    found = outputs_of(SimpleNamespace(images=[], nsfw_content_detected=[True, False, True]), 2)
    assert found.flagged == [False, False]
    assert found.others == {"nsfw_content_detected": [True, False, True]}
    assert outputs_of(SimpleNamespace(nsfw_detected=True), 2).flagged == [True, True]
    assert outputs_of(SimpleNamespace(is_safe=[True, False]), 2).flagged == [False, True]


def checker(threshold: float) -> Any:
    """diffusers' own safety checker, which flags what is nearer to its concepts than a
    threshold."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    made = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(vision_config=vision, projection_dim=WIDTH)
    )
    made.concept_embeds.data = torch.randn(17, WIDTH)
    made.special_care_embeds.data = torch.randn(3, WIDTH)
    made.concept_embeds_weights.data.fill_(threshold)
    made.special_care_embeds_weights.data.fill_(threshold)
    return made.eval()


@pytest.mark.parametrize(
    "mode", [*(pytest.param(mode, marks=pytest.mark.full) for mode in MODES[:-1]), "step"]
)
def test_a_real_safety_checker_blacks_out_and_says_so(in_process: Make, mode: str) -> None:
    features = transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    app = in_process(
        tiny(safety_checker=checker(-2.0), feature_extractor=features),
        batching=mode,
        max_rows=4,
        warmup=False,
    )
    answer = app.post(**FEW, n=2).json()
    assert [one["flagged"] for one in answer["data"]] == [True, True]
    assert all("nsfw_content_detected" in one for one in answer["warnings"])
    harmless = in_process(
        tiny(safety_checker=checker(2.0), feature_extractor=features),
        batching=mode,
        max_rows=4,
        warmup=False,
    )
    answer = harmless.post(**FEW).json()
    assert answer["data"][0]["flagged"] is False
    assert answer["warnings"] == []


def test_no_preview_shows_what_a_safety_checker_would_take_out(in_process: Make) -> None:
    features = transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    app = in_process(
        tiny(safety_checker=checker(-2.0), feature_extractor=features),
        batching="step",
        max_rows=4,
        warmup=False,
    )
    assert app.client.get("/v1/models").json()["data"][0]["stepweave"]["previews"] is False
    body = {"prompt": "a circle", **FEW, "stream": True, "partial_images": 2}
    names = [
        one.name for one in read_events(app.client.post("/v1/images/generations", json=body).text)
    ]
    assert names == ["image_generation.completed"]


# One colour


class Grey(FakePipeline):
    @functools.wraps(FakePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        return SimpleNamespace(
            images=[Image.new("RGB", one.size, (9, 9, 9)) for one in output.images]
        )


def test_an_image_of_one_colour_is_a_warning_and_counted(in_process: Make) -> None:
    app = in_process(Grey(), warmup=False)
    answer = app.post(n=2)
    assert answer.status_code == 200
    assert ["one colour" in one for one in answer.json()["warnings"]] == [True, True]
    assert app.metric("stepweave_images_total", result="constant") == 2
    assert app.metric("stepweave_images_total", result="ok") == 0


def test_what_is_one_colour() -> None:
    assert is_constant(Image.new("L", (3, 3), 7))
    assert is_constant(Image.new("RGBA", (3, 3), (1, 2, 3, 4)))
    assert not is_constant(Image.linear_gradient("L"))
    two = Image.new("RGB", (2, 1))
    two.putpixel((1, 0), (0, 0, 1))
    assert not is_constant(two)
