"""Image to image and inpainting: pipelines that share the modules of the engine's own, and its
forwards."""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.import_utils import DummyObject
from PIL import Image

from stepweave import StepEngine
from stepweave.engine import Mode
from stepweave.errors import EngineMisuseError
from stepweave.loading.edit_pipelines import Edit, edit_pipeline, edit_pipeline_class
from stepweave.loading.rehearsal import Course
from stepweave.loading.schedulers import FIRST, STEPS, Rehearsals, rehearse
from stepweave.planning.workload import shape_of
from tests.support.comparing import state_of
from tests.support.tiny import FAMILIES, SIDE, Family, networks
from tests.support.waiting import SECONDS

TOLERANCE = 1e-4  # of pixels in [0, 1]; measured: 2e-6
PROMPTS = ["a red circle", "two small dogs on a road", "x", "three yellow triangles"]
MERGED = 0.4  # the least share of the denoiser's calls that shared a forward

pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")

# all but the inpainting of Stable Diffusion 3, which takes 16 latent channels and no fewer
CASES: list[tuple[str, Edit]] = [
    ("stable_diffusion", "image_to_image"),
    ("stable_diffusion", "inpaint"),
    ("stable_diffusion_xl", "image_to_image"),
    ("stable_diffusion_xl", "inpaint"),
    ("stable_diffusion_3", "image_to_image"),
    ("flux", "image_to_image"),
    ("flux", "inpaint"),
    ("qwen_image", "image_to_image"),
    ("qwen_image", "inpaint"),
]
REPEATS = [  # much like others
    ("stable_diffusion_xl", "image_to_image"),
    ("stable_diffusion_xl", "inpaint"),
    ("qwen_image", "inpaint"),
]
every_case = pytest.mark.parametrize(("name", "edit"), CASES)


@functools.cache
def built(name: str) -> Any:
    return FAMILIES[name].build()


@functools.cache
def sibling_of(name: str, edit: Edit) -> Any:
    return edit_pipeline(built(name), edit)


def source_image(i: int) -> Image.Image:
    return Image.linear_gradient("L").rotate(90 * i).resize((SIDE, SIDE)).convert("RGB")


def right_half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    return mask


def call(family: Family, i: int, edit: Edit | None, **changes: Any) -> dict[str, Any]:
    """The arguments of the i-th job, an edit or not."""
    arguments = family.arguments(PROMPTS[i % 4], seed=i, steps=3 + i % 3, **changes)
    if edit is None:
        return arguments
    arguments |= {"image": source_image(i), "strength": (0.5, 0.8)[i % 2]}
    if edit == "inpaint":
        arguments["mask_image"] = right_half()
    takes = inspect.signature(sibling_of(family.name, edit).__call__).parameters
    return {name: value for name, value in arguments.items() if name in takes}


@functools.cache
def expected(name: str, i: int, edit: Edit | None) -> np.ndarray:
    pipeline = built(name) if edit is None else sibling_of(name, edit)
    images: np.ndarray = pipeline(**call(FAMILIES[name], i, edit))[0]
    return images


# --- in the engine ---


@pytest.mark.parametrize(
    ("name", "edit"),
    [pytest.param(*case, marks=[pytest.mark.full] if case in REPEATS else []) for case in CASES],
)
def test_edits_share_forwards_with_texts_and_are_as_the_plain_call(name: str, edit: Edit) -> None:
    family, pipeline, other = FAMILIES[name], built(name), sibling_of(name, edit)
    kinds = [None, edit, None, edit, edit]
    plain = [expected(name, i, kind) for i, kind in enumerate(kinds)]
    before = state_of(pipeline), state_of(other)
    gate = threading.Event()

    def wait(*_: Any) -> dict[str, Any]:
        assert gate.wait(SECONDS)
        return {}

    with StepEngine(pipeline) as engine:
        alone = engine.submit(pipeline=other, **call(family, 1, edit)).result(SECONDS)[0]
        # so that all start at once
        first = engine.submit(**family.arguments("", steps=1, callback_on_step_end=wait))
        jobs = [
            engine.submit(pipeline=None if kind is None else other, **call(family, i, kind))
            for i, kind in enumerate(kinds)
        ]
        gate.set()
        results = [job.result(SECONDS)[0] for job in jobs]
        first.result(SECONDS)
        stats = engine.stats()
    assert np.abs(alone - plain[1]).max() <= TOLERANCE
    assert (
        max(float(np.abs(one - two).max()) for one, two in zip(results, plain, strict=True))
        <= TOLERANCE
    )
    assert np.abs(plain[1] - plain[3]).max() > 100 * TOLERANCE
    denoiser = "unet" if "unet" in stats.forwards else "transformer"
    assert stats.forwards[denoiser].merged_share >= MERGED
    assert stats.errors == 0
    assert (state_of(pipeline), state_of(other)) == before
    assert all(job.progress.step == job.progress.total > 0 for job in jobs)


