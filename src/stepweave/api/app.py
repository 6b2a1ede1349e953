"""The ASGI app of the contract's own routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette

from stepweave.api.openapi import OpenApiRoutes
from stepweave.api.responses import handle_error
from stepweave.api.routes.diffusers_example import DiffusersExampleRoutes
from stepweave.api.routes.documentation import DocumentationRoutes
from stepweave.api.routes.jobs import JobRoutes
from stepweave.api.routes.loras import LoraRoutes
from stepweave.api.routes.open_inference import OpenInferenceRoutes
from stepweave.api.routes.openai import OpenAIRoutes
from stepweave.api.routes.root import RootRoutes
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
        surfaces = (
            OpenAIRoutes,
            LoraRoutes,
            JobRoutes,
            OpenInferenceRoutes,
            DiffusersExampleRoutes,
            RootRoutes,
            OpenApiRoutes,
            DocumentationRoutes,
        )
        app = Starlette(
            routes=[route for surface in surfaces for route in surface(self.server).routes()],
            exception_handlers={StepweaveError: handle_error},
            lifespan=self.lifespan,
        )
        # a redirect would lead to whatever host the request names
        app.router.redirect_slashes = False
        return app

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """While the app serves: remove expired jobs, retry failed stores, watch the file of API
        keys, and give freed memory back."""
        jobs = self.server.jobs
        work = [_repeat(LOOK_SECONDS, self.server.keys.look), _repeat(TRIM_SECONDS, Heap().look)]
        work += [] if jobs is None else [jobs.look_after()]
        tasks = [asyncio.create_task(coroutine) for coroutine in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _repeat(seconds: float, look: Callable[[], None]) -> None:
    """Call `look` on a thread again and again, whatever it raises."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await on_thread(None, look)
        except Exception:
            logger.exception("%s failed; it is called again in %g s", look.__qualname__, seconds)
