"""What a model seems to take and does not: tried before it serves, and refused by name
afterwards."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.engine import StepEngine
from stepweave.errors import DeviceFailedError, InvalidRequestError, LoadError, OutOfMemoryError
from stepweave.loading.sizes import SizeLimits
from stepweave.loading.trials import SLIGHT, Fault, Limits, narrowed
from stepweave.parameters import Sources
from stepweave.serving.kinds import Kind
from stepweave.serving.model import ServedModel
from stepweave.serving.warm_up import WarmUp
from tests.pipelines.catalog import entries
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.resolving import resolve
from tests.support.uploads import sources_of
from tests.support.waiting import SECONDS

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),
]  # of diffusers, deprecated

Size = tuple[int, int]
NATIVE = (512, 512)
SEEMING = Limits(SizeLimits(8, None, 2048 * 2048, min_side=8), (0.0, 100.0), 8, 4000)


# What is found out, of pipelines that are told by their limits


@dataclass
class Told:
    """A pipeline that fails outside of its limits, and what it was asked for."""

    multiple: int = 8
    least: int = 8
    most: int = 10**6
    low: float = 0.0
    high: float = 100.0
    images: int = 100
    characters: int = 10**6
    only: bool = False

    def __call__(
        self,
        size: Size,
        *,
        images: int = 1,
        guidance: float | None = None,
        characters: int | None = None,
    ) -> Fault | None:
        if self.only and size != NATIVE:
            return Fault("another size", NATIVE)
        if size != NATIVE and any(
            side % self.multiple or not self.least <= side <= self.most for side in size
        ):
            return Fault("size")
        if images > self.images or (guidance is not None and not self.low <= guidance <= self.high):
            return Fault("images or guidance")
        return Fault("long") if (characters or 0) > self.characters else None


def found(told: Told, guidance: float | None = 5.0, seeming: Limits = SEEMING) -> Limits:
    return narrowed(seeming, NATIVE, guidance, told, "Told")


def test_a_pipeline_that_takes_what_it_seems_to_take_is_offered_as_it_is() -> None:
    assert found(Told()) == SEEMING
    assert found(Told(), guidance=None) == SEEMING


@pytest.mark.parametrize("multiple", [16, 32, 64, 128])
@pytest.mark.parametrize("least", [8, 64, 256])
def test_multiples_and_smallest_sides_are_found(multiple: int, least: int) -> None:
    sizes = found(Told(multiple=multiple, least=least)).sizes
    assert (sizes.multiple, sizes.only) == (multiple, None)
    assert sizes.min_side == max(multiple, least)


@settings(max_examples=100, deadline=None)
@given(
    most=st.integers(512, 9000),
    least=st.sampled_from([8, 16, 64]),
    own=st.none() | st.integers(65, 1024),
)
def test_the_longest_side_is_one_that_works_and_no_shorter_than_the_native_ones(
    most: int, least: int, own: int | None
) -> None:
    told = Told(most=most, least=least)
    seeming = replace(
        SEEMING, sizes=replace(SEEMING.sizes, max_side=None if own is None else own * 8)
    )
    sizes = found(told, seeming=seeming).sizes
    longest = sizes.longest // sizes.multiple * sizes.multiple
    assert told((longest, sizes.min_side)) is None and told((sizes.min_side, longest)) is None
    assert longest >= 512
    assert 2 * longest > min(most, seeming.sizes.longest) - 32 or longest == 512


def test_a_pipeline_that_goes_by_a_size_of_its_own_is_asked_twice_and_offered_with_that() -> None:
    told, asked = Told(only=True), []

    def attempt(size: Size, **what: Any) -> Fault | None:
        asked.append(size)
        return told(size, **what)

    limits = narrowed(SEEMING, NATIVE, 5.0, attempt, "Told")
    assert limits.sizes.only == NATIVE and len(asked) - asked.count(NATIVE) == 2
    assert limits.sizes.read("512x512") == NATIVE == limits.sizes.of_edit((100, 7000))
    with pytest.raises(
        InvalidRequestError, match="size is '256x512'; the model makes images of 512x512 only"
    ):
        limits.sizes.read("256x512")


@pytest.mark.parametrize("made", [True, False])
def test_a_pipeline_that_mixes_up_width_and_height_is_offered_with_squares(made: bool) -> None:
    def attempt(size: Size, **what: Any) -> Fault | None:
        if size[0] % NATIVE[0] or size[1] % NATIVE[1]:
            return Fault("it fails")
        upright = size[::-1] if made else None
        return None if size[0] == size[1] else Fault("upright", upright)

    sizes = narrowed(SEEMING, NATIVE, 5.0, attempt, "Mixed up").sizes
    assert sizes.square and sizes.read("1024x1024") == (1024, 1024)
    assert sizes.of_edit((1100, 1500)) == (1024, 1024)
    with pytest.raises(InvalidRequestError, match="the model makes squares only"):
        sizes.read("1024x512")


@pytest.mark.parametrize(
    ("low", "high", "default", "expected"),
    [
        (1.0, 100.0, 5.0, (1.0, 100.0)),
        (1.001, 100.0, 5.0, (SLIGHT, 100.0)),
        (2.0, 100.0, 5.0, (5.0, 100.0)),
        (0.0, 30.0, 5.0, (0.0, 25.0)),
        (0.0, 0.5, 0.0, (0.0, 0.0)),
        (0.0, 100.0, 0.0, (0.0, 100.0)),
        (1.0, 100.0, 1.0, (1.0, 100.0)),
        (0.0, 100.0, 150.0, (0.0, 100.0)),
    ],
)
def test_guidance_is_offered_as_far_as_it_works(
    low: float, high: float, default: float, expected: tuple[float, float]
) -> None:
    assert found(Told(low=low, high=max(high, default)), guidance=default).guidance == expected


def test_so_are_images_and_prompts(caplog: pytest.LogCaptureFixture) -> None:
    limits = found(Told(images=3, characters=700))
    assert limits.images == 3 and 656 <= limits.prompt_characters <= 700
    assert "Told: max_images is 3, not 8 as it seems" in caplog.text
    assert found(Told(images=1, characters=1)) == replace(SEEMING, images=1, prompt_characters=10)


def test_images_of_a_size_of_their_own_say_nothing_of_other_limits() -> None:
    """As of a pipeline that enlarges them: they are told with each image."""

    def enlarges(size: Size, **what: Any) -> Fault | None:
        return Fault("larger", (2 * size[0], 2 * size[1]))

    assert narrowed(SEEMING, NATIVE, 5.0, enlarges, "Enlarges") == SEEMING


def test_edits_of_a_pipeline_that_goes_by_their_sources_shape_keep_their_sizes() -> None:
    own = Told(only=True)
    text = narrowed(SEEMING, NATIVE, 5.0, own, "Told")
    edits = narrowed(SEEMING, NATIVE, 5.0, own, "Edits", text).sizes
    assert (edits.only, edits.min_side, edits.longest) == (None, 256, 1024)
    assert edits.of_edit((1600, 900)) == (1024, 576)
    of_text = narrowed(SEEMING, NATIVE, 5.0, Told(multiple=16), "Told")
    assert narrowed(SEEMING, NATIVE, 5.0, Told(multiple=32), "Edits", of_text).sizes.multiple == 32


def test_a_native_size_that_fails_keeps_a_model_from_serving() -> None:
    with pytest.raises(
        LoadError, match="Told fails with an image of its own size, 512x512: 2 images in place of 1"
    ):
        narrowed(SEEMING, NATIVE, 5.0, lambda size, **what: Fault("2 images in place of 1"), "Told")


def test_the_native_size_is_taken_whatever_its_sides() -> None:
    sizes = SizeLimits(16, None, 2048 * 2048, 16, native=(72, 72))
    assert sizes.read("72x72") == (72, 72)
    with pytest.raises(InvalidRequestError, match="multiples of 16"):
        sizes.read("72x64")


@settings(max_examples=200, deadline=None)
@given(
    source=st.tuples(st.integers(1, 8000), st.integers(1, 8000)),
    multiple=st.sampled_from([8, 16, 32]),
    pixels=st.integers(64 * 64, 2048 * 2048),
)
def test_an_edit_is_no_longer_than_sizes_that_are_asked_for(
    source: Size, multiple: int, pixels: int
) -> None:
    sizes = SizeLimits(multiple, None, pixels, min_side=multiple)
    try:
        width, height = sizes.of_edit(source)
    except InvalidRequestError:
        return
    assert sizes.read(f"{width}x{height}") == (width, height)


# Pipelines of diffusers. Each is off in its own way, in small or in every size


# of requests
OWN = (
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "num_images_per_prompt",
    "strength",
)


def model_of(name: str) -> tuple[ServedModel, StepEngine]:
    entry = entries()[name]
    pipeline, call = entry.build(), entry.arguments(0)
    pipeline.set_progress_bar_config(disable=True)
    kept = {
        name: value
        for name, value in call.items()
        if isinstance(value, (bool, int, float)) and name not in OWN
    }
    preset = Preset(call=kept, width=call.get("width"), height=call.get("height"))
    return ServedModel(pipeline, preset, Settings(max_images=3)), StepEngine(pipeline, "off")


def source(size: Size) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB")


def requests(
    model: ServedModel, limits: Limits, sources: Sources | None
) -> Iterator[dict[str, Any]]:
    """At the ends of what is offered, and within."""
    sizes = limits.sizes
    native = f"{model.width}x{model.height}"
    if sizes.only is None:
        least, multiple = sizes.min_side, sizes.multiple
        longest = min(sizes.longest, sizes.max_pixels // least) // multiple * multiple
        if sizes.area is not None:  # at more narrow ones, a side would be none
            longest = min(longest, least * sizes.area // multiple**2)
        for width, height in (
            (least, least),
            (least + multiple, least),
            (longest, least),
            (least, longest),
        ):
            yield {"size": f"{width}x{height}"}
    low, high = limits.guidance
    asked = {"size": native} if sizes.only is None and model.width % sizes.multiple == 0 else {}
    if model.default_guidance is not None:
        for guidance, n in itertools.product(
            (low, min(1.0, high) if low <= 1 else low, high), {1, limits.images}
        ):
            yield {"guidance_scale": guidance, "n": n, **asked}
    yield {"n": limits.images, **asked}
    yield {"prompt": ("a red ring, " * 400)[: limits.prompt_characters], **asked}
    if sources is None:
        yield {"num_inference_steps": 1, **asked}
    else:
        for strength, steps in itertools.product((0.01, 0.3, 0.99, 1.0), (3, 101)):
            yield {"strength": strength, "num_inference_steps": steps, **asked}


def refusals(limits: Limits) -> Iterator[tuple[dict[str, Any], str]]:
    """Requests beyond the limits, and the parameter that is to be named."""
    sizes = limits.sizes
    if sizes.only is not None:
        width, height = sizes.only
        yield {"size": f"{width + sizes.multiple}x{height}"}, "size"
    else:
        yield {"size": f"{sizes.min_side + 1}x{sizes.min_side}"}, "size"
        yield {"size": f"{sizes.longest + sizes.multiple}x{sizes.min_side}"}, "size"
        if sizes.min_side > sizes.multiple:
            yield {"size": f"{sizes.multiple}x{sizes.min_side}"}, "size"
    if sizes.area is not None:
        yield {"size": f"{sizes.min_side * sizes.area}x{sizes.min_side}"}, "size"
    if limits.guidance[0] > 0:
        yield {"guidance_scale": limits.guidance[0] - 0.01}, "guidance_scale"
    yield {"n": limits.images + 1}, "n"
    yield {"prompt": "x" * (limits.prompt_characters + 1)}, "prompt"


def check(name: str) -> ServedModel:
    """Try what is offered: everything gives as many images as asked for, of that size, none of one
    colour, no two the same."""
    model, engine = model_of(name)
    with engine:
        warming = WarmUp(model, engine)
        warming._edits(2)
        warming.trials()
        image = source((model.width, model.height))
        kinds = {
            "image_to_image": sources_of(image),
            "inpainting": sources_of(image, image.convert("L")),
        }
        for task in model.pipelines.tasks():
            sources, limits = kinds.get(task), model.limits_of(Kind(task))
            for asked in requests(model, limits, sources):
                try:
                    parameters = resolve(
                        model,
                        **{
                            "prompt": "a red ring",
                            "seed": 1,
                            "num_inference_steps": 3,
                            "sources": sources,
                            **asked,
                        },
                    )
                except InvalidRequestError as error:
                    assert error.param in ("num_inference_steps", "strength"), (
                        asked,
                        error.message,
                    )
                    continue
                images = engine.submit(**model.call(parameters)).result(SECONDS).images
                area = limits.sizes.area
                if area is not None:  # only the proportions of what is asked for count
                    assert len(images) == parameters.n
                    wanted = parameters.width, parameters.height
                    # rounded down to multiples; some edits have the size itself
                    for made in images:
                        about = area / 4 <= made.width * made.height <= 2 * area
                        assert about or made.size == wanted, (asked, made.size)
                else:
                    assert [one.size for one in images] == [
                        (parameters.width, parameters.height)
                    ] * parameters.n, asked
                assert all(np.ptp(np.asarray(one)) for one in images), asked
                if math.prod(images[0].size) > 64:
                    assert len({one.tobytes() for one in images}) == parameters.n, asked
            for asked, param in refusals(limits):
                with pytest.raises(InvalidRequestError) as caught:
                    resolve(model, **{"prompt": "x", "sources": sources, **asked})
                assert caught.value.param == param, (asked, caught.value.message)
    return model


# Those that were found to fail somewhere, and why
FAILED: dict[str, Callable[[Limits], bool]] = {
    # though its VAE's scale is 2
    "stable_diffusion_text": lambda limits: limits.sizes.multiple == 8,
    # a table of positions
    "z_image": lambda limits: limits.sizes.multiple == 4 and limits.sizes.longest == 128,
    "aura_flow": lambda limits: limits.sizes.longest == 32,  # its table is of a square
    "flux_kontext": lambda limits: limits.sizes.area == 256,  # it goes by the number of pixels
    "prx": lambda limits: limits.guidance[0] == 1 and limits.images == 1,
    "hunyuan_dit_pag_text": lambda limits: limits.guidance[0] == SLIGHT,
    "pixart_alpha": lambda limits: limits.sizes.multiple == 8,
    "hunyuan_image_text": lambda limits: limits.sizes.min_side == 4,
}
QUICK = ("aura_flow", "prx")


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.full) for one in FAILED]
)
def test_what_fails_is_not_offered_and_what_is_offered_works(name: str) -> None:
    assert FAILED[name](check(name).limits), name


@pytest.mark.full
def test_a_single_step_is_refused_with_the_schedulers_that_fail_at_it() -> None:
    """PixArt takes what other schedulers give second, where there is one step."""
    model, engine = model_of("pixart_alpha")
    with engine:
        WarmUp(model, engine).trials()
        works = []
        for name in model.schedulers:
            asked: dict[str, Any] = {"prompt": "a red ring", "seed": 1, "scheduler": name}
            assert resolve(model, **asked, num_inference_steps=4)
            try:
                parameters = resolve(model, **asked, num_inference_steps=1)
            except InvalidRequestError as error:
                assert (
                    error.param == "num_inference_steps"
                    and "num_inference_steps is 1" in error.message
                )
                continue
            works.append(name)
            assert engine.submit(**model.call(parameters)).result(SECONDS).images
    assert works and model.scheduler not in works
    assert 1 in model.scheduler_steps[model.scheduler or ""]["fails"]


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "stable_diffusion_3",
        "flux",
        "qwen_image_text",
        "sana",
        "cogview4",
        "chroma",
        "kolors_text",
        "stable_diffusion_xl_text",
        "kandinsky3_text",
    ],  # fmt: skip
)
def test_what_is_offered_of_other_families_works(name: str) -> None:
    check(name)


@pytest.mark.full
def test_schedulers_with_which_the_pipeline_itself_fails_are_not_offered() -> None:
    """Kandinsky gives each the generator, which not all take; their rehearsal does not."""
    model, engine = model_of("kandinsky3_text")
    rehearsed = set(model.schedulers)
    with engine:
        WarmUp(model, engine).trials()
        offered = set(model.schedulers)
        assert {"DEISMultistepScheduler", "UniPCMultistepScheduler"} <= rehearsed - offered
        assert model.scheduler in offered and len(offered) > 2
        for name in offered:
            parameters = resolve(model, prompt="a red ring", scheduler=name, num_inference_steps=5)
            assert engine.submit(**model.call(parameters)).result(SECONDS).images
    with pytest.raises(
        InvalidRequestError,
        match="scheduler is 'UniPCMultistepScheduler'; Kandinsky3Pipeline supports DDIM",
    ):
        resolve(model, prompt="x", scheduler="UniPCMultistepScheduler")


def test_a_device_that_fails_at_a_trial_is_told_with_what_was_tried() -> None:
    model = ServedModel(FakePipeline(), Preset(), Settings())
    with StepEngine(model.pipeline, "off") as engine:
        submit = engine.submit

        def fails(**call: Any) -> Any:
            if call["width"] > 64:
                raise DeviceFailedError("CUDA error: device-side assert triggered")
            return submit(**call)

        with (
            mock.patch.object(engine, "submit", fails),
            pytest.raises(LoadError, match="1 images of 8192x8, .* device-side"),
        ):
            WarmUp(model, engine).run()


def test_want_of_memory_or_time_leaves_what_is_offered_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ServedModel(FakePipeline(), Preset(), Settings())
    before = model.limits
    with StepEngine(model.pipeline, "off") as engine:
        with mock.patch.object(engine, "submit", mock.Mock(side_effect=OutOfMemoryError("none"))):
            WarmUp(model, engine).trials()
        assert model.limits == before
        monkeypatch.setattr("stepweave.serving.warm_up.TRIAL_SECONDS", -1.0)
        with mock.patch.object(engine, "submit", mock.Mock(side_effect=RuntimeError())):
            warming = WarmUp(model, engine)
            model.default_steps = 1  # a single step is tried however late it is
            warming.trials()
    assert model.limits == before


class Odd(FakePipeline):
    """Gives what is no image of PIL's where it is small."""

    def __init__(self, small: Callable[[], Any]) -> None:
        super().__init__()
        self.small = small

    def __deepcopy__(self, memo: dict[int, Any]) -> Odd:
        return self

    def __call__(self, prompt: str | None = None, **arguments: Any) -> SimpleNamespace:  # type: ignore[override]
        made = super().__call__(prompt, **arguments)
        return (
            SimpleNamespace(images=self.small())
            if min(arguments["height"], arguments["width"]) < 32
            else made
        )


