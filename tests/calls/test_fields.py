"""The fields of a model: which images mean the same, of one pipeline and of several."""

from __future__ import annotations

import diffusers

from stepweave.calls import WorkLimits, described, fields_of

LIMITS = WorkLimits(steps=50, images=4, side=1024, pixels=1024 * 1024, characters=1000)


def test_the_image_of_a_component_is_not_that_of_an_edit() -> None:
    """Flux's pipeline with a ControlNet has no other image."""
    names = ("FluxPipeline", "FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline")
    found = fields_of([described(getattr(diffusers, name)) for name in names], {}, {}, LIMITS)
    assert found.same == {"images": "image"}
    assert {"image", "control_image"} <= found.images.keys()
    alone = fields_of([described(diffusers.FluxControlNetPipeline)], {}, {}, LIMITS)
    assert alone.same["control_image"] == "image"  # a model that has nothing else