def test_images_are_read_on_another_thread_once_each_and_hold_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name: str = "stable_diffusion"
    edit: Edit = "inpaint"
    family, other = FAMILIES[name], sibling_of(name, edit)

    def several() -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return call(family, 1, edit) | {
            "image": [source_image(1)] * 3,
            "num_images_per_prompt": 3,
            "generator": generators,
        }

    plain, beside = other(**several())[0], expected(name, 0, None)
    reading, go_on = threading.Event(), threading.Event()
    read: list[int] = []
    real = VaeImageProcessor.pil_to_numpy

    def pil_to_numpy(images: Any) -> Any:
        read.append(len(images))
        reading.set()
        assert threading.current_thread().name.startswith("stepweave-images")
        assert go_on.wait(SECONDS)
        return real(images)

    monkeypatch.setattr(VaeImageProcessor, "pil_to_numpy", staticmethod(pil_to_numpy))
    with StepEngine(built(name)) as engine:
        job = engine.submit(pipeline=other, **several())
        assert reading.wait(SECONDS)
        text = engine.submit(**call(family, 0, None))
        assert np.abs(text.result(SECONDS)[0] - beside).max() <= TOLERANCE
        go_on.set()
        result = job.result(SECONDS)[0]
    assert read == [1, 1]  # image and mask
    assert result.shape == plain.shape and np.abs(result - plain).max() <= TOLERANCE
    assert min(np.abs(result[0] - one).max() for one in result[1:]) > 100 * TOLERANCE


@pytest.mark.parametrize("mode", [mode for mode in get_args(Mode) if mode != "step"])
def test_the_other_modes_call_siblings_too(mode: Mode) -> None:
    name: str = "stable_diffusion_3"
    edit: Edit = "image_to_image"
    family, other = FAMILIES[name], sibling_of(name, edit)
    kinds = [None, edit, None, edit]
    with StepEngine(built(name), mode, threads=2) as engine:
        jobs = [
            engine.submit(pipeline=None if kind is None else other, **call(family, i, kind))
            for i, kind in enumerate(kinds)
        ]
        for i, (job, kind) in enumerate(zip(jobs, kinds, strict=True)):
            assert np.abs(job.result(SECONDS)[0] - expected(name, i, kind)).max() <= TOLERANCE


