"""What a generation took, as answers tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepweave.parameters import Generation


def usage_of(
    generation: Generation, steps: int, tokens: int, positions: Callable[[int, int], int]
) -> dict[str, Any]:
    """OpenAI's members, in tokens of prompts and positions of latents, and what that was in images,
    steps and pixels.

    `steps` are those of one image, `tokens` those that were read of the prompts; `positions` gives
    those of an image's latents, of its width and height in pixels.
    """
    parameters, images = generation.parameters, generation.images
    source = 0 if parameters.sources is None else positions(parameters.width, parameters.height)
    made = sum(positions(*image.size) for image in images)
    return {
        "input_tokens": tokens + source,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": source},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": tokens + source + made,
        "images": parameters.n,
        "steps": parameters.n * steps,
        "pixels": sum(image.width * image.height for image in images),
    }
