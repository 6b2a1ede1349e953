from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import SkipLayerGuidance
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepweave import StepEngine
from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import InvalidRequestError, LoadError
from stepweave.loading.loader import load_pipeline
from stepweave.loading.sizes import nearest_size
from stepweave.planning.cost import CostModel
from stepweave.serving.inputs import hint_names, is_repainted
from stepweave.serving.kinds import IMAGE_TO_IMAGE, INPAINTING, Kind
from stepweave.serving.model import ServedModel
from stepweave.serving.warm_up import WarmUp, warm_up
from tests.support.fake_pipeline import FakeEdits, FakePipeline
from tests.support.in_process import InProcess
from tests.support.resolving import resolve
from tests.support.uploads import sources_of
from tests.support.waiting import SECONDS


def test_a_preset_overrides_the_pipelines_defaults() -> None:
    preset = Preset(id="tiny", width=32, height=48, num_inference_steps=3, guidance_scale=1.5)
    model = ServedModel(FakePipeline(), preset, Settings())
    resolved = resolve(model, prompt="x", seed=1)
    assert model.id == "tiny"
    assert (resolved.width, resolved.height) == (32, 48)
    assert (resolved.num_inference_steps, resolved.guidance_scale) == (3, 1.5)


def test_a_presets_call_arguments_reach_the_call_and_must_exist() -> None:
    pipeline = FakePipeline()
    model = ServedModel(pipeline, Preset(call={"negative_prompt": "blue"}), Settings())
    pipeline(**model.call(resolve(model, prompt="x")))
    assert pipeline.record.calls[0]["negative_prompt"] == "blue"
    for name, hint in (
        ("max_sequence_length", "it takes prompt, negative_prompt"),
        ("negative", "did you mean 'negative_"),
    ):
        with pytest.raises(LoadError) as caught:
            ServedModel(pipeline, Preset(call={name: 1}), Settings())
        told = f"stepweave.json: call.{name}: FakePipeline takes no argument {name!r} ({hint}"
        assert caught.value.message.startswith(told), caught.value.message


def test_what_a_pipeline_lacks_is_refused_not_dropped() -> None:
    class Plain(FakePipeline):
        def __call__(
            self,
            prompt,
            num_inference_steps=4,
            generator=None,
            height=64,
            width=64,
            output_type="pil",
        ):  # type: ignore[no-untyped-def,override]
            return super().__call__(
                prompt,
                num_inference_steps=num_inference_steps,
                generator=generator,
                height=height,
                width=width,
            )

    model = ServedModel(Plain(), Preset(), Settings())
    assert resolve(model, prompt="x").guidance_scale is None
    assert len(Plain()(**model.call(resolve(model, prompt="x"))).images) == 1
    for name, value in (("guidance_scale", 3.0), ("negative_prompt", "blue")):
        with pytest.raises(InvalidRequestError, match=f"Plain has no {name}"):
            resolve(model, prompt="x", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="n is 2"):
        resolve(model, prompt="x", n=2)


# --- edits ---


def edits() -> ServedModel:
    return ServedModel(FakePipeline(edits=True), Preset(), Settings())


@functools.cache
def edits_once() -> ServedModel:
    return edits()


def gradient(width: int = 64, height: int = 64) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def test_a_model_without_siblings_refuses_edits_by_its_class() -> None:
    model = ServedModel(FakePipeline(), Preset(), Settings())
    assert model.edits == () and model.schedulers == {}
    for param, mask, kind in (
        ("image", None, "image-to-image"),
        ("mask", Image.new("L", (64, 64)), "inpainting"),
    ):
        with pytest.raises(
            InvalidRequestError, match=f"FakePipeline does not support {kind}"
        ) as caught:
            resolve(model, prompt="x", sources=sources_of(gradient(), mask))
        assert (caught.value.param, caught.value.code) == (param, "unsupported")
    with pytest.raises(InvalidRequestError, match=r"strength is 0\.5, but no image is given"):
        resolve(model, prompt="x", strength=0.5)


