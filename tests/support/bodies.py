"""Bodies of requests, and the routes that take them."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepweave.api.middleware.contract import ContractMiddleware
from stepweave.api.routes import bentoml as native
from stepweave.serving.server import Server
from tests.support.asgi import App

FORM = {"Content-Type": "multipart/form-data; boundary=x"}
JSON = {"Content-Type": "application/json"}
INFER = "/v2/models/shapes/infer"
EDITS = "/v1/images/edits"
LEGACY = "/api/diffusers/inference"


def form(image: bytes, **fields: Any) -> bytes:
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in ({"prompt": "a", "num_inference_steps": 4, "seed": 1} | fields).items()
    ]
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return b"".join([*parts, head, image, b"\r\n--x--\r\n"])


def png(side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


class Native:
    """The service's native routes without BentoML."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, server = Request(scope, receive), self.server

        async def work() -> Response:
            if scope["path"] == "/generate_stream":
                return await native.generate_stream(request, server)
            return await native.one_image(request, server)

        response = await native.answered(request, work)
        await response(scope, receive, send)


def natively(app: App) -> None:
    app.asgi = ContractMiddleware(Native(app.server), app.server)  # type: ignore[assignment]
