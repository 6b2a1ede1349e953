"""How commands reach a server: over HTTP, or one that they start in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import httpx

from stepweave.cli.failures import Failed, Usage
from stepweave.config import Settings
from stepweave.errors import shown
from stepweave.threads import on_thread

POLL_SECONDS = 0.2
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0
LOCAL = "http://in-process"


@contextlib.asynccontextmanager
async def over_http(url: str, key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server's URL, with an API key."""
    if not url.startswith(("http://", "https://")):
        raise Usage(f"--url={shown(url)}: it must begin with http:// or https://")
    url = url.rstrip("/").removesuffix("/v1")  # which OpenAI's clients want
    if key is not None and not key.isascii():
        raise Usage("--api-key has characters that a header cannot have")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL, OSError, OverflowError, UnicodeError) as error:
        raise Failed(lost(error, url)) from None


def lost(error: Exception, url: object) -> str:
    """Why a request had no answer."""
    if isinstance(error, httpx.ConnectError):
        return f"{url} cannot be reached: {error}"
    return f"{url}: {type(error).__name__}: {error}"


@contextlib.asynccontextmanager
async def in_process(
    settings: Settings, on_stage: Callable[[float, str], None]
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server in this process, once it is ready; `on_stage` is called with the
    progress from 0 to 1 and what is done."""
    from stepweave.api.app import Api
    from stepweave.api.middleware.contract import ContractMiddleware
    from stepweave.serving.server import Server

    logging.getLogger("stepweave").addHandler(logging.NullHandler())  # the command says it itself
    server = Server(settings)
    server.start()
    try:
        while (status := server.status).stage != "ready":
            if status.stage == "failed":
                raise Failed(status.message)
            on_stage(status.progress, f"{status.stage}: {status.message}")
            await asyncio.sleep(POLL_SECONDS)
        on_stage(1.0, status.message)
        transport = httpx.ASGITransport(ContractMiddleware(Api(server).app(), server))
        async with httpx.AsyncClient(base_url=LOCAL, transport=transport, timeout=None) as client:
            yield client
    finally:
        server.leaving.terminate()
        await on_thread(None, server.close)


def told(response: httpx.Response) -> str:
    """The message of a refusal."""
    try:
        message: str = response.json()["error"]["message"]
        return message
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