def test_an_edit_has_the_size_of_its_source_or_the_nearest_that_is_allowed() -> None:
    model = edits()
    assert model.edits == ("image_to_image", "inpainting")
    for size, expected in (
        ((40, 24), (40, 24)),
        ((41, 30), (40, 32)),
        ((1, 100), (8, 104)),
        ((2000, 1500), (2000, 1504)),
        ((3000, 3000), (64, 64)),  # as many pixels as the model's own size
        ((4000, 3000), (72, 56)),
        ((3024, 4032), (56, 72)),
        ((9248, 6936), (72, 56)),
    ):
        resolved = resolve(model, prompt="x", sources=sources_of(gradient(*size)))
        assert (resolved.width, resolved.height) == expected, size
    resolved = resolve(model, prompt="x", sources=sources_of(gradient(41, 30)), size="16x64")
    assert (resolved.width, resolved.height) == (16, 64)
    assert resolve(model, prompt="x", sources=sources_of(gradient(24, 24)), size="auto").width == 24


@settings(max_examples=150, deadline=None)
@given(size=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), masked=st.booleans())
def test_the_size_of_an_edit_is_that_of_an_edit_of_it(size: tuple[int, int], masked: bool) -> None:
    """Sources are scaled before they are resolved."""
    model = edits_once()
    try:
        wanted = model.size_of_edit(size, None, masked=masked)
    except InvalidRequestError as error:
        assert max(size) > 16 * min(size) and error.param == "image"
    else:
        assert model.size_of_edit(wanted, None, masked=masked) == wanted
    assert model.size_of_edit(size, "64x32", masked=masked) == (64, 32)


def test_the_size_of_an_edit_that_the_model_cannot_make_is_refused() -> None:
    model = edits_once()
    with pytest.raises(InvalidRequestError, match="size is '63x64'") as caught:
        model.size_of_edit((64, 64), "63x64", masked=False)
    assert caught.value.param == "size"
    model = edits()
    model.drop(Kind(INPAINTING))
    assert model.size_of_edit((64, 64), "auto", masked=False) == (64, 64)
    with pytest.raises(InvalidRequestError, match="does not support inpainting") as caught:
        model.size_of_edit((64, 64), None, masked=True)
    assert (caught.value.param, caught.value.code) == ("mask", "unsupported")


@pytest.mark.parametrize("size", [(4_194_304, 1), (1, 100_000), (8193, 16)])
def test_a_source_that_would_become_a_thread_is_refused_unless_a_size_is_given(
    size: tuple[int, int],
) -> None:
    model, source = edits(), mock.Mock(size=size)
    with pytest.raises(
        InvalidRequestError, match=f"image is {size[0]}x{size[1]}; .* limit is 8192 a side"
    ) as caught:
        resolve(model, prompt="x", sources=sources_of(source))
    assert caught.value.param == "image"
    assert resolve(model, prompt="x", sources=sources_of(source), size="64x64").width == 64
    assert resolve(model, prompt="x", sources=sources_of(mock.Mock(size=(8192, 16)))).width == 8192
    sizes = replace(model.limits.sizes, max_side=512)  # then it has the model's longest side
    assert max(sizes.of_edit(size)) == 512


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    multiple=st.sampled_from([8, 16, 32]),
    most=st.none() | st.integers(64, 4096),
    pixels=st.integers(64 * 64, 2048 * 2048),
)
def test_the_nearest_size_is_allowed_and_in_proportion(
    size: tuple[int, int], multiple: int, most: int | None, pixels: int
) -> None:
    width, height = nearest_size(size, multiple, most, pixels)
    assert width % multiple == height % multiple == 0 and width and height
    assert width * height <= pixels and (most is None or max(width, height) <= most)
    if min(width, height) > 2 * multiple:
        assert abs(width / height / (size[0] / size[1]) - 1) < 1.2 * multiple / min(width, height)
    allowed = (
        size[0] % multiple == size[1] % multiple == 0
        and size[0] * size[1] <= pixels
        and max(size) <= (most or max(size))
    )
    assert not allowed or (width, height) == size


