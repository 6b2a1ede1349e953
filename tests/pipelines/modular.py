"""Modular pipelines: the blocks of diffusers with tiny components."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.pipelines.registry import entry, example_image
from tests.pipelines.transformers_flux import FLUX, flux_parts
from tests.pipelines.transformers_parts import strength

MODULAR: dict[str, Any] = {"output": "images"}


def made(blocks: Any, **parts: Any) -> Any:
    """The pipeline of blocks with these components."""
    pipeline = blocks.init_pipeline()
    pipeline.update_components(**parts)
    return pipeline


@entry(**FLUX, **MODULAR)
def flux_modular() -> diffusers.FluxModularPipeline:
    return made(diffusers.FluxAutoBlocks(), **flux_parts())


@entry(**FLUX, **MODULAR, image=example_image, strength=strength)
def flux_modular_img2img() -> diffusers.FluxModularPipeline:
    return made(diffusers.FluxAutoBlocks(), **flux_parts())
