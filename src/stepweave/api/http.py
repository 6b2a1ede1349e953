"""The ASGI app of the contract's own routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stepweave.api.inference import InferenceApi
from stepweave.api.jobs import JobRoutes
from stepweave.api.legacy import LegacyApi
from stepweave.api.openai import OpenAI
from stepweave.api.openapi import OpenApi
from stepweave.api.responses import handle_error
from stepweave.errors import StepweaveError
from stepweave.serving.heap import Heap
from stepweave.serving.keys import LOOK_SECONDS
from stepweave.serving.server import Server
from stepweave.threads import on_thread

logger = logging.getLogger(__name__)

TRIM_SECONDS = 30.0  # between two looks whether the heap has grown


class Api:
    """All routes but BentoML's native ones and the probes, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def app(self) -> Starlette:
        surfaces = (OpenAI, JobRoutes, InferenceApi, LegacyApi, OpenApi)
        app = Starlette(
            routes=[
                *(route for surface in surfaces for route in surface(self.server).routes()),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{id:path}", self.model, methods=["GET"]),
                Route("/metrics", self.metrics, methods=["GET"]),
            ],
            exception_handlers={StepweaveError: handle_error},
            lifespan=self.lifespan,
        )
        # it would send clients to whatever host their request names
        app.router.redirect_slashes = False
        return app

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """While the app serves, what is past its time is removed, stores that failed are tried
        again, the file of API keys is watched, and memory that was freed is given back."""
        jobs = self.server.jobs
        work = [_repeat(LOOK_SECONDS, self.server.keys.look), _repeat(TRIM_SECONDS, Heap().look)]
        work += [] if jobs is None else [jobs.look_after()]
        tasks = [asyncio.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        self.server.named(request.path_params["id"])
        return JSONResponse(self._describe())

    def _describe(self) -> dict[str, Any]:
        model, engine = self.server.ready()
        settings, stats = self.server.settings, engine.stats()
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
                **model.limits.as_json(),
                "max_pixels": settings.max_pixels,
                "max_input_pixels": settings.max_input_pixels,
                "default_num_inference_steps": model.default_steps,
                "max_num_inference_steps": settings.max_steps,
                "default_guidance_scale": model.default_guidance,
                "presets": model.preset.sources(),
                "schedulers": sorted(model.schedulers),
                "scheduler_steps": model.scheduler_steps,
                "edits": list(model.edits),
                "limits_of_edits": {
                    name: limits.as_json()
                    for name, limits in model.limits_of_edits.items()
                    if limits != model.limits
                },
                "previews": self.server.previewer is not None,
                "batching": engine.mode,
                "switches": settings.switches(),
                "certificates": stats.certificates,
                "unshared": stats.unshared,
            },
        }

    async def metrics(self, request: Request) -> Response:
        # off the loop: CUDA's memory query may wait for the driver
        content = await on_thread(None, self.server.metrics.render)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _repeat(seconds: float, look: Callable[[], None]) -> None:
    """Call it on a thread every so often, for ever, whatever it raises."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await on_thread(None, look)
        except Exception:
            logger.exception("%s failed; it is called again in %g s", look.__qualname__, seconds)