Odd.__call__.__signature__ = inspect.signature(FakePipeline.__call__)  # type: ignore[attr-defined]


class Unspeakable(RuntimeError):
    def __str__(self) -> str:
        raise KeyError("x")


def fail() -> Any:
    raise Unspeakable


@pytest.mark.parametrize(
    "small",
    [lambda: [np.zeros((8, 8, 3))], lambda: [torch.zeros(3, 8, 8)], lambda: None, list, fail],
)
def test_whatever_comes_of_a_trial_it_is_left_out(small: Callable[[], Any]) -> None:
    model = ServedModel(Odd(small), Preset(), Settings())
    with StepEngine(model.pipeline, "off") as engine:
        WarmUp(model, engine).trials()
    assert model.limits.sizes.min_side == 32 and model.limits.sizes.only is None


@pytest.mark.parametrize("up", [16, 32])
def test_a_pipeline_that_rounds_sizes_up_is_offered_with_its_multiples(up: int) -> None:
    def rounds(size: Size, **what: Any) -> Fault | None:
        made = (-(-size[0] // up) * up, -(-size[1] // up) * up)
        return None if made == size else Fault("rounded", made)

    assert found_by(rounds).sizes.multiple == up


def test_what_fails_with_narrow_images_only_is_offered_as_far_as_it_works() -> None:
    def wide(size: Size, **what: Any) -> Fault | None:
        return Fault("wide") if max(size) > 4 * min(size) else None

    sizes = found_by(wide).sizes
    assert (sizes.only, sizes.min_side, sizes.longest) == (None, 128, 512)


def test_several_images_without_guidance_are_tried() -> None:
    def attempt(
        size: Size, images: int = 1, guidance: float | None = None, **what: Any
    ) -> Fault | None:
        return Fault("both") if images > 1 and guidance is not None and guidance <= 1 else None

    assert found_by(attempt).images == 1


def found_by(attempt: Any) -> Limits:
    return narrowed(SEEMING, NATIVE, 5.0, attempt, "Told")


# Over HTTP


class Narrow(FakePipeline):
    """Fails with several images, without guidance, and where a side is no multiple of 16."""

    def __call__(self, prompt: str | None = None, **arguments: Any) -> SimpleNamespace:  # type: ignore[override]
        if (
            arguments["num_images_per_prompt"] > 1
            or arguments["guidance_scale"] < 1
            or arguments["height"] % 16
        ):
            raise RuntimeError("sizes of tensors must match")
        return super().__call__(prompt, **arguments)


Narrow.__call__.__signature__ = inspect.signature(FakePipeline.__call__)  # type: ignore[attr-defined]


def test_clients_are_told_and_refused_with_what_works(in_process: Callable[..., InProcess]) -> None:
    app = in_process(Narrow())
    (model,) = app.client.get("/v1/models").json()["data"]
    details = model["stepweave"]
    assert (details["size_multiple"], details["min_side"], details["only_size"]) == (16, 16, None)
    assert (details["max_images"], details["guidance_range"]) == (1, [1.0, 100.0])
    for fields, param, limit in (
        ({"n": 2}, "n", "n is 2; the limit is 1"),
        ({"guidance_scale": 0.5}, "guidance_scale", "guidance_scale is 0.5; it must be at least 1"),
        ({"size": "16x24"}, "size", "both sides must be positive multiples of 16"),
    ):
        answer = app.post(**fields)
        assert answer.status_code == 400, answer.text
        assert (
            answer.json()["error"]["param"] == param and limit in answer.json()["error"]["message"]
        )
    assert app.post(size="16x32", guidance_scale=1).status_code == 200
    schema = app.client.get("/openapi.json").json()["components"]["schemas"]
    bounds = schema["GenerationRequest"]["properties"]["n"]
    assert int(re.search(r"'maximum': (\d+)", str(bounds))[1]) == 1  # type: ignore[index]


def test_what_a_pipeline_checks_itself_is_the_clients_error(
    in_process: Callable[..., InProcess],
) -> None:
    class Checks(FakePipeline):
        def check_inputs(self, height: int) -> None:
            if height != 64:
                raise ValueError(
                    f"`height` has to be 64 but is {height}, says /srv/models/secret/config.json"
                )

        def __call__(self, prompt: str | None = None, **arguments: Any) -> SimpleNamespace:  # type: ignore[override]
            self.check_inputs(arguments["height"])
            return super().__call__(prompt, **arguments)

    Checks.__call__.__signature__ = Narrow.__call__.__signature__  # type: ignore[attr-defined]
    app = in_process(Checks(), warmup=False)
    answer = app.post(size="64x72")
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert (
        message
        == "The pipeline rejects these values: `height` has to be 64 but is 72, says config.json"
    )
    assert app.post().status_code == 200


@pytest.mark.parametrize("bug", ["mean, std = (1,)", "int('x')", "[].index(1)", "torch.cat(None)"])
def test_a_bug_in_a_pipelines_call_is_the_servers(
    in_process: Callable[..., InProcess], bug: str
) -> None:
    class Buggy(FakePipeline):
        pass

    source = "def __call__(self, prompt=None, num_inference_steps=4, **arguments):\n    " + bug
    made: dict[str, Any] = {}
    exec(source, {"torch": torch}, made)
    made["__call__"].__signature__ = inspect.signature(FakePipeline.__call__)
    Buggy.__call__ = made["__call__"]  # type: ignore[method-assign]
    answer = in_process(Buggy(), warmup=False).post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")


def test_an_error_of_the_same_kind_from_within_is_the_servers(
    in_process: Callable[..., InProcess],
) -> None:
    app = in_process(warmup=False)
    app.pipeline.record.error = ValueError("from a step")
    answer = app.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")


def test_images_of_another_size_or_number_are_not_passed_off(
    in_process: Callable[..., InProcess],
) -> None:
    class Own(FakePipeline):
        many = 1

        def __call__(self, prompt: str | None = None, **arguments: Any) -> SimpleNamespace:  # type: ignore[override]
            super().__call__(prompt, **arguments)
            return SimpleNamespace(images=[source((40, 24))] * self.many)

    Own.__call__.__signature__ = Narrow.__call__.__signature__  # type: ignore[attr-defined]
    app = in_process(Own(), warmup=False)
    answer = app.post(size="64x64").json()
    assert (
        "image 0 is 40x24: the pipeline did not make it in the requested size, 64x64."
        in answer["warnings"]
    )
    assert answer["usage"]["pixels"] == 40 * 24
    Own.many = 2
    failed = app.post(size="64x64")
    assert failed.headers["X-Should-Retry"] == "false"
    assert (
        failed.status_code == 500
        and "made 2 images; 1 were requested" in failed.json()["error"]["message"]
    )
