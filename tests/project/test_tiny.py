"""The tiny pipelines that other tests build on: the same every time, and sensitive to what a server
could mix up."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import FAMILIES, Family, cases, networks

PROMPT, OTHER = "a red circle", "a small blue square"
VISIBLE = 0.01  # of pixels in [0, 1]: a hundred times the tolerance of parity

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_case = pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        pytest.param(
            family,
            scheduler,
            id=f"{family.name}-{scheduler}",
            marks=() if scheduler == next(iter(family.schedulers)) else pytest.mark.full,
        )
        for family, scheduler in cases()
    ],
)


def difference(images: np.ndarray, others: np.ndarray) -> float:
    assert images.shape == others.shape
    return float(np.abs(images - others).max())


@functools.cache
def drawer(family: Family, scheduler: str | None = None) -> Any:
    """draw(prompt, seed=..., steps=..., **changes) -> images; each is drawn once."""
    pipeline = family.build_with(scheduler) if scheduler else family.build()

    @functools.cache
    def draw(prompt: str, **changes: Any) -> np.ndarray:
        images: np.ndarray = pipeline(**family.arguments(prompt, **changes)).images
        return images

    draw.pipeline = pipeline  # type: ignore[attr-defined]
    return draw


@every_family
def test_a_family_is_built_the_same_twice_and_leaves_the_random_state(family: Family) -> None:
    before = torch.get_rng_state()
    first, second = family.build(), family.build()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.components.keys() == second.components.keys()
    for one, other in zip(networks(first), networks(second), strict=True):
        assert not one.training
        assert one is not other
        weights, others = one.state_dict(), other.state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {
            torch.float32
        }


@every_case
def test_the_image_depends_on_prompt_and_seed_alone(family: Family, scheduler: str) -> None:
    draw = drawer(family, scheduler)
    image = draw(PROMPT)
    assert image.shape == (1, family.call["height"], family.call["width"], 3)
    assert np.isfinite(image).all()
    assert np.mean((image == 0) | (image == 1)) < 0.2  # what is clipped hides differences
    torch.rand(1)  # nothing is drawn from the global generator
    assert np.array_equal(draw.__wrapped__(PROMPT), image)
    assert difference(draw(OTHER), image) > VISIBLE
    assert difference(draw(PROMPT, seed=1), image) > VISIBLE


@every_family
def test_the_image_depends_on_steps_and_guidance_and_may_be_wide(family: Family) -> None:
    draw = drawer(family)
    image = draw(PROMPT)
    assert difference(draw(PROMPT, steps=5), image) > VISIBLE
    for name in family.call.keys() & {"guidance_scale", "true_cfg_scale", "prior_guidance_scale"}:
        assert difference(draw(PROMPT, **{name: 2.0}), image) > VISIBLE
    height, width = family.call["height"], 2 * family.call["width"]
    assert draw(PROMPT, width=width).shape == (1, height, width, 3)


@every_case
def test_two_prompts_in_one_call_are_the_two_alone(family: Family, scheduler: str) -> None:
    """So that a difference seen by a test of the server is the server's."""
    draw = drawer(family, scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 5)]
    together = draw.pipeline(
        **family.arguments("") | {"prompt": [PROMPT, OTHER], "generator": generators}
    ).images
    assert difference(together[:1], draw(PROMPT)) < 1e-5
    assert difference(together[1:], draw(OTHER, seed=5)) < 1e-5


def test_quoted_words_take_hunyuans_second_guider_and_encoder() -> None:
    draw = drawer.__wrapped__(FAMILIES["hunyuan_image"])
    draw(PROMPT)
    assert draw.pipeline.guider.momentum_buffer is not None
    assert draw.pipeline.ocr_guider.momentum_buffer is None
    assert difference(draw("a sign 'UP'"), draw("a sign 'DOWN'")) > VISIBLE
    assert draw.pipeline.ocr_guider.momentum_buffer is not None


@pytest.mark.parametrize("name", ["hunyuan_image", "qwen_image"])
def test_qwens_template_has_the_length_that_the_pipeline_drops(name: str) -> None:
    pipeline = FAMILIES[name].build()
    template = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(pipeline.tokenizer(template).input_ids) == pipeline.prompt_template_encode_start_idx
