"""The LoRAs of the model: which there are, and by administrators, which may be used."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stepweave.api.answer_schemas import LoraList, LoraModel, LoraRemoved
from stepweave.api.bodies import whole_body
from stepweave.api.context import context_of
from stepweave.api.disconnect import until_disconnect
from stepweave.api.responses import answer
from stepweave.api.schemas import parse, require_json
from stepweave.errors import ForbiddenError, LoraNotFoundError, NotFoundError
from stepweave.parameters import MAX_NAMED_LORA
from stepweave.serving.server import Server
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from stepweave.adapters.lora_files import Lora
    from stepweave.adapters.loras import Loras


class LoraRequest(BaseModel):
    """Body of `POST /v1/loras`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(
        min_length=1,
        max_length=MAX_NAMED_LORA,
        description="A LoRA, as `GET /v1/loras` lists it.",
    )


class LoraRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/v1/loras", self.list, methods=["GET"]),
            Route("/v1/loras", self.load, methods=["POST"]),
            Route("/v1/loras/{name:path}", self.remove, methods=["DELETE"]),
        ]

    async def list(self, request: Request) -> Response:
        return answer(LoraList(data=await described_loras(self.server)))

    async def load(self, request: Request) -> Response:
        """Read a file of the directory into memory, and offer it if it was removed."""
        self._check_admin(request)
        require_json(request.headers.get("content-type", ""))
        async with whole_body(request) as content:
            name = self._name(parse(content, LoraRequest).name)
        left = threading.Event()
        try:
            loras = self._loras()
            loading = on_thread(loras.reader, loras.load, name, left.is_set)
            lora = await until_disconnect(request, loading)
        finally:
            left.set()
        return answer(_described(self.server, name, lora))

    async def remove(self, request: Request) -> Response:
        """Offer it no more; jobs that have it keep it."""
        self._check_admin(request)
        name = self._name(request.path_params["name"])
        await self.server.look_for_loras()
        self._loras().remove(name)
        return answer(LoraRemoved(id=name))

    def _name(self, name: str) -> str:
        """The name of a LoRA, which may have the model's before it, as in a list."""
        model, _ = self.server.ready()
        return model.names.lora(name, ()) or name

    def _loras(self) -> Loras:
        model, _ = self.server.ready()
        if model.loras is None:
            raise LoraNotFoundError(f"{model.id} has no LoRAs: STEPWEAVE_LORAS sets them.")
        return model.loras

    def _check_admin(self, request: Request) -> None:
        """Raise NotFoundError without API keys, ForbiddenError for a key that is no
        administrator's."""
        if not self.server.keys.required:
            raise NotFoundError(
                "LoRAs are loaded and removed by an administrator's API key, and this server has "
                "no keys (STEPWEAVE_API_KEYS_FILE)."
            )
        client = context_of(request.scope).client
        if client is None or not client.admin:
            raise ForbiddenError(
                "LoRAs are loaded and removed by an administrator's API key; this one is not "
                "marked `admin`."
            )


async def described_loras(server: Server) -> list[LoraModel]:
    """The LoRAs of the model, as models of which it is the parent."""
    await server.look_for_loras()
    model, _ = server.ready()
    if model.loras is None:
        return []
    loaded = model.loras.loaded()
    return [_described(server, name, loaded.get(name)) for name in model.loras.names()]


def _described(server: Server, name: str, lora: Lora | None) -> LoraModel:
    """A LoRA, and what is known of it if it is in memory."""
    model, _ = server.ready()
    return LoraModel(
        id=f"{model.id}:{name}",
        created=server.created,
        root=name,
        parent=model.id,
        loaded=lora is not None,
        bytes=None if lora is None else lora.bytes,
        rank=None if lora is None else lora.ranks[1],
        components=None if lora is None else sorted(lora.components),
    )
