"""What one client may cost: time on the event loop, threads, memory, and connections that it leaves
lying."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
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
from uvicorn.server import ServerState

from stepweave.api import disconnect, schemas
from stepweave.api.app import Api
from stepweave.api.connections import Connection, Connections
from stepweave.api.disconnect import until_disconnect
from stepweave.api.events import _partial, events
from stepweave.api.middleware.contract import ContractMiddleware
from stepweave.api.open_inference import tensors
from stepweave.api.routes import bentoml as native
from stepweave.errors import BodyTooLargeError
from stepweave.images import decoders
from stepweave.parameters import ImageRequest
from stepweave.previews.stream import Partial
from stepweave.serving import admission as admissions
from stepweave.serving.admission import Admission
from stepweave.serving.submission import Submission
from stepweave.store import DirectoryFileStore
from tests.support.asgi import GENERATIONS, App, serving
from tests.support.bodies import EDITS, FORM, INFER, JSON, LEGACY, Native, form, natively, png
from tests.support.fake_pipeline import FakePipeline
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- bodies ---


def members(count: int) -> dict[str, int]:
    return {f"x{i}": 1 for i in range(count)}


PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}
# of fewer parts than are refused before they are read
WIDE: dict[str, tuple[str, Any, str]] = {
    "fields": (GENERATIONS, {"prompt": "a", **members(9_000)}, "Unknown field 'x0'."),
    "nested": (GENERATIONS, {"prompt": {"a": members(9_000)}}, "prompt is "),
    "tensors": (INFER, {"inputs": [{}] * 6_000}, "inputs"),
    "members of a tensor": (
        INFER,
        {"inputs": [{**PROMPT, **members(9_000)}]},
        "Unknown field 'x0'.",
    ),
    "shape": (
        INFER,
        {"inputs": [{**PROMPT, "shape": ["a"] * 6_000}]},
        "Tensor 'prompt': inputs.0.shape.0 is 'a'",
    ),
    "outputs": (INFER, {"inputs": [PROMPT], "outputs": [{}] * 6_000}, "outputs"),
}


@pytest.mark.parametrize("case", WIDE)
async def test_a_body_that_is_wrong_everywhere_is_told_of_one_problem(case: str) -> None:
    path, body, message = WIDE[case]
    async with serving() as app:
        built: list[int] = []

        def explain(error: ValidationError, *args: Any, real: Any = schemas.explain) -> Any:
            built.append(error.error_count())
            return real(error, *args)

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
        assert answer.status == 400
        assert answer.error["message"].startswith("Tensor 'guidance_scale': ")
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
PATIENT = 2.0  # seconds in which a client that reads slowly gets to read on a busy machine, too


@pytest.fixture
def impatient() -> Iterator[None]:
    with patch.object(disconnect, "STALLED_SECONDS", PATIENT):
        yield


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="answer", marks=pytest.mark.full),
        pytest.param({"stream": True}, id="stream"),
    ],
)
@pytest.mark.usefixtures("impatient")
async def test_a_client_that_reads_nothing_is_not_waited_for_and_one_that_reads_slowly_is(
    fields: Any,
) -> None:
    async with serving() as app:
        loop, state = asyncio.get_running_loop(), ServerState()
        config = uvicorn.Config(app.asgi, log_config=None, access_log=False)
        config.load()
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            listening.bind(("127.0.0.1", 0))
            held = Connections(10)
            server = await loop.create_server(
                lambda: Connection(held, config, state, {}), sock=listening
            )
            body = json.dumps(
                {"prompt": "a", "size": "512x512", "num_inference_steps": 1, "seed": 1} | fields
            ).encode()
            head = (
                f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\n"
                "Content-Type: application/json\r\n"
            )
            request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

            async def ask(pause: float | None) -> bytes:
                """All that comes, read with pauses, or none of it before the server has ended the
                connection."""
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
                slow = await ask(1.5 * PATIENT / 100) if not fields else whole
            assert len(slow) > 1_000_000
            with patch.object(disconnect, "STALLED_SECONDS", STALLED):
                assert len(await ask(None)) < 500_000
            await app.until(lambda: not state.tasks)
            server.close()
            for connection in list(state.connections):
                connection.transport.abort()
            await app.until(lambda: not state.connections)


@pytest.mark.parametrize("reads_head", [True, False])
async def test_the_job_of_a_client_that_reads_nothing_ends(
    caplog: pytest.LogCaptureFixture, reads_head: bool
) -> None:
    with patch.object(disconnect, "STALLED_SECONDS", STALLED):
        async with serving() as app:
            app.record.gated = True
            stream = app.post(stream=True, events="all", num_inference_steps=100)
            if reads_head:
                await stream.until(lambda one: one.messages)
            stream.reads.clear()
            await app.until(lambda: app.record.running)
            app.record.allow(5)
            await app.told_to_end()
            app.record.release.set()
            await stream.done()
            assert bool(stream.messages) == reads_head
            last = stream.messages[-1:]
            assert all(one.get("more_body", True) for one in last), "it is not told that it has all"
            await app.until(lambda: not app.server.active)
            assert app.outcomes() == {"cancelled": 1}
            assert app.record.steps_run <= 6
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


@pytest.mark.parametrize("path", [GENERATIONS, EDITS, "/generate", "/edit", INFER])
async def test_a_client_that_sends_no_more_of_its_body_is_not_waited_for(path: str) -> None:
    is_form = path in (EDITS, "/edit")
    with patch.object(disconnect, "STALLED_SECONDS", STALLED):
        async with serving() as app:
            kind = "multipart/form-data; boundary=x" if is_form else "application/json"
            answer = await app.send(
                "POST", path, None, {"Content-Type": kind, "Content-Length": "100"}
            ).done()
            assert (answer.status, answer.error["code"]) == (499, "cancelled")


async def test_a_client_may_wait_longer_for_its_image() -> None:
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
        raise BodyTooLargeError(1)

    async def work() -> None:
        await asyncio.sleep(2 * SECONDS)

    with pytest.raises(BodyTooLargeError):
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
        assert await app.until_state(job, "running", "succeeded", "cancelled", "failed")
        assert (await app.job(job))["state"] == "running", "a look at it ends nothing"


async def test_events_have_what_openais_have() -> None:
    kinds: dict[str, Any] = {
        "image_generation.partial_image": ImageGenPartialImageEvent,
        "image_generation.completed": ImageGenCompletedEvent,
    }
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "WEBP")
    async with serving() as app:
        body = ImageRequest(prompt="a", output_format="webp", num_inference_steps=1)
        ticket = await app.server.accept(Submission(request=body))
        told = [_partial("image_generation", Partial(0, 0, image.getvalue()), ticket)]
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


# --- edits ---


async def test_an_edit_without_a_place_is_refused_before_it_is_read() -> None:
    async with serving(FakePipeline(edits=True), max_queue=0) as app:
        app.record.gated = True
        first = app.send("POST", EDITS, form(png()), {**FORM, "Idempotency-Key": "a"})
        await app.until(lambda: app.record.running)
        for path in (EDITS, "/edit"):
            refused = await app.send(
                "POST", path, None, {**FORM, "Content-Length": "9999999"}
            ).done()
            assert (refused.status, refused.error["code"]) == (429, "queue_full")
        same = app.send("POST", EDITS, form(png()), {**FORM, "Idempotency-Key": "a"})
        other = await app.send(
            "POST", EDITS, form(png(32)), {**FORM, "Idempotency-Key": "a"}
        ).done()
        assert other.status == 409, "who has a key is compared, which takes no place"
        app.record.release.set()
        assert (await first.done()).json()["data"] == (await same.done()).json()["data"]


async def test_few_images_are_decoded_at_a_time_and_none_for_which_there_is_no_place() -> None:
    running, most, decoded = 0, 0, 0
    go, lock = threading.Semaphore(0), threading.Lock()

    def decode(*args: Any, real: Any = decoders._Process.decode) -> Any:
        nonlocal running, most, decoded
        with lock:
            running, decoded = running + 1, decoded + 1
            most = max(most, running)
        assert go.acquire(timeout=SECONDS)
        with lock:
            running -= 1
        return real(*args)

    async with serving(FakePipeline(edits=True), max_queue=3) as app:
        app.record.gated = True
        with patch.object(decoders._Process, "decode", decode):
            sent = [app.send("POST", EDITS, form(png()), FORM) for _ in range(8)]
            await app.until(lambda: decoded == 2)
            # refused before they are read
            await app.until(lambda: sum(one.task.done() for one in sent) == 4)
            await asyncio.sleep(0.05)
            assert (decoded, most) == (2, 2)
            # threads are left for others
            await asyncio.wait_for(asyncio.to_thread(lambda: None), SECONDS)
            go.release(4)
            await app.until(lambda: len(app.server.active) == 4)
        app.record.release.set()
        statuses = sorted([(await one.done()).status for one in sent])
        assert statuses == [*[200] * 4, *[429] * 4]
        assert (decoded, most) == (4, 2)


BOTH = (EDITS, "/edit")


@pytest.mark.parametrize("path", BOTH)
async def test_of_two_edits_for_the_last_place_one_is_read(path: str) -> None:
    async with serving(FakePipeline(edits=True), max_queue=0) as app:
        if path == "/edit":
            natively(app)
        first = app.send("POST", path, None, {**FORM, "Content-Length": "9999999"})
        await app.until(lambda: admission_of(app).in_flight == 1)
        second = await app.send("POST", path, None, {**FORM, "Content-Length": "9999999"}).done()
        assert (second.status, second.error["code"]) == (429, "queue_full")
        assert not first.messages
        await first.leave()
        assert admission_of(app).in_flight == 0


@pytest.mark.parametrize("path", BOTH)
async def test_an_edit_that_has_its_place_before_work_is_refused_is_done(path: str) -> None:
    async with serving(FakePipeline(edits=True), drain_notice=0.2) as app:
        if path == "/edit":
            natively(app)
        early = app.send("POST", path, None, FORM)
        await app.until(lambda: admission_of(app).in_flight == 1)
        await app.drain()
        await app.until(lambda: app.server.leaving.refusing)
        late = await app.send("POST", path, form(png()), FORM).done()
        assert (late.status, late.error["code"]) == (503, "draining")
        early.send_body(form(png()))
        assert (await early.done()).status == 200


async def test_once_what_is_left_is_ended_such_an_edit_is_refused() -> None:
    async with serving(FakePipeline(edits=True), drain_notice=0, grace=0.2) as app:
        early = app.send("POST", EDITS, None, FORM)
        await app.until(lambda: admission_of(app).in_flight == 1)
        await app.drain()
        await app.until(lambda: app.server.leaving.ended)
        early.send_body(form(png()))
        assert (await early.done()).status == 503


@pytest.mark.parametrize("path", BOTH)
async def test_few_edits_are_read_without_a_place_since_they_may_join(path: str) -> None:
    key = {"Idempotency-Key": "k"}
    async with serving(FakePipeline(edits=True), max_queue=0) as app:
        if path == "/edit":
            natively(app)
        first = await app.send("POST", path, form(png()), FORM | key).done()
        assert first.status == 200
        await app.until(lambda: not admission_of(app).in_flight)
        with patch.object(admissions, "JOINING", 2):
            joining = [app.send("POST", path, None, FORM | key) for _ in range(2)]
            await app.until(lambda: len(admission_of(app)._joining) == 2)
            assert admission_of(app).in_flight == 0
            third = app.send("POST", path, None, FORM | key)
            await app.until(lambda: admission_of(app).in_flight == 1)
            fourth = await app.send("POST", path, None, FORM | key).done()
            assert (fourth.status, fourth.error["code"]) == (429, "queue_full")
            for one in (*joining, third):
                one.send_body(form(png()))
                assert (await one.done()).status == 200
                assert one.content == first.content
            assert not admission_of(app)._joining
        assert len(app.record.calls) == 1


async def test_the_fields_of_a_form_are_bounded_together() -> None:
    async with serving(FakePipeline(edits=True)) as app:
        texts = {f"field_{i}": "x" * 60_000 for i in range(3)}
        answer = await app.send("POST", EDITS, form(png(), **texts), FORM).done()
        assert (answer.status, answer.error["code"]) == (400, "invalid_form")
        assert "128KB in all" in answer.error["message"]


def admission_of(app: App) -> Admission:
    assert app.server._admission is not None
    return app.server._admission


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (form(b"no image"), 400),
        (form(png(), size="no size"), 400),
        (form(png(), num_inference_steps=10**6), 400),
        (b"no form", 400),
        (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n', 400),
    ],
)
async def test_the_place_of_an_edit_that_is_wrong_comes_back(
    path: str, body: bytes, status: int
) -> None:
    async with serving(FakePipeline(edits=True), max_queue=0) as app:
        if path == "/edit":
            natively(app)
        for _ in range(3):
            assert (await app.send("POST", path, body, FORM).done()).status == status
            assert admission_of(app).in_flight == 0
        assert (await app.send("POST", path, form(png()), FORM).done()).status == 200


@pytest.mark.parametrize("path", BOTH)
async def test_the_place_of_an_edit_comes_back_where_it_never_gets_to_its_handler(
    path: str,
) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async with serving(FakePipeline(edits=True), max_queue=0) as app:
        app.asgi = ContractMiddleware(fails, app.server)  # type: ignore[assignment]
        for _ in range(3):
            assert (await app.send("POST", path, form(png()), FORM).done()).status == 500
            assert admission_of(app).in_flight == 0


@pytest.mark.parametrize("path", BOTH)
async def test_a_client_that_leaves_ends_the_decoding_of_its_edit(path: str) -> None:
    async with serving(FakePipeline(edits=True), max_queue=0) as app:
        if path == "/edit":
            natively(app)
        assert (await app.send("POST", path, form(png()), FORM).done()).status == 200
        (process,) = app.server.decoders._all
        os.kill(process._process.pid, signal.SIGSTOP)
        sent = app.send("POST", path, form(png()), FORM)
        await app.until(lambda: not app.server.decoders._idle)
        await sent.leave()
        assert admission_of(app).in_flight == 0
        await app.until(lambda: not process.alive)
        assert (await app.send("POST", path, form(png()), FORM).done()).status == 200


async def test_edits_of_one_new_key_hold_one_place_between_them() -> None:
    async with serving(FakePipeline(edits=True), max_queue=2) as app:
        app.record.gated = True
        headers = {**FORM, "Idempotency-Key": "a"}
        sent = [app.send("POST", EDITS, form(png()), headers) for _ in range(3)]
        await app.until(lambda: len(app.server.active) == 1 and admission_of(app).in_flight == 1)
        app.record.release.set()
        assert len({str((await one.done()).json()["data"]) for one in sent}) == 1


async def test_an_edit_that_was_refused_unread_is_promised_a_place() -> None:
    async with serving(FakePipeline(edits=True), max_queue=1) as app:
        app.record.gated = True
        sent = [app.send("POST", EDITS, form(png(), seed=seed), FORM) for seed in range(2)]
        await app.until(lambda: len(app.server.active) == 2)
        mine = {**FORM, "Content-Length": str(len(form(png())))}
        refused = await app.send("POST", EDITS, form(png()), mine, "1.2.3.4").done()
        assert refused.status == 429
        admission = admission_of(app)
        now = admission._clock() + int(refused.headers["Retry-After"])
        with patch.object(admission, "_clock", lambda: now):
            admission._taken -= 1  # one has left
            for client in ("5.6.7.8", "1.2.3.40"):
                assert (
                    await app.send("POST", EDITS, form(png()), mine, client).done()
                ).status == 429
            edit = app.send("POST", EDITS, form(png()), mine, "1.2.3.4")
            await app.until(lambda: len(app.server.active) == 3)
        admission._taken += 1
        app.record.release.set()
        assert [(await one.done()).status for one in [*sent, edit]] == [200] * 3


async def test_equal_requests_of_two_addresses_do_not_share_a_promise() -> None:
    async with serving(max_queue=1) as app:
        app.record.gated = True
        sent = [app.post() for _ in range(2)]
        await app.until(lambda: len(app.server.active) == 2)
        for path, body in KEYED.items():
            if body[2] == JSON:
                for client in ("1.1.1.1", "2.2.2.2"):
                    app.asgi = ContractMiddleware(
                        Native(app.server) if path in native.PATHS else Api(app.server).app(),
                        app.server,
                    )  # type: ignore[assignment]
                    assert (
                        await app.send("POST", path, body[0], JSON, client).done()
                    ).status == 429
        clients = {one.client for one in admission_of(app)._promises.made}
        assert clients == {("address", "1.1.1.1"), ("address", "2.2.2.2")}
        app.record.release.set()
        assert [(await one.done()).status for one in sent] == [200] * 2


# --- idempotency keys ---

KEYED: dict[str, tuple[bytes, bytes, dict[str, str]]] = {
    "/generate": (b'{"prompt": "a"}', b'{"prompt": "b"}', JSON),
    "/generate_stream": (b'{"prompt": "a"}', b'{"prompt": "b"}', JSON),
    "/edit": (form(png()), form(png(32)), FORM),
    LEGACY: (b'{"prompt": "a"}', b'{"prompt": "b"}', JSON),
    INFER: (
        json.dumps({"inputs": [{**PROMPT, "shape": [2], "data": ["a", "b"]}]}).encode(),
        json.dumps({"inputs": [PROMPT]}).encode(),
        JSON,
    ),
}


@pytest.mark.parametrize("path", KEYED)
async def test_a_key_is_heard_on_every_post(path: str) -> None:
    body, other, headers = KEYED[path]
    key = {**headers, "Idempotency-Key": "a"}
    async with serving(FakePipeline(edits=True)) as app:
        asgi = app.asgi
        if path in native.PATHS:
            asgi = app.asgi = ContractMiddleware(Native(app.server), app.server)  # type: ignore[assignment]
        app.record.gated = True
        sent = [app.send("POST", path, body, key) for _ in range(2)]
        await app.until(lambda: app.record.running)
        assert (await app.send("POST", path, other, key).done()).status == 409
        app.record.release.set()
        sent.append(await sent[0].done())
        await app.until(lambda: not app.server.jobs or not app.server.jobs.keeping())
        sent.append(app.send("POST", path, body, key))
        contents = {(await one.done()).status: one.content for one in sent}
        assert list(contents) == [200]
        if path != "/generate_stream":
            assert len({one.content for one in sent}) == 1
        assert len(app.record.calls) == (2 if path == INFER else 1)
        assert app.outcomes()["invalid"] == 1
        for bad in ("", "x" * 300):
            refused = await app.send("POST", path, body, {**headers, "Idempotency-Key": bad}).done()
            assert refused.status == 400
            assert "Idempotency-Key" in refused.error["message"]
        app.asgi = asgi


async def test_who_joins_by_key_gets_previews_too() -> None:
    wanted = []
    async with serving() as app:

        async def accept(submission: Submission, real: Any = app.server.accept) -> Any:
            wanted.append(submission.previews)
            return await real(submission)

        with patch.object(app.server, "accept", accept):
            for headers in ({}, {"Idempotency-Key": "a"}):
                assert (await app.post(headers=headers, partial_images=2).done()).status == 200
    assert wanted == [0, 2]


# --- pages of other origins ---

OWN = {"Host": "images.test:3000"}
SITE = "Sec-Fetch-Site"


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({SITE: "same-origin"}, True),
        ({SITE: "none"}, True),
        ({SITE: "same-origin", "Origin": "https://behind.a.proxy"}, True),
        ({SITE: "cross-site"}, False),
        ({SITE: "cross-site", "Origin": "null"}, False),
        ({SITE: "cross-site", "Origin": "http://images.test:3000"}, False),
        ({SITE: "same-site"}, False),
        ({SITE: "same-site", "Origin": "http://images.test:8000"}, False),
        ({"Origin": "http://images.test:3000"}, True),
        ({"Origin": "http://IMAGES.test:3000"}, True),
        ({"Origin": "http://images.test"}, False),
        ({"Origin": "https://a.test"}, False),
        ({"Origin": "https://images.test:3000.a.test"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
        ({"Origin": "http://["}, False),
        ({"Origin": "http://a:b"}, False),
        ({SITE: "cross-site", "Origin": "https://allowed.test"}, True),
        ({"Origin": "https://base.test"}, True),
        ({"Origin": "https://base.test:443"}, True),
        ({"Origin": "https://base.test:444"}, False),
    ],
)  # fmt: skip
async def test_what_pages_may_send(headers: dict[str, str], allowed: bool) -> None:
    settings = {
        "cors_origins": "https://allowed.test",
        "base_url": "https://base.test/x",
        "trusted_hosts": "images.test",
    }
    async with serving(**settings) as app:
        body = json.dumps({"inputs": [PROMPT]}).encode()
        answers = [
            await app.send("POST", INFER, body, {**OWN, **headers}).done(),
            await app.send("POST", EDITS, form(png()), {**OWN, **FORM, **headers}).done(),
            await app.send("DELETE", "/v1/jobs/x", b"", {**OWN, **headers}).done(),
            await app.send("POST", "/drain", b"", {**OWN, **headers}).done(),
        ]
        if allowed:
            assert [one.status for one in answers] == [200, 400, 404, 404]
            assert "cross_site" not in [one.error["code"] for one in answers[1:]]
        else:
            assert [(one.status, one.error["code"]) for one in answers] == [(400, "cross_site")] * 4
            assert all("STEPWEAVE_CORS_ORIGINS" in one.error["message"] for one in answers)
            assert app.record.calls == []
        assert (await app.get("/v1/models", {**OWN, **headers})).status == 200


@pytest.mark.parametrize(
    ("host", "settings", "allowed"),
    [
        ("localhost:3000", {}, True),
        ("127.0.0.1:3000", {}, True),
        ("192.168.1.5:3000", {}, True),
        ("[fe80::1]:3000", {}, True),
        ("evil.test:3000", {}, False),
        ("localhost.evil.test", {}, False),
        ("127.0.0.1.evil.test", {}, False),
        ("", {}, False),
        ("images.test", {"trusted_hosts": "images.test"}, True),
        ("images.test", {"base_url": "https://images.test/x"}, True),
        ("evil.test", {"api_keys": "secret"}, True),
    ],
)
async def test_a_page_whose_name_was_led_here_may_send_nothing(
    host: str, settings: dict[str, str], allowed: bool
) -> None:
    """Such a page is of the same origin, to the browser: its owner had the name point to this
    server after it was loaded."""
    async with serving(**settings) as app:
        given = {"Host": host, "Content-Type": "application/json", "Authorization": "Bearer secret"}
        body = json.dumps({"prompt": "a", "num_inference_steps": 1}).encode()
        for said in (
            {SITE: "same-origin", "Origin": f"http://{host}"},
            {"Origin": f"http://{host}"},
            {SITE: "none"},
        ):
            answer = await app.send("POST", GENERATIONS, body, given | said).done()
            assert answer.status == (200 if allowed else 400)
            if not allowed:
                assert answer.error["code"] in ("untrusted_host", "cross_site")
        assert (await app.send("POST", GENERATIONS, body, given).done()).status == 200, (
            "it is no page's"
        )


async def test_any_page_may_send_where_any_origin_is_allowed() -> None:
    async with serving(cors_origins="*") as app:
        assert (
            await app.post(headers={SITE: "cross-site", "Origin": "https://a.test"}).done()
        ).status == 200
