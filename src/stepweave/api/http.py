"""The ASGI app of the contract's own routes: OpenAI Images, models and metrics."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stepweave.api.responses import handle_error
from stepweave.api.schemas import GenerationRequest, parse, require_json
from stepweave.errors import Cancelled, NotFound, StepweaveError, shown
from stepweave.generation import Generation
from stepweave.server import PictureFile, Server

T = TypeVar("T")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if the client leaves first, cancel it and raise Cancelled. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("The client left.")
        return task.result()
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
                await asyncio.wait({pending})


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise Cancelled("The client left while it sent the body.") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Api:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/images/generations", self.generations, methods=["POST"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{id:path}", self.model, methods=["GET"]),
                Route("/metrics", self.metrics, methods=["GET"]),
            ],
            exception_handlers={StepweaveError: handle_error},
        )

    async def generations(self, request: Request) -> Response:
        with self.server.metrics.counted():
            require_json(request.headers.get("content-type", ""))
            body = parse(await _body(request), GenerationRequest)
            generation, files = await until_disconnect(request, self.server.generate(body, n=body.n, model=body.model))
        model, _ = self.server.ready()
        return Response(
            await asyncio.to_thread(_render, generation, files, model.id, body.output_format),
            media_type="application/json",
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        description = self._describe()
        if request.path_params["id"] != description["id"]:
            raise NotFound(
                f"There is no model {shown(request.path_params['id'])}; this server has {description['id']!r}.",
                code="model_not_found",
            )
        return JSONResponse(description)

    def _describe(self) -> dict[str, Any]:
        model, engine = self.server.ready()
        settings = self.server.settings
        return {
            "id": model.id,
            "object": "model",
            "created": self.server.created,
            "owned_by": "stepweave",
            "stepweave": {
                "pipeline": model.pipeline_class,
                "device": self.server.device,
                "dtype": self.server.dtype,
                "native_size": f"{model.width}x{model.height}",
                "size_multiple": model.multiple,
                "max_side": model.max_side,
                "max_pixels": settings.max_pixels,
                "default_num_inference_steps": model.default_steps,
                "max_num_inference_steps": settings.max_steps,
                "default_guidance_scale": model.default_guidance,
                "max_images": settings.max_images,
                "max_prompt_characters": settings.max_prompt_characters,
                "batching": engine.mode,
                "switches": settings.switches(),
                "certificates": engine.stats().certificates,
            },
        }

    async def metrics(self, request: Request) -> Response:
        # off the loop: CUDA's memory query may wait for the driver
        content = await asyncio.to_thread(self.server.metrics.render)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _render(generation: Generation, files: list[PictureFile], model: str, output_format: str) -> bytes:
    """The body of a generation's answer. Base64 needs no escaping, so JSON's encoder is spared the megabytes of it."""
    parameters = generation.parameters
    answer = {
        "created": int(time.time()),
        "model": model,
        "usage": {
            "images": parameters.n,
            "steps": parameters.n * parameters.num_inference_steps,
            "pixels": parameters.n * parameters.width * parameters.height,
        },
        "parameters": {**parameters.of_image(0), "n": parameters.n, "output_format": output_format},
        "timings": {name: round(seconds, 6) for name, seconds in asdict(generation.timings).items()},
        "warnings": generation.warnings,
    }
    pieces = [json.dumps(answer)[:-1].encode(), b', "data": [']
    for i, file in enumerate(files):
        pieces += [b", " if i else b"", b'{"b64_json": "', base64.b64encode(file.data)]
        pieces.append(f'", "seed": {file.seed}, "revised_prompt": null}}'.encode())
    return b"".join([*pieces, b"]}"])
