"""BentoML's own description of the native API, with the arguments and images of the model.

BentoML makes it from the signatures of its APIs, before a model is loaded, and its clients refuse
arguments that are not in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.api.middleware.base import Middleware
from stepweave.api.model_fields import with_fields
from stepweave.calls import RequestFields
from stepweave.parameters import ImageRequest
from stepweave.serving.server import Server

PATH = "/schema.json"
EDITS = "/edit"
FILE = {"type": "file", "format": "image", "pil": True}


class NativeSchema(Middleware):
    """Answers `GET /schema.json` once a model is loaded; `schema` is BentoML's own."""

    def __init__(self, app: ASGIApp, server: Server, schema: Callable[[], dict[str, Any]]) -> None:
        super().__init__(app, server)
        self._schema = schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "GET"
        if not asked or self.server.model is None:
            await self.app(scope, receive, send)
            return
        schema = with_model(self._schema(), self.server.fields)
        await JSONResponse(schema)(scope, receive, send)


def with_model(schema: dict[str, Any], fields: RequestFields) -> dict[str, Any]:
    """BentoML's description with a model's fields among the inputs of each API."""
    schema = copy.deepcopy(schema)
    known = with_fields(ImageRequest, fields).model_json_schema()["properties"]
    arguments = {name: known[name] for name in fields.arguments}
    files = {name: {**FILE, "default": None} for name in fields.files}
    # bodies in JSON have no files, so their images are texts
    texts = {name: _data_urls(known[name].get("description", "")) for name in fields.files}
    if texts:
        texts["strength"] = known["strength"]
    if "image" in fields.several:
        files["images"] = {"type": "array", "items": FILE, "default": None}
    for route in schema["routes"]:
        given = route["input"]
        new = {**arguments, **(files if route["route"] == EDITS else texts)}
        given["properties"] = {**new, **given["properties"]}
        left = {"prompt"} if not fields.prompt else set()
        # of several images none is called `image`
        left |= {"image"} if "images" in files or not fields.needs_image else set()
        given["required"] = [
            *(name for name in given.get("required", ()) if name not in left),
            *fields.needs,
        ]
    return schema


def _data_urls(description: str) -> dict[str, Any]:
    """What a text, or a list of texts, is; without a type, which would be only one of them."""
    text = {"type": "string"}
    return {
        "anyOf": [text, {"type": "array", "items": text}],
        "default": None,
        "description": description,
    }