def test_request_batching_keeps_pipelines_apart() -> None:
    """Two pipelines that take the very same arguments."""

    class Inverted(diffusers.StableDiffusion3Pipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return (1 - super().__call__(*args, **kwargs)[0],)

    family, pipeline = FAMILIES["stable_diffusion_3"], built("stable_diffusion_3")
    inverted = Inverted(**pipeline.components)
    inverted.set_progress_bar_config(disable=True)
    with StepEngine(pipeline, "request") as engine:
        first = engine.submit(**family.arguments("x", steps=30))
        jobs = [
            engine.submit(pipeline=one, **family.arguments("x", seed=i))
            for i in (1, 2)
            for one in (None, inverted)
        ]
        first.result(SECONDS)
        images = [job.result(SECONDS)[0] for job in jobs]
    for i in (0, 2):
        np.testing.assert_allclose(images[i], 1 - images[i + 1], atol=TOLERANCE)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_pipeline_with_modules_of_its_own_is_refused_by_name(mode: Mode) -> None:
    pipeline, stranger = built("stable_diffusion"), FAMILIES["stable_diffusion"].build()
    parts = {**pipeline.components, "unet": stranger.unet}
    mixed = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with StepEngine(pipeline, mode) as engine:
        with pytest.raises(
            EngineMisuseError,
            match=r"StableDiffusionImg2ImgPipeline\.unet is not a module of the Stable",
        ):
            engine.submit(pipeline=mixed, **call(FAMILIES["stable_diffusion"], 1, "image_to_image"))
        assert engine.waiting == engine.running == 0


class Casting(diffusers.StableDiffusion3Pipeline):  # type: ignore[misc]
    """Changes a shared module during its call, as pipelines of attention guidance do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for block in self.transformer.transformer_blocks:
            block.attn.processor = block.attn.processor
        return super().__call__(*args, **kwargs)


def test_a_sibling_whose_calls_change_modules_waits_for_its_turn() -> None:
    family, pipeline = FAMILIES["stable_diffusion_3"], built("stable_diffusion_3")
    changing = Casting(**pipeline.components)
    changing.set_progress_bar_config(disable=True)
    spans: dict[str, tuple[float, float]] = {}
    with StepEngine(pipeline) as engine:
        jobs = {"before": engine.submit(**family.arguments("x", seed=1, steps=8))}
        jobs["changing"] = engine.submit(pipeline=changing, **family.arguments("x", seed=2))
        jobs["after"] = engine.submit(**family.arguments("x", seed=3))
        for name, job in jobs.items():
            job.result(SECONDS)
            assert job.started is not None and job.finished is not None
            spans[name] = (job.started, job.finished)
    begun, ended = spans.pop("changing")
    assert all(
        other_end <= begun or ended <= other_begun for other_begun, other_end in spans.values()
    )
    with (
        StepEngine(pipeline, "threads") as engine,
        pytest.raises(EngineMisuseError, match="A call of Casting changes modules"),
    ):
        engine.submit(pipeline=changing, **family.arguments("x"))


def test_what_is_foretold_of_an_edit_is_of_its_kind_size_and_steps() -> None:
    family, pipeline, other = (
        FAMILIES["stable_diffusion"],
        built("stable_diffusion"),
        sibling_of(*CASES[0]),
    )
    arguments = call(family, 1, "image_to_image") | {"num_inference_steps": 10, "strength": 0.25}
    edit, group, steps = shape_of(other, (), arguments, None, False)
    text, text_group, _ = shape_of(pipeline, (), family.arguments("x"), None, False)
    assert steps == 2
    assert shape_of(other, (), {**arguments, "strength": 0.05}, None, False)[2] == 1
    # the call's own strength
    assert shape_of(other, (), {"num_inference_steps": 10}, None, False)[2] == 8
    assert "width" not in arguments and edit.pixels == text.pixels == SIDE * SIDE
    assert group == text_group and edit.kind != text.kind
    with StepEngine(pipeline) as engine:
        engine.submit(**family.arguments("x", seed=1, steps=6)).result(SECONDS)
        engine.submit(pipeline=other, **call(family, 1, "image_to_image")).result(SECONDS)
        solo = [
            engine.estimate(
                pipeline=other, **{**arguments, "num_inference_steps": 100, "strength": strength}
            )
            for strength in (0.2, 0.9)
        ]
    assert solo[0] is not None and solo[1] is not None
    assert solo[1].solo > 2 * solo[0].solo


# --- siblings ---


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # Kolors
def test_siblings_are_those_that_diffusers_names() -> None:
    from diffusers.pipelines import auto_pipeline  # imports all families

    texts = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    for edit, mapping in (
        ("image_to_image", auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
        ("inpaint", auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING),
    ):
        for family in texts.keys() & mapping.keys():
            if (
                isinstance(mapping[family], DummyObject)
                or len([one for one in texts if texts[one] is texts[family]]) > 1
            ):
                continue
            assert edit_pipeline_class(texts[family].__name__, edit) is mapping[family], family  # type: ignore[arg-type]
    assert edit_pipeline_class("StableCascadeCombinedPipeline", "inpaint") is None
    assert edit_pipeline_class("NoSuchPipeline", "inpaint") is None


@every_case
def test_making_a_sibling_leaves_everything_as_it_was(name: str, edit: Edit) -> None:
    pipeline = FAMILIES[name].build().to(torch.bfloat16)
    before = state_of_bfloat16(pipeline)
    other = edit_pipeline(pipeline, edit)
    assert state_of_bfloat16(pipeline) == before
    assert all(network.dtype == torch.bfloat16 for network in networks(other))
    assert all(
        one is getattr(pipeline, name)
        for name, one in other.components.items()
        if isinstance(one, torch.nn.Module)
    )
    assert (
        other.scheduler is not pipeline.scheduler
        and other.scheduler.config == pipeline.scheduler.config
    )
    assert other._progress_bar_config == {"disable": True}


def state_of_bfloat16(pipeline: Any) -> Any:
    """Weights, types and configurations of all components."""
    return {
        name: (
            id(one),
            str(getattr(one, "dtype", "")),
            str(dict(one.config))
            if hasattr(one, "config") and hasattr(one.config, "items")
            else "",
            [
                (key, str(tensor.dtype), tensor.data_ptr())
                for key, tensor in one.state_dict().items()
            ]
            if isinstance(one, torch.nn.Module)
            else None,
        )
        for name, one in pipeline.components.items()
    }


def test_there_is_no_sibling_where_components_are_missing_or_of_another_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = built("stable_diffusion")
    for kind in (
        diffusers.StableDiffusionControlNetImg2ImgPipeline,
        diffusers.StableDiffusion3Img2ImgPipeline,
    ):
        monkeypatch.setattr(
            "stepweave.loading.edit_pipelines.edit_pipeline_class",
            lambda name, edit, kind=kind: kind,
        )
        assert edit_pipeline(pipeline, "image_to_image") is None
    monkeypatch.setattr(
        "stepweave.loading.edit_pipelines.edit_pipeline_class",
        lambda name, edit: diffusers.StableDiffusionImg2ImgPipeline,
    )
    assert edit_pipeline(pipeline, "inpaint") is None  # it takes no mask


# --- schedulers ---


@pytest.mark.parametrize(
    "name",
    [
        "flux",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in (
                "stable_diffusion_3",
                "stable_diffusion_3_dynamic",
                "qwen_image",
                "hunyuan_image",
            )
        ),
    ],
)
def test_schedulers_that_are_allowed_run(name: str) -> None:
    check_schedulers(name)


@pytest.mark.full
# DEIS, of tensors
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_compatible_schedulers_that_are_allowed_run() -> None:
    names = check_schedulers("stable_diffusion")
    assert len(names) >= 12
    # of other noise levels, and with noise that no seed decides
    assert not {"EDMEulerScheduler", "DPMSolverSDEScheduler"} & names


def check_schedulers(name: str) -> set[str]:
    """Run the pipeline and its siblings with each scheduler that is allowed; the names of these."""
    family, pipeline = FAMILIES[name], built(name)
    found = Rehearsals.of(pipeline, Course(STEPS), max(FIRST)).schedulers
    own = type(pipeline.scheduler).__name__
    assert own in found
    before = {one: dict(vars(scheduler.config)) for one, scheduler in found.items()}
    state = torch.get_rng_state()
    siblings = [(edit, sibling_of(name, edit)) for case, edit in CASES if case == name]
    jobs = []
    with StepEngine(pipeline) as engine:
        for one, scheduler in found.items():
            jobs.append(engine.submit(scheduler=scheduler, **family.arguments("x", steps=5)))
            for edit, other in siblings:
                if rehearse(scheduler, other):
                    arguments = call(family, 2, edit) | {"num_inference_steps": 5}
                    jobs.append(engine.submit(pipeline=other, scheduler=scheduler, **arguments))
                else:
                    assert one != own
        for job in jobs:
            assert np.isfinite(job.result(SECONDS)[0]).all()
    assert {one: dict(vars(scheduler.config)) for one, scheduler in found.items()} == before
    assert torch.equal(torch.get_rng_state(), state)
    return set(found)
