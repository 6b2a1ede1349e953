"""Sends a run's requests to a contestant in the form that it takes, and keeps its images."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.ladder.contestants import Contestant
from benchmarks.serving.client import Attempt, Outcome, offer
from benchmarks.serving.mix import Request

REFUSED = (429, 503)
CHECK_SECONDS = 0.5


@dataclass
class Sender:
    """Posts bodies, and keeps the images of those named in `wanted`."""

    contestant: Contestant
    wanted: frozenset[bytes] = frozenset()
    images: dict[bytes, bytes] = field(default_factory=dict)

    async def __call__(self, client: httpx.AsyncClient, body: bytes, start: float) -> Attempt:
        began = time.perf_counter()
        content = json.dumps(self.contestant.form(json.loads(body))).encode()
        image, code, refused = b"", "", False
        try:
            response = await client.post(self.contestant.path, content=content)
            if response.status_code == 200:
                image = await read(client, response)
            else:
                refused = response.status_code in REFUSED
                code = f"HTTP {response.status_code}: {response.text[:200]}"
        except httpx.HTTPError as error:
            code = type(error).__name__
        except (ValueError, LookupError, TypeError) as error:
            code = f"HTTP 200 without an image: {error!r}"
        seconds = time.perf_counter() - began
        if image and body in self.wanted:
            self.images[body] = image
        status = "answered" if image else "refused" if refused else "failed"
        return Attempt(status, began - start, seconds, code)  # type: ignore[arg-type]


async def read(client: httpx.AsyncClient, response: httpx.Response) -> bytes:
    """The image file of an answer: the answer itself, or in base64 or at a URL within it.

    Raises ValueError, LookupError or TypeError for an answer of another form, and httpx.HTTPError
    if the URL has no image.
    """
    if response.headers.get("Content-Type", "").startswith("image/"):
        return response.content
    answer: Any = response.json()
    if isinstance(answer, list):  # BentoML's batches
        return base64.b64decode(answer[0], validate=True)
    if "response" in answer:  # diffusers' examples/server-async
        url = answer["response"][0]
    elif "b64_json" in answer["data"][0]:
        return base64.b64decode(answer["data"][0]["b64_json"], validate=True)
    else:
        url = answer["data"][0]["url"]
    return (await client.get(url)).raise_for_status().content


async def closed_loop(
    client: httpx.AsyncClient,
    requests: Sequence[Request],
    check: Callable[[], None],
    send: Sender,
    *,
    clients: int,
    limit: float,
) -> list[Outcome]:
    """Send the requests from `clients` that each wait for an answer; those without an answer after
    `limit` seconds are unfinished. Latency counts from sending."""
    outcomes: list[Outcome] = []
    left = iter(requests)
    start = time.perf_counter()

    async def work() -> None:
        for request in left:
            sent = dataclasses.replace(request, offset=time.perf_counter() - start)
            outcome = Outcome(sent)
            outcomes.append(outcome)
            outcome.attempts.append(await send(client, request.body, start))

    pending = {asyncio.create_task(work()) for _ in range(clients)}
    try:
        while pending and time.perf_counter() < start + limit:
            done, pending = await asyncio.wait(pending, timeout=CHECK_SECONDS)
            for task in done:
                task.result()
            check()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return outcomes + [Outcome(request) for request in left]


async def open_loop(
    client: httpx.AsyncClient,
    requests: Sequence[Request],
    check: Callable[[], None],
    send: Sender,
    *,
    drain: float,
) -> list[Outcome]:
    """Send each request when it is due; those without an answer `drain` seconds after the last
    arrival are unfinished. Latency counts from the intended arrival."""
    return await offer(client, requests, check, drain=drain, post=send)
