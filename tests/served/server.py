"""A server of a directory, in this process, and clients that ask it alone and together."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
from PIL import Image

from stepweave.api.app import Api
from stepweave.api.middleware.contract import ContractMiddleware
from stepweave.config import Settings
from stepweave.serving.server import Server
from tests.pipelines.check import denoisers
from tests.served.plain import Case
from tests.served.requests import Answer, ask
from tests.served.saving import IP_ADAPTER
from tests.support.environment import clean_environment
from tests.support.waiting import SECONDS, wait_until

# All requests of an entry are sent at once; the limits are low, since the start of a server tries
# them.
SETTINGS = {
    "STEPWEAVE_CPU_THREADS": "1",
    "STEPWEAVE_DEVICE": "cpu",
    "STEPWEAVE_MAX_IMAGES": "2",
    "STEPWEAVE_MAX_PROMPT_CHARACTERS": "100",
    "STEPWEAVE_MAX_QUEUE": "1000",
    "STEPWEAVE_MAX_ROWS": "12",
    "STEPWEAVE_MAX_STEPS": "16",
}
LEAST_PIXELS = 64 * 64  # of the setting STEPWEAVE_MAX_PIXELS


class NotServedError(Exception):
    """The server does not start."""


class Served:
    """A server that is ready."""

    def __init__(self, server: Server, preset: Collection[str]) -> None:
        assert server.engine is not None
        self.server, self.engine = server, server.engine
        self._preset = preset
        self._app = ContractMiddleware(Api(server).app(), server)

    def alone(self, cases: Sequence[Case]) -> list[Answer]:
        """The answers to requests, each sent once the one before is answered."""

        async def all_() -> list[Answer]:
            async with self._client() as client:
                return [await ask(client, case, self._preset) for case in cases]

        return asyncio.run(all_())

    def together(self, cases: Sequence[Case]) -> list[Answer]:
        """The answers to requests of which none starts before all have been accepted."""
        assert self.engine._loop is not None

        async def all_() -> list[Answer]:
            async with self._client() as client:
                with self.engine.in_lockstep():
                    with self.engine._loop._wake:  # type: ignore[union-attr]
                        asked = [
                            asyncio.ensure_future(ask(client, case, self._preset)) for case in cases
                        ]
                        async with asyncio.timeout(SECONDS):
                            await self._accepted(asked)
                    return await asyncio.gather(*asked)

        return asyncio.run(all_())

    def at_once(self, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The answers to requests in JSON that are sent at once; those with images are edits."""

        async def all_() -> list[Any]:
            async with self._client() as client:

                async def one(body: Mapping[str, Any]) -> Any:
                    images = any("image" in name for name in body)
                    path = "/v1/images/edits" if images else "/v1/images/generations"
                    return await client.post(path, json=body)

                return await asyncio.gather(*map(one, bodies))

        return asyncio.run(all_())

    async def _accepted(self, asked: Sequence[asyncio.Future[Answer]]) -> None:
        """Wait until every request is in flight, or has been refused."""
        while len(self.server.active) + sum(task.done() for task in asked) < len(asked):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self._app),
            base_url="http://localhost:3000",
            timeout=SECONDS,
        )

    def forwards(self) -> tuple[int, int]:
        """Calls of the denoisers so far, and how many of them shared a forward."""
        names = {*denoisers(self.engine.pipeline), f"ip_adapter.{IP_ADAPTER}"}
        found = [one for name, one in self.engine.stats().forwards.items() if name in names]
        return sum(one.calls for one in found), sum(one.merged_calls for one in found)


def pixels(answer: Any) -> np.ndarray:
    """The first image of an answer, which must have one."""
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@contextlib.contextmanager
def serving(folder: Path, preset: Collection[str], pixels: int, **further: str) -> Iterator[Served]:
    """Serve a directory as a user does, with its warm-up, for images of up to so many pixels, and
    with further settings. Raises NotServedError."""
    most = max(pixels, LEAST_PIXELS)
    changes = {"STEPWEAVE_MODEL": str(folder), "STEPWEAVE_MAX_PIXELS": str(most), **SETTINGS}
    changes |= further
    with patch.dict(os.environ, clean_environment(**changes), clear=True):
        settings = Settings.load()
    server = Server(settings)
    try:
        server.start()
        wait_until(lambda: server.status.stage in ("ready", "failed"))
        if server.status.stage == "failed":
            raise NotServedError(server.status.message)
        yield Served(server, preset)
    finally:
        server.close()
