"""The surface of the diffusers example server (examples/server-async), for its clients."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stepweave.api.answer_schemas import DiffusersExampleAnswer, DiffusersExampleStatus
from stepweave.api.answers import warnings_header
from stepweave.api.bodies import whole_body
from stepweave.api.disconnect import until_disconnect
from stepweave.api.idempotency import submission_of
from stepweave.api.responses import answer
from stepweave.api.schemas import explain, parse_off_loop, require_json, some_of
from stepweave.api.urls import base_url
from stepweave.errors import InvalidRequestError, NotFoundError, shown
from stepweave.parameters import ImageRequest, Loras
from stepweave.serving.server import Server
from stepweave.serving.submission import Submission
from stepweave.threads import on_thread

DEFAULT_STEPS = 28  # the example server's
GIGABYTE = 1024**3


def _no_boolean(value: Any) -> Any:
    """Python takes true for 1; the OpenAPI document does not."""
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


Number = Annotated[int, BeforeValidator(_no_boolean)]


class DiffusersExampleRequest(BaseModel):
    """Body of `POST /api/diffusers/inference`."""

    # as the example server: lax, and ignoring what it does not know
    model_config = ConfigDict(extra="allow", frozen=True)

    prompt: str = Field(description="What the image should show.")
    negative_prompt: str | None = Field(None, description="What it should not show.")
    num_inference_steps: Number | None = Field(
        None,
        description=f"Denoising steps; {DEFAULT_STEPS} if absent, or the server's limit if that "
        "is less.",
    )
    num_images_per_prompt: Number = Field(1, ge=1, description="Number of images.")
    lora: Loras | None = Field(None, description="LoRAs for these images, as other routes take.")
    model: str | None = Field(
        None, description="Ignored, as the example server does: this one has one model."
    )


class DiffusersExampleRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/api/diffusers/inference", self.inference, methods=["POST"]),
            Route("/api/status", self.status, methods=["GET"]),
            Route("/images/{filename}", self.image, methods=["GET"]),
        ]

    async def inference(self, request: Request) -> Response:
        settings = self.server.settings
        require_json(request.headers.get("content-type", ""))
        async with whole_body(request) as content:
            body = await parse_off_loop(content, DiffusersExampleRequest)
        steps = body.num_inference_steps
        model, _ = self.server.ready()
        if body.num_images_per_prompt > model.limits.images:
            raise InvalidRequestError(
                f"num_images_per_prompt is {body.num_images_per_prompt}; the limit is "
                f"{model.limits.images}.",
                param="num_images_per_prompt",
            )
        image = _image_request(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt or None,  # to the example server both mean none
            num_inference_steps=min(DEFAULT_STEPS, settings.max_steps) if steps is None else steps,
            lora=body.lora,
        )
        root = base_url(request, settings)
        submission = submission_of(
            request, image, n=body.num_images_per_prompt, asked=body.model_dump_json()
        )
        names, warnings = await until_disconnect(request, self._generate(submission))
        if body.model_extra:
            unknown = some_of(list(body.model_extra))
            warnings = [*warnings, f"Unknown fields are ignored: {unknown}."]
        headers = {"X-Stepweave-Warnings": warnings_header(warnings)} if warnings else {}
        urls = [f"{root}/images/{name}" for name in names]
        return answer(DiffusersExampleAnswer(response=urls), headers)

    async def _generate(self, submission: Submission) -> tuple[list[str], list[str]]:
        """Names of the images' files in the store, and warnings."""
        made, files = await self.server.generate(submission), self.server.files
        names = await asyncio.gather(*(file.stored(files) for file in made.images))
        return names, made.details.warnings

    async def image(self, request: Request) -> Response:
        """A stored image. Its name cannot be guessed, and ends with the file."""
        name = request.path_params["filename"]
        file = await self.server.files.get(name)
        if file is None:
            raise NotFoundError(
                f"There is no image {shown(name)}; it may have expired.", code="image_not_found"
            )
        headers = {
            "Cache-Control": f"private, max-age={int(file.expires_in)}",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(file.data, media_type=file.media_type, headers=headers)

    async def status(self, request: Request) -> Response:
        model = self.server.model
        if model is None:
            raise self.server.unavailable()
        found = DiffusersExampleStatus(
            current_model=model.id,
            # off the loop: CUDA's memory query may wait for the driver
            memory=await on_thread(None, self._memory),
            active_inferences=self.server.metrics.in_flight(),
            # the example server counts requests as they begin
            total_requests=self.server.metrics.requests_begun,
        )
        return answer(found)

    def _memory(self) -> dict[str, Any]:
        vram = {
            sample.labels["kind"]: sample.value
            for family in self.server.metrics.vram.collect()
            for sample in family.samples
        }
        if not self.server.device.startswith("cuda") or not vram:
            return {}
        memory = {
            f"memory_{kind}_gb": round(vram[kind] / GIGABYTE, 2)
            for kind in ("allocated", "reserved")
        }
        return {**memory, "device": self.server.device}


def _image_request(**fields: Any) -> ImageRequest:
    try:
        return ImageRequest(**fields)
    except ValidationError as error:
        raise explain(error) from None