def test_an_edit_calls_the_sibling_with_images_of_the_size() -> None:
    model = edits()
    mask = Image.new("L", (41, 30))
    mask.paste(255, (20, 0, 41, 30))
    call = model.call(
        resolve(model, prompt="x", n=2, strength=0.5, sources=sources_of(gradient(41, 30), mask))
    )
    assert call["pipeline"] is model.pipelines.tasks()[INPAINTING]
    assert [image.size for image in call["image"]] == [(40, 32)] * 2
    assert (
        call["mask_image"].size == (40, 32)
        and call["strength"] == 0.5
        and call["num_images_per_prompt"] == 2
    )
    with StepEngine(model.pipeline, "off") as engine:
        assert len(engine.submit(**call).result(SECONDS).images) == 2
    call = model.call(resolve(model, prompt="x", sources=sources_of(gradient())))
    assert call["pipeline"] is model.pipelines.tasks()[IMAGE_TO_IMAGE]
    assert call["strength"] == 0.6  # the sibling's own
    assert "pipeline" not in model.call(resolve(model, prompt="x"))


@pytest.mark.parametrize(
    ("arguments", "param", "says"),
    [
        ({"strength": 0.0}, "strength", r"strength is 0\.0; it must be more than 0 and at most 1"),
        ({"strength": 1.01}, "strength", r"strength is 1\.01"),
        ({"strength": float("nan")}, "strength", "strength is nan"),
        (
            {"strength": 0.3, "num_inference_steps": 3},
            "strength",
            r"strength is 0\.3 and num_inference_steps is 3",
        ),
        (
            {"sources": sources_of(gradient(), Image.new("L", (64, 32)))},
            "mask",
            "mask is 64x32 and image 64x64",
        ),
        ({"size": "65x64"}, "size", "size is '65x64'"),
        (
            {"scheduler": "os.system"},
            "scheduler",
            "scheduler is 'os.system'; FakeEdits supports only its own",
        ),
    ],
)
def test_what_an_edit_cannot_have_is_named(
    arguments: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        resolve(edits(), **{"prompt": "x", "sources": sources_of(gradient()), **arguments})
    assert caught.value.param == param


def test_an_edit_that_fails_at_warm_up_is_not_offered() -> None:
    class Failing(FakeEdits):
        def __call__(
            self, *args: Any, mask_image: Any = None, image: Any = None, **kwargs: Any
        ) -> Any:
            raise ValueError("of 16 channels or none")

    pipeline = FakePipeline(edits=True)
    pipeline.inpaint = Failing(pipeline)
    model = ServedModel(pipeline, Preset(), Settings())
    assert model.edits == ("image_to_image", "inpainting")
    with StepEngine(pipeline, "off") as engine:
        warm_up(model, engine)
    assert model.edits == ("image_to_image",)


def test_an_edit_that_the_engine_does_not_take_is_not_offered(
    in_process: Callable[..., InProcess],
) -> None:
    """Its calls change modules, so that others may not run beside; found out though nothing is
    warmed up."""

    class Perturbing(FakeEdits):
        @property
        def components(self) -> dict[str, Any]:
            return super().components | {
                "guider": SkipLayerGuidance(skip_layer_guidance_layers=[0])
            }

    pipeline = FakePipeline(edits=True)
    pipeline.inpaint = Perturbing(pipeline)
    assert in_process(pipeline, batching="off", warmup=False).server.model.edits == (
        "image_to_image",
        "inpainting",
    )
    app = in_process(pipeline, batching="threads", warmup=False)
    assert app.server.model.edits == ("image_to_image",)
    (served,) = app.client.get("/v1/models").json()["data"]
    assert served["stepweave"]["edits"] == ["image_to_image"]


# --- the embedded model ---


@pytest.fixture(scope="module")
def shapes() -> Iterator[tuple[ServedModel, StepEngine]]:
    """The embedded model, and a warm engine of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # this one and the engine's are enough for the cores
    limits = Settings(max_rows=4)
    pipeline, preset = load_pipeline(limits, torch.device("cpu"), torch.float32)
    model = ServedModel(pipeline, preset, limits)
    with StepEngine(pipeline, max_rows=4) as engine:
        with mock.patch("stepweave.serving.warm_up.PROFILE_SECONDS", 0):
            warm_up(model, engine)
        yield model, engine
    torch.set_num_threads(threads)


def drawn(shapes: tuple[ServedModel, StepEngine], **arguments: Any) -> list[np.ndarray]:
    """Its images, of floats in [0, 1]."""
    model, engine = shapes
    parameters = resolve(model, **{"num_inference_steps": 10, **arguments})
    images = engine.submit(**model.call(parameters)).result(SECONDS).images
    return [np.asarray(image, float) / 255 for image in images]


@pytest.fixture(scope="module")
def star(shapes: tuple[ServedModel, StepEngine]) -> Image.Image:
    (image,) = drawn(shapes, prompt="a large red star", seed=1)
    return Image.fromarray((image * 255).round().astype(np.uint8))


def apart(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def test_image_to_image_goes_as_far_from_its_source_as_its_strength(
    shapes: tuple[ServedModel, StepEngine], star: Image.Image
) -> None:
    source = np.asarray(star, float) / 255
    far = [
        apart(
            drawn(
                shapes,
                prompt="a large blue ring",
                seed=2,
                strength=strength,
                sources=sources_of(star),
            )[0],
            source,
        )
        for strength in (0.1, 0.4, 0.9)
    ]
    assert far[0] < 0.03  # 0.014, of which the autoencoder makes as much
    assert far[0] < far[1] < far[2] and far[2] > 0.1


def test_inpainting_keeps_what_the_mask_does_not_cover(
    shapes: tuple[ServedModel, StepEngine], star: Image.Image
) -> None:
    mask = Image.new("L", star.size)
    mask.paste(255, (32, 0, 64, 64))
    source = np.asarray(star, float) / 255
    (result,) = drawn(
        shapes, prompt="a large blue ring", seed=2, strength=1.0, sources=sources_of(star, mask)
    )
    assert apart(result[:, :24], source[:, :24]) < 0.03
    assert apart(result[:, 36:], source[:, 36:]) > 0.08


def test_each_image_of_an_edit_is_that_of_its_own_seed(
    shapes: tuple[ServedModel, StepEngine], star: Image.Image
) -> None:
    mask = Image.new("L", star.size, 255)
    for sources in (sources_of(star), sources_of(star, mask)):
        arguments: dict[str, Any] = {
            "prompt": "blue ring",
            "num_inference_steps": 4,
            "sources": sources,
        }
        together = drawn(shapes, **arguments, seed=5, n=2)
        for i in range(2):
            assert apart(together[i], drawn(shapes, **arguments, seed=5 + i)[0]) < 1e-3
        assert apart(*together) > 0.01


def test_every_scheduler_that_is_allowed_draws_the_same_star(
    shapes: tuple[ServedModel, StepEngine], star: Image.Image
) -> None:
    model = shapes[0]
    own = "FlowMatchEulerDiscreteScheduler"
    assert set(model.schedulers) == {
        own,
        "FlowMatchHeunDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
    }
    assert resolve(model, prompt="x", scheduler=own).scheduler is None
    source = np.asarray(star, float) / 255
    for name in model.schedulers.keys() - {own}:
        assert resolve(model, prompt="x", scheduler=name).scheduler == name
        (result,) = drawn(shapes, prompt="a large red star", seed=1, scheduler=name)
        assert 0 < apart(result, source) < 0.02, name
    (edit,) = drawn(
        shapes,
        prompt="x",
        strength=0.1,
        scheduler="FlowMatchHeunDiscreteScheduler",
        sources=sources_of(star),
    )
    assert apart(edit, source) < 0.03
    with pytest.raises(InvalidRequestError, match="FlowMatchEuler.*FlowMatchHeun") as caught:
        resolve(model, prompt="x", scheduler="UniPCMultistepScheduler", sources=sources_of(star))
    assert caught.value.param == "scheduler" and "UniPC" in caught.value.message


def certified(engine: StepEngine) -> set[tuple[str, str]]:
    """The calls that are certified, with the shapes of what they are given."""
    found = engine.stats().certificates
    return {(one["call"], one["sample"]) for one in found if one["state"] == "certified"}


def test_warm_up_certifies_every_call_at_two_sizes(shapes: tuple[ServedModel, StepEngine]) -> None:
    """Though there is no time for the cost model, as on a slow machine."""
    model, engine = shapes
    counts = Counter(call for call, _ in certified(engine))
    assert counts == {
        "text_encoder": 1,
        "text_encoder_2": 1,
        "transformer": 2,
        "vae.encode": 1,
        "vae.decode": 2,
    }
    estimate = engine.estimate(
        **model.call(resolve(model, prompt="x", sources=sources_of(gradient())))
    )
    assert estimate is not None and estimate.solo > 0
    assert model.edits == ("image_to_image", "inpainting")


@pytest.mark.full
def test_what_a_warm_up_certifies_does_not_depend_on_the_clock(
    shapes: tuple[ServedModel, StepEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no row seems to pay, and images are read as slowly as they are on a busy machine, one
    after the other."""
    read, lock = VaeImageProcessor.preprocess, threading.Lock()

    def slowly(*args: Any, **kwargs: Any) -> Any:
        with lock:
            time.sleep(0.02)
            return read(*args, **kwargs)

    monkeypatch.setattr(VaeImageProcessor, "preprocess", slowly)
    monkeypatch.setattr(CostModel, "knee", lambda self, key, most: 1)
    monkeypatch.setattr("stepweave.serving.warm_up.PROFILE_SECONDS", 0)
    for rows in (4,):
        limits = Settings(max_rows=rows)
        pipeline, preset = load_pipeline(limits, torch.device("cpu"), torch.float32)
        model = ServedModel(pipeline, preset, limits)
        with StepEngine(pipeline, max_rows=rows) as engine:
            warm_up(model, engine)
            assert certified(engine) == certified(shapes[1])


def test_the_jobs_of_a_warm_up_start_together() -> None:
    """Or whether they meet, and are certified, would depend on how fast they are submitted."""
    pipeline = FakePipeline()
    model = ServedModel(pipeline, Preset(), Settings(max_rows=8))
    waiting: list[int] = []
    with StepEngine(pipeline, "step", max_rows=8) as engine:
        submit = engine.submit

        def slowly(**call: Any) -> Any:
            job = submit(**call)
            time.sleep(0.02)
            waiting.append(pipeline.record.steps_run)
            return job

        with mock.patch.object(engine, "submit", slowly):
            WarmUp(model, engine).run_together((64, 64), 4)
    assert waiting == [0] * 4 and pipeline.record.steps_run == 2 + 3 + 4 + 2


def test_only_what_an_edit_begins_with_is_repainted_where_it_is_transparent() -> None:
    guided = diffusers.StableDiffusionControlNetPipeline
    edits = [diffusers.StableDiffusionPipeline, diffusers.StableDiffusionInpaintPipeline, guided]
    assert is_repainted("image", edits)
    for name in ("control_image", "ip_adapter_image", "example_image"):
        assert not is_repainted(name, edits), name
    assert is_repainted("original_image", [diffusers.IFInpaintingSuperResolutionPipeline])
    given = ("image", "control_image", "ip_adapter_image", "ip_adapter_mask")
    of_components = {"control_image", "ip_adapter_mask"}
    assert hint_names(given, diffusers.StableDiffusionImg2ImgPipeline) == of_components
    assert hint_names(["image"], diffusers.StableDiffusionImg2ImgPipeline) == set()
    assert hint_names(["image"], guided) == {"image"}, "of a model that is guided itself"
    assert hint_names(given, guided) == of_components
    assert hint_names(["image"], None) == set()
