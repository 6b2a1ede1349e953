"""A job's result: images, checked and encoded, and the members of the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from stepweave.errors import ContentFlaggedError, ImageCountError
from stepweave.images.encode import encode
from stepweave.images.outputs import images_each, images_of, is_constant, outputs_of
from stepweave.parameters import (
    GeneratedImages,
    ImageFile,
    ImageRequest,
    Parameters,
    ResolvedParameters,
    Timings,
)
from stepweave.serving.resources import GenerationDetails, TokenDetails, Usage
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from stepweave.engine import Job
    from stepweave.serving.request import Means


class Results:
    """Makes the answer of one request; `warnings` are about its images."""

    def __init__(self, request: ImageRequest, parameters: Parameters, means: Means) -> None:
        self.request = request
        self.parameters = parameters
        self.warnings: list[str] = []
        self._means = means
        self._each = 1  # images for each requested one

    def of(self, output: Any, job: Job) -> GeneratedImages:
        """The images in a job's output. Raises ContentFlaggedError and ImageCountError."""
        parameters, images = self.parameters, images_of(output, self._means.pipeline)
        count = len(images)
        self._each = images_each(output, images, parameters.n)
        if not self._each:
            raise ImageCountError(
                f"The pipeline made {count} images; {parameters.n} were requested."
            )
        outputs = outputs_of(output, count)
        size = parameters.width, parameters.height
        for index, image in enumerate(images):
            if image.size != size:
                width, height = image.size
                self.warnings.append(
                    f"image {index} is {width}x{height}: the pipeline did not make it in the "
                    f"requested size, {size[0]}x{size[1]}."
                )
        if any(outputs.flagged) and self._means.refuse_flagged:
            self._means.metrics.images.labels("flagged").inc(sum(outputs.flagged))
            index = outputs.flagged.index(True)
            raise ContentFlaggedError(index, outputs.flags[index])
        self.warnings += outputs.warnings
        return GeneratedImages(
            self.parameters, images, timings_of(job), outputs.flagged, outputs.others
        )

    async def encode(self, generation: GeneratedImages) -> list[ImageFile]:
        """Encode the images on the encoders' threads."""
        began = time.monotonic()
        request, model = self.request, self._means.model
        values = [
            {**generation.parameters.of_image(i // self._each), "size": "{}x{}".format(*image.size)}
            for i, image in enumerate(generation.images)
        ]
        encoded = await asyncio.gather(
            *(
                on_thread(self._means.encoders, _file, image, request, value, model)
                for image, value in zip(generation.images, values, strict=True)
            )
        )
        generation.timings.encode_image = time.monotonic() - began
        files = []
        for i, ((data, constant), value) in enumerate(zip(encoded, values, strict=True)):
            flagged = generation.flagged[i]
            if constant and not flagged:
                self.warnings.append(f"image {i} has only one colour; the model may have failed.")
            result = "flagged" if flagged else "constant" if constant else "ok"
            self._means.metrics.images.labels(result).inc()
            files.append(
                ImageFile(data, value["seed"], value, request.output_format, flagged=flagged)
            )
        return files

    def details(
        self, generation: GeneratedImages, job: Job, steps: int, warnings: list[str]
    ) -> GenerationDetails:
        """The answer without the images; `steps` are those of one image."""
        return GenerationDetails(
            created=int(time.time()),
            model=self._means.model,
            size="{}x{}".format(*generation.images[0].size),
            output_format=self.request.output_format,
            usage=usage_of(generation, steps, job.tokens, self._means.positions),
            parameters=self.resolved(),
            timings=generation.timings.rounded(),
            warnings=warnings,
            outputs=generation.outputs or None,
        )

    def resolved(self) -> ResolvedParameters:
        """The request's parameters, defaults filled in."""
        return ResolvedParameters.of(self.request, self.parameters, self._means.scheduler)


def usage_of(
    generation: GeneratedImages, steps: int, tokens: int, positions: Callable[[int, int], int]
) -> Usage:
    """OpenAI's members, in tokens of prompts and latent positions, and images, steps and pixels.

    `steps` are those of one image, `tokens` those of the prompts; `positions` gives the latent
    positions of an image from its width and height in pixels.
    """
    parameters, images = generation.parameters, generation.images
    sources = () if parameters.sources is None else parameters.sources.images.items()
    source = sum(
        positions(*image.size)
        for name, several in sources
        for image in several
        if image.mode != "L"
    )
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


def timings_of(job: Job) -> Timings:
    """The timings of a finished job, without encoding and total."""
    assert job.started is not None and job.finished is not None
    begun = job.begun or job.started
    # with a cached prompt there is no forward before the first step
    opened = max(job.opened or begun, begun)
    stepped = job.stepped or opened
    return Timings(
        queued=begun - job.accepted,
        encode=opened - begun,
        denoise=stepped - opened,
        decode=job.finished - stepped,
    )


def _file(
    image: Image.Image, request: ImageRequest, values: dict[str, Any], model: str
) -> tuple[bytes, bool]:
    """An image's file, and whether the image has a single colour."""
    metadata = values if request.metadata else None
    data = encode(image, request.output_format, metadata, model, request.output_compression)
    return data, is_constant(image)
