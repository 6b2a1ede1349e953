"""The BentoML service, without the decorator, which notes the module that applies it: `service.py`
of the repository, or `stepweave.service` of an installed package.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Optional

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before the import, which reads it

import bentoml
from PIL.Image import Image
from pydantic import BeforeValidator
from starlette.responses import Response

from stepweave.api.app import Api
from stepweave.api.connections import Connections
from stepweave.api.middleware.contract import ContractMiddleware
from stepweave.api.middleware.native_schema import NativeSchema
from stepweave.api.routes import bentoml as routes
from stepweave.api.schemas import BentoMLEditRequest, StreamRequest
from stepweave.config import Settings
from stepweave.errors import ConfigError
from stepweave.parameters import ImageRequest
from stepweave.serving.listening import listening, log_addresses
from stepweave.serving.server import Server
from stepweave.serving.signals import on_signals
from stepweave.serving.supervisor import prepare_command, report_failure
from stepweave.telemetry.logs import configure_logs

# OpenMP's threads must not spin while they wait: with another busy process on the machine, an image
# would take 20 times as long
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# the worker sees all GPUs, so that STEPWEAVE_DEVICE=cuda:1 works; BentoML would only show it the
# first
os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")
routes.drop_timeout_middleware()
configure_logs()
try:
    settings = Settings.load()
    server = Server(settings, on_failure=report_failure if settings.exit_on_failure else None)
except ConfigError as error:
    raise SystemExit(f"stepweave: {error.message}") from None
connections = Connections(settings.max_connections)
connections.install()
server.leaving.listeners.append(connections.close_idle)


Text = Annotated[
    str, BeforeValidator(lambda value: value if isinstance(value, str) else json.dumps(value))
]


class EditInput(BentoMLEditRequest, strict=False, arbitrary_types_allowed=True):
    """An edit as BentoML reads it from a form, where a prompt of digits becomes a number."""

    prompt: Text
    image: Image
    mask: Optional[Image] = None  # noqa: UP045 -- BentoML does not look into `Image | None`


def answer(ctx: bentoml.Context, response: Response) -> Any:
    # BentoML replaces the response's status with this one; clients decode what is annotated
    ctx.response.status_code = response.status_code
    return response


service = bentoml.service(
    name="stepweave",
    resources={"gpu": 1},
    workers=1,  # one process holds the one copy of the model
    # BentoML's timeout answers without stopping the work, and its concurrency limit counts probes,
    # so the server has its own
    traffic={"timeout": 7 * 24 * 3600},  # without effect: see drop_timeout_middleware
    metrics={"enabled": False},  # /metrics is the mounted app's
    # BentoML's lines have neither the request's id nor clients that disconnected
    logging={"access": {"enabled": False}},
)


@bentoml.asgi_app(Api(server).app(), path="/")
class Stepweave:
    """Text-to-image generation by any diffusers pipeline."""

    @bentoml.on_deployment
    def prepare() -> None:
        prepare_command(settings.exit_on_failure)

    @bentoml.on_startup
    async def start(self) -> None:
        log_addresses(listening(), keys=server.keys.required)
        server.start()
        # the hook below is called once all connections have ended, which streams may delay beyond
        # the grace period
        on_signals(server.terminate, signal.SIGTERM, signal.SIGINT)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await server.shut_down()

    # the return annotations say how BentoML's clients decode the answers

    @bentoml.api(input_spec=ImageRequest)
    async def generate(self, ctx: bentoml.Context, **fields: object) -> Image:
        """One image; its parameters are in `X-Stepweave-*` headers and in the file."""
        return answer(
            ctx, await routes.answered(ctx.request, lambda: routes.one_image(ctx.request, server))
        )

    @bentoml.api(input_spec=StreamRequest)
    async def generate_stream(
        self, ctx: bentoml.Context, **fields: object
    ) -> AsyncGenerator[str, None]:
        """The same as server-sent events, with previews, and with `events` "all" also queue
        position and progress."""
        return answer(
            ctx,
            await routes.answered(ctx.request, lambda: routes.generate_stream(ctx.request, server)),
        )

    @bentoml.api(input_spec=EditInput)
    async def edit(self, ctx: bentoml.Context, **fields: object) -> Image:
        """Edit an image, within a mask if there is one."""
        return answer(
            ctx, await routes.answered(ctx.request, lambda: routes.one_image(ctx.request, server))
        )


def complete(made: bentoml.Service[Stepweave]) -> bentoml.Service[Stepweave]:
    """The service, with what its decorator has no argument for."""
    stream = made.apis["generate_stream"]
    # it returns a whole response instead of a generator, so that a refusal has its own status;
    # clients must read it as a stream
    stream.is_stream = True
    stream.output_spec.media_type = "text/event-stream"
    made.add_asgi_middleware(ContractMiddleware, server=server)
    made.add_asgi_middleware(NativeSchema, server=server, schema=made.schema)
    return made
