"""Bodies of requests: those that are not being read take no memory to speak of."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from stepweave.api.bodies import SPOOLED, TURNS
from stepweave.errors import InvalidRequestError
from stepweave.images.decoders import Decoders
from tests.support.asgi import serving
from tests.support.fake_pipeline import FakePipeline
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.anyio
MEGABYTE = 1024 * 1024
MANY = 40


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def long_body(size: int) -> bytes:
    """A request whose prompt is far too long."""
    return json.dumps({"prompt": "a" * size}).encode()


@pytest.mark.parametrize(
    "path",
    ["/v1/images/generations", "/generate", "/api/diffusers/inference", "/v2/models/shapes/infer"],
)
@pytest.mark.usefixtures("traced")
async def test_long_bodies_wait_on_disk(path: str) -> None:
    body = long_body(MEGABYTE - 100)
    async with serving() as app:
        path = path.replace("shapes", app.server.model.id) if app.server.model else path
        for _ in range(TURNS):
            await app.asgi.body_turns.acquire()
        before = tracemalloc.get_traced_memory()[0]
        waiting = [
            app.send("POST", path, body, {"Content-Type": "application/json"}) for _ in range(MANY)
        ]
        await app.until(lambda: sum(one.has_sent for one in waiting) == MANY)
        short = await app.post(path).done() if path == "/v1/images/generations" else None
        await asyncio.sleep(0.2)
        assert not any(one.task.done() for one in waiting)
        assert short is None or short.status == 200, "a short one waits for no turn"
        assert tracemalloc.get_traced_memory()[0] - before < MANY * MEGABYTE / 8
        for _ in range(TURNS):
            app.asgi.body_turns.release()
        for one in waiting:
            # BentoML is not there
            assert (await one.done()).status == (404 if path == "/generate" else 400)
        assert not app.asgi.body_turns.locked()


@pytest.mark.usefixtures("traced")
async def test_uploads_that_wait_to_be_decoded_are_on_disk() -> None:
    let_go, decoding = threading.Event(), threading.Semaphore(0)

    def run(self: Decoders, task: object) -> None:
        decoding.release()
        assert let_go.wait(SECONDS)
        raise InvalidRequestError("It was let go.")

    head = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x\r\n'
    file = b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + bytes(
        2 * MEGABYTE
    )
    form, kind = head + file + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}
    with patch.object(Decoders, "_run", run):
        async with serving(FakePipeline(edits=True)) as app:
            before = tracemalloc.get_traced_memory()[0]
            waiting = [app.send("POST", "/v1/images/edits", form, kind) for _ in range(MANY)]
            await app.until(lambda: app.server.decoders.waiting == MANY)
            assert decoding.acquire(timeout=SECONDS)
            assert tracemalloc.get_traced_memory()[0] - before < MANY * MEGABYTE / 8
            let_go.set()
            for one in waiting:
                assert (await one.done()).status == 400
            assert app.metric("stepweave_requests_in_flight") == 0


async def test_a_turn_is_given_back_whatever_comes_of_it() -> None:
    async with serving() as app:
        for body in (long_body(2 * SPOOLED), b"[" * (2 * SPOOLED), b"\xff" * (2 * SPOOLED)):
            for _ in range(TURNS + 1):
                answer = await app.send(
                    "POST", "/v1/images/generations", body, {"Content-Type": "application/json"}
                ).done()
                assert answer.status == 400
        for _ in range(TURNS):
            await app.asgi.body_turns.acquire()
        gone = app.send(
            "POST",
            "/v1/images/generations",
            long_body(2 * SPOOLED),
            {"Content-Type": "application/json"},
        )
        await app.until(lambda: gone.has_sent)
        gone.task.cancel()
        await asyncio.wait({gone.task})
        app.exchanges.remove(gone)
        for _ in range(TURNS):
            app.asgi.body_turns.release()
        assert (await app.post().done()).status == 200
        assert not app.asgi.body_turns.locked()
