"""The calls of diffusers' pipelines."""

from __future__ import annotations

import diffusers

from stepweave.calls import CallDescription, described
from tests.pipelines.catalog import exported


def image_calls() -> list[CallDescription]:
    """Of all usual pipelines that make images; the calls of modular ones have no signature."""
    names = sorted(name for name in exported() if not name.endswith("ModularPipeline"))
    found = [described(getattr(diffusers, name)) for name in names]
    return [one for one in found if one.kind == "image"]
