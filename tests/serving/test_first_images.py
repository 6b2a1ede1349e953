"""What a server makes of its own first images: whether it turns ready with them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepweave import StepEngine
from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import LoadError
from stepweave.loading.first_images import check_images
from stepweave.serving.model import ServedModel
from stepweave.serving.server import Server
from stepweave.serving.warm_up import WarmUp
from tests.support.fake_pipeline import FakePipeline
from tests.support.tiny import FAMILIES, SIDE
from tests.support.waiting import wait_until

FLOAT32 = torch.float32


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def red() -> Image.Image:
    return Image.new("RGB", (8, 8), "red")


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("stepweave"), "propagate", True)
    caplog.set_level(logging.INFO, "stepweave")
    return caplog


def test_images_that_agree_and_vary_pass_with_one_line(log: pytest.LogCaptureFixture) -> None:
    check_images(image(0), [image(0), image(1)], FLOAT32)
    (line,) = log.messages
    assert (
        "two runs of a job agree (their pixels differ by 0 on average), 2 images are finite, 0 of "
        "one colour" in line
    )


def test_one_image_of_one_colour_is_logged_and_passes(log: pytest.LogCaptureFixture) -> None:
    check_images(image(0), [image(0), red(), image(2)], FLOAT32)
    assert "1 of 3 first images are of one colour" in log.messages


def test_images_that_are_all_of_one_colour_are_refused() -> None:
    with pytest.raises(
        LoadError, match=r"all 2 first images.*one colour.*bfloat16 is not precise.*STEPWEAVE_DTYPE"
    ):
        check_images(red(), [red(), Image.new("L", (8, 8))], torch.bfloat16)


def test_where_there_is_but_one_job_others_decide() -> None:
    check_images(red(), [red()], FLOAT32, lambda: [red(), image(1)])
    with pytest.raises(LoadError, match="all 3 first images"):
        check_images(red(), [red()], FLOAT32, lambda: [red(), red()])


def test_images_that_are_not_finite_are_refused() -> None:
    broken = np.full((8, 8, 3), np.nan)
    with pytest.raises(LoadError, match="not finite"):
        check_images(broken, [broken], FLOAT32)
    with pytest.raises(LoadError, match="not finite"):
        check_images(np.zeros((8, 8, 3)), [torch.full((8, 8, 3), torch.inf)], FLOAT32)


@pytest.mark.parametrize(("by", "dtype", "agree"), [
    (1, FLOAT32, True), (8, FLOAT32, False), (8, torch.bfloat16, True), (40, torch.float16, False),
])  # fmt: skip
def test_two_runs_may_differ_a_little_and_more_in_half_precision(
    by: int, dtype: torch.dtype, agree: bool
) -> None:
    one = np.asarray(image(0)) // 2
    other = (one + by).astype(np.uint8)
    if agree:
        check_images(Image.fromarray(one), [Image.fromarray(other)], dtype)
    else:
        with pytest.raises(
            LoadError, match=r"two runs of one job with one seed differ by \d+\.\d% .*random"
        ):
            check_images(Image.fromarray(one), [Image.fromarray(other)], dtype)


# A model that warms up


@pytest.fixture(params=["step", pytest.param("off", marks=pytest.mark.full)])
def mode(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield request.param


def warm_up(pipeline: Any, mode: Any) -> None:
    settings = Settings(max_rows=8, batching=mode)
    model = ServedModel(pipeline, Preset(width=SIDE, height=SIDE), settings)
    with StepEngine(pipeline, mode, max_rows=8) as engine:
        WarmUp(model, engine).run()


def noisy(module: torch.nn.Module) -> None:
    """As a layer of dropout in a module that was left in training mode."""
    module.register_forward_hook(
        lambda module, args, output: torch.nn.functional.dropout(output, 0.5)
    )


@pytest.mark.full  # as the server does that other tests of a quick run start
def test_a_whole_model_warms_up(mode: Any) -> None:
    warm_up(FAMILIES["stable_diffusion"].build(), mode)


@pytest.mark.full  # as in the one that makes nothing but one colour, the server does not serve
@pytest.mark.parametrize("where", ["unet", "text_encoder"])
def test_a_module_that_draws_random_numbers_keeps_a_model_from_serving(
    mode: Any, where: str
) -> None:
    pipeline = FAMILIES["stable_diffusion"].build()
    noisy(pipeline.unet.conv_in if where == "unet" else pipeline.text_encoder.embeddings)
    with pytest.raises(LoadError, match="two runs of one job with one seed differ"):
        warm_up(pipeline, mode)


@pytest.mark.parametrize("value", [0.0, pytest.param(torch.nan, marks=pytest.mark.full)])
def test_a_model_that_makes_nothing_but_one_colour_does_not_serve(mode: Any, value: float) -> None:
    """Of numbers that are not finite, too, which come as black: the conversion to bytes warns of it
    at most."""
    pipeline = FAMILIES["stable_diffusion"].build()
    with torch.no_grad():
        for parameter in pipeline.vae.decoder.conv_out.parameters():
            parameter.fill_(value)
    with pytest.raises(Exception, match=r"one colour|finite|invalid value encountered in cast"):
        warm_up(pipeline, mode)


def test_the_server_says_so(in_process: Callable[..., Any]) -> None:
    class Black(FakePipeline):
        @functools.wraps(FakePipeline.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            made = super().__call__(*args, **kwargs)
            return SimpleNamespace(images=[Image.new("RGB", one.size) for one in made.images])

    app = in_process(Black(), ready=False)
    server: Server = app.server
    server.start()
    wait_until(lambda: server.status.stage == "failed")
    answer = app.client.get("/readyz")
    assert answer.status_code == 503 and "are of one colour" in answer.json()["error"]["message"]
