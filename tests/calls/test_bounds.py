"""The bounds of arguments: by the work that they mean, by tables of the model, by their type."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from stepweave.calls import Bounds, RequestFields, WorkLimits, described, fields_of
from stepweave.calls.bounds import LARGEST_NUMBER, bounds_of
from tests.support.calls import image_calls

LIMITS = WorkLimits(
    steps=50, images=4, side=2048, pixels=2**20, characters=300, train_timesteps=1000, classes=10
)


def bounds(name: str, default: Any, *, integer: bool = True) -> tuple[float, float]:
    found = bounds_of(name, default, integer=integer, limits=LIMITS)
    assert found is not None
    return found.least, found.most


@pytest.mark.parametrize(
    ("name", "default", "expected"),
    [
        ("decoder_num_inference_steps", 25, (1, 50)),
        ("edit_warmup_steps", 10, (0, 50)),
        ("layers", 4, (1, 4)),
        ("ensemble_size", 1, (1, 4)),
        ("jump_n_sample", 10, (1, 10)),
        ("skip_guidance_layers", None, (0, 1000)),  # indices
        ("max_sequence_length", 256, (1, 256)),
        ("tokenizer_max_length", None, (1, 512)),
        ("max_sequence_length", 3000, (1, 3000)),
        ("original_size", None, (0, 2048)),
        ("crops_coords_top_left", (0, 0), (-2048, 2048)),
        ("processing_resolution", None, (0, 1024)),  # its square is the work
        ("upsampling_width", None, (0, 1024)),
        ("max_area", 2**20, (1, 2**20)),
        ("class_labels", None, (0, 9)),
        ("timesteps", None, (0, 999)),
        ("noise_level", 20, (0, 999)),
        ("prompt_reps", 20, (1, 20)),
    ],
)
def test_what_multiplies_work_or_reads_a_table_is_bounded(
    name: str, default: Any, expected: tuple[float, float]
) -> None:
    assert bounds(name, default) == expected


@pytest.mark.parametrize(
    ("name", "default", "expected"),
    [
        ("true_cfg_scale", 4.0, (0, 100)),
        ("sld_guidance_scale", 1000, (0, 10_000)),
        ("eta", 0.0, (0, 1)),
        ("denoising_end", None, (0, 1)),
        ("guidance_rescale", 0.0, (0, 1)),
        ("mu", None, (-LARGEST_NUMBER, LARGEST_NUMBER)),
    ],
)
def test_numbers_are_bounded_by_their_kind(
    name: str, default: Any, expected: tuple[float, float]
) -> None:
    assert bounds(name, default, integer=False) == expected


def test_a_list_of_timesteps_is_no_longer_than_the_most_steps() -> None:
    for name, integer in (("sigmas", False), ("timesteps", True)):
        found = bounds_of(name, None, integer=integer, limits=LIMITS)
        assert found is not None and found.length == LIMITS.steps


@pytest.mark.parametrize("name", ["control_mode", "data_type"])
def test_an_index_of_an_unknown_table_is_offered_only_if_a_preset_bounds_it(name: str) -> None:
    """Reading beyond the end of a table breaks a GPU for all requests."""
    assert bounds_of(name, None, integer=True, limits=LIMITS) is None
    calls = [described(diffusers.FluxControlNetPipeline)]
    assert "control_mode" not in fields_of(calls, {}, {}, LIMITS).arguments
    assert "control_mode" in fields_of(calls, {}, {"control_mode": (0, 5)}, LIMITS).arguments


def test_each_text_of_a_list_costs_as_much_as_an_image() -> None:
    calls = [described(diffusers.SemanticStableDiffusionPipeline)]
    found = fields_of(calls, {}, {}, LIMITS).arguments["editing_prompt"].bounds
    assert (found.length, found.characters) == (LIMITS.images, LIMITS.characters)


def test_every_default_of_diffusers_is_within_its_bounds() -> None:
    """But for numbers of steps and pixels, whose limits are the operator's."""
    for call in image_calls():
        fields = fields_of([call], {}, {}, LIMITS)
        for name, field in fields.arguments.items():
            default = field.argument.default
            for one in default if isinstance(default, (list, tuple)) else [default]:
                if isinstance(one, (int, float)) and "steps" not in name:
                    assert field.bounds.least <= one <= field.bounds.most, (call.pipeline, name)


def fields(offered: dict[str, Any] | None = None, **defaults: Any) -> RequestFields:
    calls = [described(diffusers.QwenImageLayeredPipeline), described(diffusers.DiTPipeline)]
    return fields_of(calls, defaults, offered or {}, LIMITS)


def test_a_preset_bounds_or_withholds_an_argument() -> None:
    assert "layers" in fields().arguments
    assert "layers" not in fields({"layers": False}).arguments
    assert "image" not in fields({"image": False}).images
    assert fields({"layers": (1, 2)}).arguments["layers"].bounds == Bounds(1, 2)
    assert fields(layers=9).arguments["layers"].bounds == Bounds(1, 9)


def test_what_a_preset_gives_need_not_be_sent() -> None:
    calls = [described(diffusers.DiTPipeline)]
    assert fields_of(calls, {}, {}, LIMITS).needs == ("class_labels",)
    assert fields_of(calls, {"class_labels": [1]}, {}, LIMITS).needs == ()
    assert not fields_of(calls, {}, {}, LIMITS).prompt


def test_images_have_the_names_of_every_api_and_the_pipelines_own() -> None:
    calls = [described(diffusers.PaintByExamplePipeline)]
    found = fields_of(calls, {}, {}, LIMITS)
    assert set(found.images) == {"image", "mask", "mask_image", "example_image"}
    assert found.same == {"mask_image": "mask", "images": "image"}
