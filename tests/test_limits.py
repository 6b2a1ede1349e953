"""What one client may cost: time on the event loop, threads, memory, and connections that it leaves lying."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import uvicorn
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image
from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import Message
from uvicorn.protocols.http import h11_impl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from stepweave.api import disconnect, schemas, tensors
from stepweave.api.disconnect import abort_stalled_connections, until_disconnect
from stepweave.api.events import _partial, events
from stepweave.api.schemas import ImageRequest
from stepweave.errors import BodyTooLarge
from stepweave.partials import Partial
from stepweave.store import DirectoryFileStore
from tests.asgi import GENERATIONS, serving

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
INFER = "/v2/models/shapes/infer"
EDITS = "/v1/images/edits"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- bodies ---


def members(count: int) -> dict[str, int]:
    return {f"x{i}": 1 for i in range(count)}


PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}
WIDE: dict[str, tuple[str, Any, str]] = {
    "fields": (GENERATIONS, {"prompt": "a", **members(60_000)}, "Unknown field 'x0'."),
    "nested": (GENERATIONS, {"prompt": {"a": members(60_000)}}, "prompt is "),
    "tensors": (INFER, {"inputs": [{}] * 100_000}, "inputs"),
    "members of a tensor": (INFER, {"inputs": [{**PROMPT, **members(60_000)}]}, "Unknown field 'x0'."),
    "shape": (INFER, {"inputs": [{**PROMPT, "shape": ["a"] * 100_000}]}, "Tensor 'prompt': inputs.0.shape.0 is 'a'"),
    "outputs": (INFER, {"inputs": [PROMPT], "outputs": [{}] * 100_000}, "outputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDE)
async def test_a_body_that_is_wrong_everywhere_is_told_of_one_problem(case: str) -> None:
    path, body, message = WIDE[case]
    async with serving() as app:
        built: list[int] = []

        def explain(error: ValidationError, real: Any = schemas.explain) -> Any:
            built.append(error.error_count())
            return real(error)

        with patch.object(schemas, "explain", explain), patch.object(tensors, "explain", explain):
            answer = await app.send("POST", path, json.dumps(body).encode(), JSON).done()
    assert answer.status == 400
    assert answer.error["message"].startswith(message)
    assert sum(built) <= 100, "errors that were made to tell of one"


async def test_a_long_body_is_not_read_on_the_event_loop() -> None:
    async with serving(max_body_bytes=2_000_000) as app:
        threads = set()

        def parse(*args: Any, real: Any = schemas.parse) -> Any:
            threads.add(threading.current_thread() is threading.main_thread())
            return real(*args)

        with patch.object(schemas, "parse", parse):
            long = app.post(prompt="a" * 100_000)
            assert (await long.done()).error["param"] == "prompt"
            assert threads == {False}
            assert (await app.post().done()).status == 200
            assert threads == {False, True}


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
async def test_a_number_beyond_any_float(datatype: str) -> None:
    scale = {"name": "guidance_scale", "datatype": datatype, "shape": [1], "data": [10**400]}
    async with serving() as app:
        body = json.dumps({"inputs": [PROMPT, scale]}).encode()
        answer = await app.send("POST", INFER, body, JSON).done()
        assert (answer.status, answer.error["param"]) == (400, "guidance_scale")
        assert answer.error["message"].endswith(f"is out of the range of {datatype}.")


@pytest.mark.parametrize("charset", ["undefined", "utf-16", "idna", "rot13", "no-such", '"\xff"'])
async def test_forms_of_other_charsets(charset: str) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    async with serving() as app:
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        answer = await app.send("POST", EDITS, form, {"Content-Type": kind}).done()
        assert (answer.status, answer.error["code"]) == (400, "invalid_form")
        assert "charset" in answer.error["message"]
        for charset in ("utf-8", "UTF-8", '"us-ascii"'):
            kind = f"multipart/form-data; boundary=x; charset={charset}"
            answer = await app.send("POST", EDITS, form, {"Content-Type": kind}).done()
            assert answer.error["code"] == "missing_field"


# --- the store ---


async def test_whether_a_file_is_there_is_told_without_reading_it(tmp_path: Path) -> None:
    now = 1000.0
    store = DirectoryFileStore(tmp_path, 60, 10_000, clock=lambda: now)
    name = await store.put(b"x", "png")
    (tmp_path / name).unlink()
    assert store.has(name)
    assert not store.has("../" + name)
    now += 60
    assert not store.has(name)
    now -= 60
    await store.delete([name])
    assert not store.has(name)
    await store.close()


# --- clients that stall ---

STALLED = 0.3  # seconds


@pytest.fixture
def impatient() -> Iterator[None]:
    with patch.object(disconnect, "STALLED_SECONDS", STALLED), patch.object(h11_impl, "FlowControl"):
        abort_stalled_connections()
        yield


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["answer", "stream"])
@pytest.mark.usefixtures("impatient")
async def test_a_client_that_reads_nothing_is_not_waited_for_and_one_that_reads_slowly_is(fields: Any) -> None:
    async with serving() as app:
        loop, state = asyncio.get_running_loop(), ServerState()
        config = uvicorn.Config(app.asgi, log_config=None, access_log=False)
        config.load()
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            listening.bind(("127.0.0.1", 0))
            server = await loop.create_server(lambda: H11Protocol(config, state, {}), sock=listening)
            body = json.dumps({"prompt": "a", "size": "512x512", "num_inference_steps": 1, "seed": 1} | fields).encode()
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

            async def ask(pause: float | None) -> bytes:
                """All that comes, read with pauses, or none of it before the server has ended the connection."""
                with socket.socket() as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    client.setblocking(False)
                    await loop.sock_connect(client, listening.getsockname())
                    await loop.sock_sendall(client, request)
                    if pause is None:
                        await app.until(lambda: state.connections)
                        await app.until(lambda: not state.connections)
                    received = b""
                    while not received.endswith((b"}]}", b"0\r\n\r\n")):
                        try:
                            piece = await loop.sock_recv(client, 300_000)
                        except ConnectionResetError:
                            break
                        if not piece:
                            break
                        received += piece
                        await asyncio.sleep(pause or 0)
                    return received

            whole = await ask(0.0)
            assert len(whole) > 1_000_000
            with patch.object(disconnect, "STALLED_BYTES", 1000):
                slow = await ask(2 * STALLED / 100) if not fields else whole
            assert len(slow) > 1_000_000
            assert len(await ask(None)) < 500_000
            await app.until(lambda: not state.tasks)
            server.close()
            for connection in list(state.connections):
                connection.transport.abort()
            await app.until(lambda: not state.connections)


async def test_the_job_of_a_client_that_reads_nothing_ends() -> None:
    with patch.object(disconnect, "STALLED_SECONDS", STALLED):
        async with serving() as app:
            app.record.gated = True
            stream = app.post(stream=True, events="all", num_inference_steps=100)
            await app.until(lambda: app.record.running)
            stream.reads.clear()
            app.record.pause, app.record.gated = 0.01, False
            app.record.release.set()
            await stream.done()
            assert stream.messages[-1].get("more_body", True), "it is not told that it has all"
            await app.until(lambda: not app.server.tickets)
            assert app.outcomes() == {"cancelled": 1}
            assert app.record.steps_run < 100


@pytest.mark.parametrize("path", [GENERATIONS, EDITS, "/generate", "/edit", INFER])
async def test_a_client_that_sends_no_more_of_its_body_is_not_waited_for(path: str) -> None:
    form = path in (EDITS, "/edit")
    with patch.object(disconnect, "STALLED_SECONDS", STALLED):
        async with serving() as app:
            kind = "multipart/form-data; boundary=x" if form else "application/json"
            answer = await app.send("POST", path, None, {"Content-Type": kind, "Content-Length": "100"}).done()
            assert (answer.status, answer.error["code"]) == (499, "cancelled")


async def test_a_client_may_wait_longer_for_its_picture() -> None:
    with patch.object(disconnect, "STALLED_SECONDS", 0.1):
        async with serving() as app:
            app.record.pause = 0.1
            assert (await app.post().done()).status == 200


# --- streams ---


async def test_the_body_of_a_get_does_not_break_a_stream() -> None:
    async with serving(max_body_bytes=1024) as app:
        app.record.gated = True
        job = (await app.post(headers={"Prefer": "respond-async"}).done()).json()["id"]
        events = f"/v1/jobs/{job}/events"
        refused = await app.send("GET", events, b"x" * 2000, {"Content-Length": "2000"}).done()
        assert (refused.status, refused.error["code"]) == (413, "body_too_large")
        followed = app.send("GET", events, b"x" * 1000, {"Content-Length": "1000"})
        await followed.until(lambda it: it.messages)
        app.record.release.set()
        assert (await followed.done()).names[-1] == "image_generation.completed"


async def test_what_a_client_sends_while_it_waits_is_told_of() -> None:
    async def receive() -> Message:
        raise BodyTooLarge(1)

    async def work() -> None:
        await asyncio.sleep(10)

    with pytest.raises(BodyTooLarge):
        await until_disconnect(Request({"type": "http"}, receive), work())


async def test_the_head_of_a_stream_is_answered_at_once() -> None:
    async with serving() as app:
        app.record.gated = True
        job = (await app.post(headers={"Prefer": "respond-async"}).done()).json()["id"]
        head = await app.send("HEAD", f"/v1/jobs/{job}/events").done()
        assert (head.status, head.headers["content-type"], head.content) == (
            200,
            "text/event-stream; charset=utf-8",
            b"",
        )
        assert (await app.job(job))["state"] == "running", "a look at it ends nothing"


async def test_events_have_what_openais_have() -> None:
    kinds: dict[str, Any] = {
        "image_generation.partial_image": ImageGenPartialImageEvent,
        "image_generation.completed": ImageGenCompletedEvent,
    }
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "WEBP")
    async with serving() as app:
        body = ImageRequest(prompt="a", output_format="webp", num_inference_steps=1)
        ticket = await app.server.accept(body)
        told = [_partial("image_generation", Partial(0, 0, picture.getvalue()), ticket)]
        assert app.server.jobs is not None
        told += [one async for one in events(ticket, "x", app.server.jobs.files, verbose=False)]
        for text in told:
            name, data = (line.partition(b": ")[2] for line in text.split(b"\n")[:2])
            values = json.loads(data)
            fields = set(kinds.pop(name.decode()).model_fields) - {"safety_identifier"}
            assert fields <= set(values)
            assert (values["size"], values["output_format"]) == ("64x64", "webp")
            assert (values["quality"], values["background"]) == ("auto", "auto")
    assert not kinds
