"""Who may ask, what pages may, what is answered with, and how a server stops taking work."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from starlette.requests import Request

from stepweave.api.answers import accepted, wants_image, wants_stream, wants_to_come_back
from stepweave.api.responses import is_of_examples, is_of_protocol
from tests.support.asgi import GENERATIONS, App, serving
from tests.support.fake_pipeline import FakePipeline
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
GIVEN = {"Authorization": "Bearer secret"}
OPEN = (
    "/livez",
    "/readyz",
    "/health",
    "/healthz",
    "/v2/health/live",
    "/v2/health/ready",
    "/docs",
    "/docs/start.js",
    "/openapi.json",
)
CLOSED = (
    "/",
    "/metrics",
    "/v1/models",
    "/v1/models/shapes",
    "/v1/jobs",
    "/v1/jobs/x",
    "/v1/jobs/x/events",
    "/images/x.png",
    "/api/status",
    "/v2",
    "/v2/models/shapes",
    "/nope",
    "/docs.json",
)
POSTED = (
    GENERATIONS,
    "/v1/images/edits",
    "/generate",
    "/generate_stream",
    "/edit",
    "/api/diffusers/inference",
    "/v2/models/shapes/infer",
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- keys ---


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "secret",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer secret2",
        "Bearer secre",
        "Bearer secret,other",
        "Bearer  ",
        "Basic secret",
        "Basic c2VjcmV0",
        "Bearer sécret",
        "Bearer \x00",
        "Bearer \xff\xfe",
        "Token secret",
        "bearersecret",
        "Bearer secret x",
    ],
)
async def test_without_a_right_key_there_is_one_answer(header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with serving(api_keys="other,secret") as app:
        for path in OPEN:
            assert (await app.get(path, headers)).status == 200
        exchanges = [app.send("GET", path, headers=headers) for path in CLOSED]
        exchanges += [app.send("POST", path, b"{}", {**headers, **JSON}) for path in POSTED]
        exchanges += [
            app.send("DELETE", "/v1/jobs/x", headers=headers),
            app.send("OPTIONS", GENERATIONS, b"", headers),
        ]
        for one in exchanges:
            await one.done()
            assert (one.status, one.error["code"]) == (401, "invalid_api_key"), one.scope["path"]
            assert one.error.get("type", "authentication_error") == "authentication_error"
            assert one.headers["www-authenticate"] == "Bearer"
            assert one.headers["x-request-id"]
            assert b"secret" not in one.content
        for shape in (
            is_of_protocol,
            is_of_examples,
            lambda path: not is_of_protocol(path) and not is_of_examples(path),
        ):
            contents = {one.content for one in exchanges if shape(one.scope["path"])}
            assert len(contents) == 1, "nothing tells what there is"
        assert app.record.calls == []


@pytest.mark.parametrize(
    "header", ["Bearer secret", "bearer secret", "BEARER  secret ", "Bearer other"]
)
async def test_a_right_key_opens_everything(header: str) -> None:
    async with serving(api_keys=" other , secret ,") as app:
        assert (await app.post(headers={"Authorization": header}).done()).status == 200
        assert (await app.get("/metrics", {"Authorization": header})).status == 200
        assert (await app.get("/v1/jobs", {"Authorization": header})).status == 200


async def test_a_key_beyond_ascii() -> None:
    async with serving(api_keys="schlüssel") as app:
        # as UTF-8, which is what clients send
        sent = "Bearer " + "schlüssel".encode().decode("latin-1")
        assert (await app.get("/v1/models", {"Authorization": sent})).status == 200
        assert (await app.get("/v1/models", {"Authorization": "Bearer schlüssel"})).status == 401


async def test_without_keys_everybody_may() -> None:
    async with serving() as app:
        assert (await app.get("/metrics", {"Authorization": "Bearer what\xff"})).status == 200


@pytest.mark.parametrize(
    "name",
    [
        "Accept",
        "Prefer",
        "Idempotency-Key",
        "X-Request-ID",
        "Origin",
        "Authorization",
        "X-Forwarded-Host",
        "Cookie",
    ],
)
@pytest.mark.parametrize("value", ["\xff\xe9 ü", "\x80;q=\xb2,,;=;\xa0", "a" * 8000])
async def test_odd_headers_are_no_failure_of_the_server(name: str, value: str) -> None:
    async with serving(cors_origins="https://a.test") as app:
        answer = await app.post(headers={name: value}).done()
        is_key = len(value) < 256 and value.isprintable()
        refused = name == "Origin" or (name == "Idempotency-Key" and not is_key)
        assert answer.status == (400 if refused else 200)
        assert (await app.get("/v1/jobs/x", {name: value})).status == 404


# --- pages of other origins ---


def shared(answer: Any) -> dict[str, str]:
    return {
        name: value for name, value in answer.headers.items() if name.startswith("access-control-")
    }


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
    }


async def test_pages_of_other_origins_may_nothing_by_default() -> None:
    async with serving() as app:
        for answer in (
            await app.post(headers={"Origin": "https://a.test"}).done(),
            await app.send("OPTIONS", GENERATIONS, headers=preflight("https://a.test")).done(),
            await app.get("/nope", {"Origin": "https://a.test"}),
        ):
            assert shared(answer) == {}
        assert answer.status == 404


async def test_pages_of_allowed_origins_may_ask_and_see_errors() -> None:
    async with serving(
        cors_origins="https://a.test, https://b.test", api_keys="secret", max_queue=0
    ) as app:
        asked = await app.send("OPTIONS", GENERATIONS, headers=preflight("https://a.test")).done()
        assert asked.status == 200
        assert shared(asked)["access-control-allow-origin"] == "https://a.test"
        assert "idempotency-key" in shared(asked)["access-control-allow-headers"]
        assert {"GET", "POST", "DELETE"} <= set(
            shared(asked)["access-control-allow-methods"].split(", ")
        )
        assert asked.headers["x-request-id"]
        origin = {"Origin": "https://b.test"}
        given = GIVEN | origin | JSON
        app.record.gated = True
        first = app.post(headers=given)
        await app.until(lambda: app.server.active)
        answers = {
            401: app.send("POST", GENERATIONS, b"{}", origin | JSON),
            400: app.send("POST", GENERATIONS, b"{}", given),
            404: app.send("GET", "/nope", b"", given),
            405: app.send("PUT", GENERATIONS, b"", given),
            413: app.send("POST", GENERATIONS, b'{"prompt": "' + b"x" * 2_000_000 + b'"}', given),
            415: app.send("POST", GENERATIONS, b"", given | {"Content-Type": "text/plain"}),
            429: app.post(headers=given),
        }
        native = app.send("POST", "/generate", b"{}", given)
        for status, answer in [*answers.items(), (400, native)]:
            await answer.done()
            assert answer.status == status
            assert shared(answer)["access-control-allow-origin"] == "https://b.test", status
            assert shared(answer)["access-control-expose-headers"] == "*"
            assert "Origin" in answer.headers["vary"]
            assert answer.error
        assert "POST" in answers[405].headers["allow"]
        app.record.error = RuntimeError("x")
        app.record.release.set()
        await first.done()
        assert (first.status, shared(first)["access-control-allow-origin"]) == (
            500,
            "https://b.test",
        )


async def test_other_origins_are_told_so() -> None:
    async with serving(cors_origins="https://a.test", api_keys="secret") as app:
        asked = await app.send(
            "OPTIONS", GENERATIONS, headers=preflight("https://evil.test")
        ).done()
        assert asked.status == 400
        assert "access-control-allow-origin" not in shared(asked)
        assert asked.error
        for origin in (
            "https://evil.test",
            "https://a.test.evil.test",
            "null",
            "https://A.test",
            "http://a.test",
        ):
            answer = await app.post(headers=GIVEN | {"Origin": origin}).done()
            assert (answer.status, answer.error["code"]) == (400, "cross_site")
            assert "access-control-allow-origin" not in shared(answer)


async def test_any_origin_may_but_not_with_cookies() -> None:
    async with serving(cors_origins="*") as app:
        answer = await app.get("/v1/models", {"Origin": "https://a.test"})
        assert shared(answer)["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in shared(answer)


# --- what is asked for in headers ---


def asking(**headers: str | list[str]) -> Request:
    pairs = [
        (name.encode(), value.encode("latin-1"))
        for name, values in headers.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    return Request({"type": "http", "headers": pairs})


@pytest.mark.parametrize(
    ("accept", "image", "stream"),
    [
        ([], None, False),
        ("", None, False),
        ("*/*", None, False),
        ("application/json", None, False),
        ("image/png", "png", False),
        ("IMAGE/WebP", "webp", False),
        ("image/jpeg, application/json;q=0.9", "jpeg", False),
        ("image/jpeg;q=0.5, application/json", None, False),
        ("application/json;q=0.5, image/webp;q=0.6, image/png;q=0.1", "webp", False),
        (["application/json;q=0.2", "image/png;q=0.3"], "png", False),
        ("*/*;q=0.1, image/png", "png", False),
        ("image/png;q=0", None, False),
        ("image/png;q=0.0, image/webp", "webp", False),
        ("image/png;q=x, image/jpeg;q=0.1", "jpeg", False),
        ("image/png;q=nan, image/png;q=-1", None, False),
        ("image/gif, text/html", None, False),
        ("image/gif, image/png", "png", False),
        ("text/event-stream", None, True),
        ('text/event-stream; profile="stepweave"', None, True),
        ("text/event-stream;q=0.9, application/json", None, False),
        ("text/event-stream, image/png", None, True),
        ("image/png, text/event-stream", "png", False),
        ("text/html, */*;q=0.8", None, False),
        (",;,=;;q=,", None, False),
        (";q=1", None, False),
        ("image/png;" * 500, "png", False),
    ],
)  # fmt: skip
def test_what_is_accepted(accept: str | list[str], image: str | None, stream: bool) -> None:
    request = asking(accept=accept)
    assert wants_image(request) == image
    assert (wants_stream(request) is not None) == stream


def test_types_are_in_the_order_of_liking() -> None:
    request = asking(accept=["a/a;q=0.1, B/B; Level=1 ; q=0.5", "c/c, d/d;q=1.000;x"])
    assert accepted(request) == [
        ("c/c", {}),
        ("d/d", {"x": ""}),
        ("b/b", {"level": "1"}),
        ("a/a", {}),
    ]
    assert wants_stream(asking(accept='text/event-stream;profile="stepweave"')) == {
        "profile": "stepweave"
    }


@pytest.mark.parametrize(
    ("prefer", "later"),
    [
        ([], False),
        ("respond-async", True),
        ("Respond-Async, wait=10", True),
        (["return=minimal", "respond-async; a=b"], True),
        ("wait=10,respond-async", True),
        ("respond-asynchronously", False),
        ("x; respond-async", False),
        ("", False),
    ],
)
def test_who_prefers_to_come_back(prefer: str | list[str], later: bool) -> None:
    assert wants_to_come_back(asking(prefer=prefer)) is later


async def test_an_image_is_answered_with_its_file_and_its_parameters() -> None:
    async with serving() as app:
        for kind in ("png", "jpeg", "webp"):
            answer = await app.post(
                headers={"Accept": f"image/{kind}, */*;q=0.1"}, quality="high"
            ).done()
            assert (answer.status, answer.headers["content-type"]) == (200, f"image/{kind}")
            assert answer.headers["x-stepweave-seed"] == "1"
            assert answer.headers["x-stepweave-size"] == "64x64"
            assert "quality" in answer.headers["x-stepweave-warnings"]
            assert int(answer.headers["content-length"]) == len(answer.content)
        for fields, param in (({"n": 2}, "n"), ({"output_format": "webp"}, "output_format")):
            refused = await app.post(headers={"Accept": "image/png"}, **fields).done()
            assert (refused.status, refused.error["param"]) == (400, param)
        assert (
            await app.post(headers={"Accept": "image/webp"}, output_format="webp").done()
        ).status == 200
        later = await app.post(
            headers={"Accept": "image/png", "Prefer": "respond-async"}, n=2
        ).done()
        assert later.status == 202, "what comes later is JSON"
        assert app.outcomes()["invalid"] == 2


# --- the drain ---


async def test_the_drain_is_for_who_reads_the_state_directory(tmp_path: Path) -> None:
    async with serving(state_dir=str(tmp_path), api_keys="secret") as app:
        file = tmp_path / "drain-token"
        assert file.stat().st_mode & 0o777 == 0o600
        assert not [name for name in os.listdir(tmp_path) if "partial" in name]
        nowhere = await app.get("/nope", {"Authorization": "Bearer secret"})
        for given in (
            {},
            {"Authorization": "Bearer secret"},
            {"Authorization": f"Basic {file.read_text()}"},
            {"Authorization": "Bearer "},
            {"Authorization": f"Bearer {file.read_text()[:-1]}"},
            {"Authorization": "Bearer \u00e9"},
        ):
            for method in ("POST", "DELETE", "GET", "PUT"):
                for client in ("127.0.0.1", "::1", "10.0.0.7"):
                    headers = {"Host": "localhost:3000", **given}
                    answer = await app.send(method, "/drain", b"", headers, client=client).done()
                    assert answer.status == 404
                    assert answer.error["message"] == nowhere.error["message"].replace(
                        "/nope", "/drain"
                    )
        assert app.server.health().stage == "ready"
        for method in ("GET", "PUT"):
            answer = await app.drain(method)
            assert (answer.status, answer.headers["allow"]) == (405, "POST, DELETE")
        forwarded = await app.drain(Host="stepweave.example.com", **{"X-Forwarded-For": "10.0.0.7"})
        assert (forwarded.status, forwarded.json()) == (200, {"stage": "draining", "in_flight": 0})
        assert (await app.drain()).status == 200, "once more"
        before = file.read_text()
    async with serving(state_dir=str(tmp_path)) as app:
        assert file.read_text() != before, "a new one at each start"
        assert (await app.drain("POST", Authorization=f"Bearer {before}")).status == 404


async def test_work_is_taken_until_load_balancers_have_heard_of_a_drain() -> None:
    async with serving(drain_notice=SECONDS) as app:
        told: list[bool] = []
        app.server.leaving.listeners.append(told.append)
        assert "connection" not in (await app.get("/readyz")).headers
        assert (await app.drain()).status == 200
        assert told == [True]
        ready = await app.get("/readyz")
        assert (ready.status, ready.error["code"], ready.headers["connection"]) == (
            503,
            "draining",
            "close",
        )
        assert app.metric("stepweave_ready") == 0
        for one in (
            app.post(),
            app.post(stream=True),
            app.post(headers={"Prefer": "respond-async"}),
            app.post(prompt=""),
            app.post("/generate"),
            app.send("GET", "/v1/models"),
            app.send("GET", "/nope"),
        ):
            await one.done()
            assert one.status in (200, 202, 400, 404)
            assert one.headers["connection"] == "close"


async def test_a_drain_can_be_taken_back_until_the_process_is_told_to_end() -> None:
    async with serving(drain_notice=0, grace=SECONDS) as app:
        told: list[bool] = []
        app.server.leaving.listeners.append(told.append)
        assert (await app.drain("DELETE")).json() == {"stage": "ready", "in_flight": 0}, (
            "there is none"
        )
        await app.drain()
        refused = await app.post().done()
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (
            503,
            "draining",
            "1",
        )
        back = await app.drain("DELETE")
        assert (back.status, back.json()["stage"], "connection" in back.headers) == (
            200,
            "ready",
            False,
        )
        assert (await app.post().done()).status == 200
        assert (await app.get("/readyz")).status == 200
        await app.drain()
        app.server.terminate()
        late = await app.drain("DELETE")
        assert (late.status, late.error["code"], late.error["param"]) == (409, "terminating", None)
        assert (await app.post().done()).status == 503
        assert told == [True, False, True]


async def test_a_drained_server_that_nothing_ends_is_not_alive() -> None:
    async with serving(drain_notice=0, grace=0.01) as app:
        await app.drain()
        await app.until(lambda: app.server.leaving.overdue)
        for path in ("/livez", "/healthz", "/v2/health/live"):
            assert (await app.get(path)).status == 503
        assert "the process got no signal to end" in (await app.get("/livez")).json()["message"]
        await app.drain("DELETE")
        assert (await app.get("/livez")).status == 200
        await app.drain()
        app.server.terminate()
        assert (await app.get("/livez")).status == 200, "it ends"


@contextlib.asynccontextmanager
async def draining(**settings: Any) -> AsyncIterator[tuple[App, Any, str]]:
    """A server that drains while a stream and a job wait for the test: app, stream, and the job's
    id."""
    async with serving(FakePipeline(edits=True), **{"drain_notice": 0, **settings}) as app:
        app.record.gated = True
        stream = app.post(stream=True)
        await stream.until(lambda one: one.messages)
        id = (await app.post(headers={"Prefer": "respond-async"}).done()).json()["id"]
        assert (await app.drain()).json() == {"stage": "draining", "in_flight": 2}
        yield app, stream, id


async def test_a_draining_server_finishes_what_it_has_and_takes_nothing_more() -> None:
    async with draining() as (app, stream, id):
        live, ready = await app.get("/livez"), await app.get("/readyz")
        assert (live.status, live.json()["stage"]) == (200, "draining")
        assert (ready.status, ready.error["code"]) == (503, "draining")
        assert (await app.get("/v2/health/live")).status == 200
        assert (await app.get("/v2/health/ready")).status != 200
        assert app.metric("stepweave_ready") == 0
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        image = (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx'
            b"\r\n--x--\r\n"
        )
        inputs = (
            b'{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}'
        )
        refused = [
            app.post(),
            app.post(stream=True),
            app.post(headers={"Prefer": "respond-async"}),
            app.post(headers={"Idempotency-Key": "k"}),
            app.post("/generate"),
            app.post("/generate_stream"),
            app.send("POST", "/edit", image, form),
            app.send("POST", "/v1/images/edits", image, form),
            app.send("POST", "/api/diffusers/inference", b'{"prompt": "a"}', JSON),
            app.send("POST", "/v2/models/shapes/infer", inputs, JSON),
        ]
        for one in refused:
            await one.done()
            assert one.status == 503, one.scope["path"]
            assert (one.headers["retry-after"], one.headers["connection"]) == ("1", "close")
        assert all(one.error["code"] == "draining" for one in refused[:8])
        assert app.outcomes() == {"unavailable": len(refused)}
        assert (await app.job(id))["state"] == "queued"
        app.record.release.set()
        assert (await stream.done()).names == ["image_generation.completed"]
        assert (await app.until_state(id, "succeeded"))["result"] is not None


async def test_after_the_grace_period_what_is_left_ends() -> None:
    async with draining(grace=0.05) as (app, stream, id):
        answer = app.send("GET", f"/v1/jobs/{id}/events")
        await answer.done()
        assert answer.names[-1] == "error"
        assert answer.events[-1].data["error"]["code"] == "draining"
        job = await app.job(id)
        assert (job["state"], job["error"]["code"]) == ("failed", "draining")
        app.record.release.set()
        assert (await stream.done()).names == ["error"]
        assert stream.events[-1].data["error"]["code"] == "draining"
        assert app.record.steps_run <= 1
        assert app.metric("stepweave_steps_saved_total") >= 7
        # counted once it is sent, which the client may know a moment sooner
        await app.until(lambda: app.outcomes() == {"unavailable": 2})


async def test_the_end_waits_for_the_grace_period_and_not_longer(tmp_path: Path) -> None:
    async with draining(grace=0.05, state_dir=str(tmp_path)) as (app, stream, _):
        asyncio.get_running_loop().call_later(0.15, app.record.release.set)
        await asyncio.wait_for(app.server.shut_down(), SECONDS)
        assert app.server.status.stage == "closed"
        assert (await stream.done()).names == ["error"]
        assert app.record.steps_run <= 1


# --- a stuck engine ---


@pytest.mark.parametrize("seconds", [601.0, math.inf])
async def test_a_stuck_engine_is_neither_ready_nor_alive(seconds: float) -> None:
    async with serving() as app:
        assert app.metric("stepweave_ready") == 1
        assert app.server.engine is not None
        with patch.object(app.server.engine, "stalled", lambda: seconds):
            for path in ("/livez", "/readyz", "/healthz"):
                answer = await app.get(path)
                assert (answer.status, answer.json()["error"]["code"]) == (503, "engine_stuck")
                assert answer.json()["stage"] == "stuck"
            assert app.metric("stepweave_ready") == 0
            app.server.terminate()
            assert (await app.get("/livez")).status == 503, "also while it drains"
        with patch.object(app.server.engine, "stalled", lambda: 599.0):
            assert (await app.get("/livez")).status == 200
