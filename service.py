"""The BentoML service: `bentoml serve service.py`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Optional

# neither `bentoml serve` nor a built bento puts the project's src folder on the path
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# `bentoml serve stepweave:TAG` first tries a module of that name: an installed copy must not stand
# in for the bento's own
sys.modules.pop("stepweave", None)

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before the import, which reads it

import bentoml
from PIL.Image import Image
from pydantic import BeforeValidator
from starlette.responses import Response

from stepweave.api.app import Api
from stepweave.api.connections import Connections
from stepweave.api.middleware.contract import ContractMiddleware
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

# OpenMP's threads must not spin while they wait: with another busy process beside it, an image
# takes 20 times as long
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# one worker sees every GPU, so that STEPWEAVE_DEVICE=cuda:1 means what it says; BentoML would show
# it the first alone
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
    """An edit as BentoML reads it from a form, after the middleware has: it takes a prompt of
    digits for a number."""

    prompt: Text
    image: Image
    mask: Optional[Image] = None  # noqa: UP045 -- BentoML does not look into `Image | None`


def answer(ctx: bentoml.Context, response: Response) -> Response:
    # BentoML overwrites the response's with this one
    ctx.response.status_code = response.status_code
    return response


@bentoml.service(
    name="stepweave",
    resources={"gpu": 1},
    workers=1,  # one process holds the one copy of the model
    # BentoML's timeout answers but does not stop the work, and its limit of concurrency counts
    # probes: both are ours
    traffic={"timeout": 7 * 24 * 3600},  # not in force: see drop_timeout_middleware
    metrics={"enabled": False},  # /metrics is the mounted app's
    logging={"access": {"enabled": False}},  # BentoML's lines lack the request's id and who left
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
        # the hook below is called once all connections have ended, which a stream may put off
        # beyond the grace period
        on_signals(server.terminate, signal.SIGTERM, signal.SIGINT)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await server.shut_down()

    # The annotations of what is returned are what BentoML's clients make of the answers

    @bentoml.api(input_spec=ImageRequest)
    async def generate(self, ctx: bentoml.Context, **fields: object) -> Image:
        """One image; its parameters come back in `X-Stepweave-*` headers and in the file."""
        body = ImageRequest.model_validate(fields)
        return answer(
            ctx,
            await routes.answered(ctx.request, lambda: routes.generate(ctx.request, server, body)),
        )

    @bentoml.api(input_spec=StreamRequest)
    async def generate_stream(
        self, ctx: bentoml.Context, **fields: object
    ) -> AsyncGenerator[str, None]:
        """The same as server-sent events, with previews and, with `events` "all", the place in the
        queue and progress."""
        body = StreamRequest.model_validate(fields)
        return answer(
            ctx,
            await routes.answered(
                ctx.request, lambda: routes.generate_stream(ctx.request, server, body)
            ),
        )

    @bentoml.api(input_spec=EditInput)
    async def edit(self, ctx: bentoml.Context, **fields: object) -> Image:
        """One image made from another, within a mask if one is given."""
        return answer(
            ctx, await routes.answered(ctx.request, lambda: routes.edit(ctx.request, server))
        )


# It returns a whole response, so that a refusal has its own status, and is no generator; its
# clients shall read it as one
Stepweave.apis["generate_stream"].is_stream = True
Stepweave.apis["generate_stream"].output_spec.media_type = "text/event-stream"
Stepweave.add_asgi_middleware(ContractMiddleware, server=server)
