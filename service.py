"""The BentoML service: `bentoml serve service.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# neither `bentoml serve` nor a built bento puts the project's src folder on the path
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# `bentoml serve stepweave:TAG` first tries a module of that name: an installed copy must not stand in for the bento's own
sys.modules.pop("stepweave", None)

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before the import, which reads it

import bentoml
from PIL.Image import Image

from stepweave.api.http import Api
from stepweave.api.middleware import ContractMiddleware
from stepweave.api.native import drop_timeout_middleware, picture_response
from stepweave.api.schemas import ImageRequest
from stepweave.config import Settings
from stepweave.errors import ConfigError
from stepweave.server import Server
from stepweave.telemetry.logs import configure_logs

# OpenMP's threads must not spin while they wait: with another busy process beside it, a picture takes 20 times as long
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# one worker sees every GPU, so that STEPWEAVE_DEVICE=cuda:1 means what it says; BentoML would show it the first alone
os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")
drop_timeout_middleware()
configure_logs()
try:
    server = Server(Settings.load())
except ConfigError as error:
    raise SystemExit(f"stepweave: {error.message}") from None


@bentoml.service(
    name="stepweave",
    resources={"gpu": 1},
    workers=1,  # one process holds the one copy of the model
    # BentoML's timeout answers but does not stop the work, and its limit of concurrency counts probes: both are ours
    traffic={"timeout": 7 * 24 * 3600},  # not in force: see drop_timeout_middleware
    metrics={"enabled": False},  # /metrics is the mounted app's
)
@bentoml.asgi_app(Api(server).app(), path="/")
class Stepweave:
    """Text-to-image generation by any diffusers pipeline."""

    @bentoml.on_startup
    def start(self) -> None:
        server.start()

    @bentoml.on_shutdown
    def stop(self) -> None:
        server.close()

    @bentoml.api(input_spec=ImageRequest)
    async def generate(self, ctx: bentoml.Context, **fields: object) -> Image:  # its client reads a picture
        """One picture; its parameters come back in `X-Stepweave-*` headers and in the file."""
        request = ImageRequest.model_validate(fields)
        response = await picture_response(ctx.request, server, request)
        ctx.response.status_code = response.status_code  # BentoML overwrites the response's with this one
        return response


Stepweave.add_asgi_middleware(ContractMiddleware, server=server, native={"/generate": ImageRequest})
