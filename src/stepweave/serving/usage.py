"""The `usage` of answers."""

from __future__ import annotations

from collections.abc import Callable

from stepweave.parameters import GeneratedImages
from stepweave.serving.resources import TokenDetails, Usage


def usage_of(
    generation: GeneratedImages, steps: int, tokens: int, positions: Callable[[int, int], int]
) -> Usage:
    """OpenAI's members, in tokens of prompts and latent positions, and images, steps and pixels.

    `steps` are those of one image, `tokens` those of the prompts; `positions` gives the latent
    positions of an image from its width and height in pixels.
    """
    parameters, images = generation.parameters, generation.images
    source = 0 if parameters.sources is None else positions(parameters.width, parameters.height)
    made = sum(positions(*image.size) for image in images)
    return Usage(
        input_tokens=tokens + source,
        input_tokens_details=TokenDetails(text_tokens=tokens, image_tokens=source),
        output_tokens=made,
        output_tokens_details=TokenDetails(text_tokens=0, image_tokens=made),
        total_tokens=tokens + source + made,
        images=parameters.n,
        steps=parameters.n * steps,
        pixels=sum(image.width * image.height for image in images),
    )
