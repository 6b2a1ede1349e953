"""The calls of diffusers' pipelines."""

from __future__ import annotations

import diffusers

from stepweave.calls import CallDescription, described
from tests.pipelines.catalog import exported


def image_calls() -> list[CallDescription]:
    """Of all pipelines that make images."""
    found = [described(getattr(diffusers, name)) for name in sorted(exported())]
    return [one for one in found if one.kind == "image"]
