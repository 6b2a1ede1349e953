"""Each request for images is counted once, by what it was answered with, on every surface of the
real server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from stepweave.telemetry.metrics import Metrics
from tests.support.asgi import serving
from tests.support.served import Served, serve
from tests.support.waiting import SECONDS, wait_until

KEY = "alice-has-a-long-key"
MAX_BODY, MAX_UPLOAD = 65_536, 131_072
STEPS = 10_000  # of a job that lasts until its client leaves

Fields = dict[str, Any]
Make = Callable[..., httpx.Request]


def json_of(path: str, **always: Any) -> Make:
    def make(url: str, headers: dict[str, str], **fields: Any) -> httpx.Request:
        return httpx.Request("POST", url + path, json={**always, **fields}, headers=headers)

    return make


def form_of(path: str, **always: str) -> Make:
    def make(url: str, headers: dict[str, str], **fields: Any) -> httpx.Request:
        image = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(image, "PNG")
        texts = {name: str(value) for name, value in {**always, "strength": 1, **fields}.items()}
        file = ("a.png", image.getvalue(), "image/png")
        return httpx.Request("POST", url + path, data=texts, files={"image": file}, headers=headers)

    return make


def tensors_of(path: str, prompts: int) -> Make:
    def make(
        url: str, headers: dict[str, str], prompt: str, model: str = "shapes", **fields: Any
    ) -> httpx.Request:
        given = {
            "name": "prompt",
            "datatype": "BYTES",
            "shape": [prompts],
            "data": [prompt] * prompts,
        }
        body = {"inputs": [given], "parameters": fields}
        return httpx.Request("POST", url + path.format(model=model), json=body, headers=headers)

    return make


def with_header(name: str, value: str, make: Make) -> Make:
    return lambda url, headers, **fields: make(url, {name: value, **headers}, **fields)


GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
ANSWERS: dict[str, Make] = {
    "generations": json_of(GENERATIONS),
    "generations, an image": with_header("Accept", "image/png", json_of(GENERATIONS)),
    "generations, urls": json_of(GENERATIONS, response_format="url"),
    "edits": form_of(EDITS),
    "edits, urls": form_of(EDITS, response_format="url"),
    "generate": json_of("/generate"),
    "edit": form_of("/edit"),
    "infer": tensors_of("/v2/models/{model}/infer", 1),
    "infer, a version": tensors_of("/v2/models/{model}/versions/1/infer", 1),
    "infer, two prompts": tensors_of("/v2/models/{model}/infer", 2),
    "inference": json_of("/api/diffusers/inference"),
}
STREAMS: dict[str, Make] = {
    "generations, a stream": json_of(GENERATIONS, stream=True, events="all"),
    "generations, a stream of urls": json_of(
        GENERATIONS, stream=True, events="all", response_format="url"
    ),
    "generations, a stream by its type": with_header(
        "Accept", "text/event-stream; profile=stepweave", json_of(GENERATIONS)
    ),
    "edits, a stream": form_of(EDITS, stream="true", events="all"),
    "generate_stream": json_of("/generate_stream", events="all"),
}
SURFACES = ANSWERS | STREAMS
WITH_MODEL = [
    name
    for name in SURFACES
    if name.startswith(("generations", "edits", "infer")) and name != "inference"
]
WITH_URLS = [name for name in SURFACES if "urls" in name or name == "inference"]
WITH_DEADLINE = [name for name in SURFACES if name != "inference"]


class Counted:
    """The server, and what has been asked of it."""

    def __init__(self, served: Served, state: Path) -> None:
        self.url = served.url
        self.state = state
        self.headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(timeout=SECONDS)

    def samples(self, name: str) -> dict[tuple[str, str], int]:
        text = self.client.get(f"{self.url}/metrics", headers=self.headers).text
        return {
            (sample.labels.get("outcome", ""), sample.labels.get("client", "")): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and sample.value
        }

    def counts(self) -> Counter[tuple[str, str]]:
        return Counter(self.samples("stepweave_requests_total"))

    def idle(self) -> None:
        wait_until(lambda: not self.samples("stepweave_requests_in_flight"))

    @contextlib.contextmanager
    def counting(self, *outcomes: str, client: str = "alice") -> Iterator[None]:
        """What the block asks for is counted as that, and nothing else is."""
        before = self.counts()
        yield
        expected = Counter((outcome, client) for outcome in outcomes)
        wait_until(lambda: (self.counts() - before).total() >= len(outcomes))
        self.idle()
        assert self.counts() - before == expected

    def request(
        self, surface: str, prompt: str = "a star", headers: Fields | None = None, **fields: Any
    ) -> httpx.Request:
        values = {"num_inference_steps": 2, **fields}
        return SURFACES[surface](self.url, self.headers | (headers or {}), prompt=prompt, **values)

    def ask(
        self, surface: str, prompt: str = "a star", headers: Fields | None = None, **fields: Any
    ) -> int:
        """The status, or that of the error which a stream ends with."""
        answer = self.client.send(self.request(surface, prompt, headers, **fields))
        if answer.status_code != 200 or surface not in STREAMS:
            return answer.status_code
        *_, last = answer.text.strip().split("\n\n")
        name, data = (line.partition(": ")[2] for line in last.split("\n"))
        if name != "error":
            assert name.endswith(".completed")
            return 200
        kinds = {"server_error": 500, "timeout": 504, "cancelled": 499, "unavailable": 503}
        return kinds[json.loads(data)["error"]["type"]]

    @contextlib.contextmanager
    def following(self, surface: str = "generations, a stream") -> Iterator[None]:
        """A client that has read the beginning of a stream that lasts, and leaves at the end of the
        block."""
        request = self.request(surface, "it lasts", num_inference_steps=STEPS)
        with contextlib.closing(httpx.Client(timeout=SECONDS)) as client:
            answer = client.send(request, stream=True)
            assert answer.status_code == 200
            chunks = answer.iter_raw()  # the end of which would be that of the connection
            assert next(chunks)
            yield

    @contextlib.contextmanager
    def without_files(self) -> Iterator[None]:
        """No file can be stored meanwhile."""
        images = self.state / "images"
        images.rename(self.state / "away")
        images.touch()
        try:
            yield
        finally:
            images.unlink()
            (self.state / "away").rename(images)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    directory = tmp_path_factory.mktemp("counted")
    (directory / "keys").write_text(f"alice: {KEY}")
    settings = {
        "STEPWEAVE_API_KEYS_FILE": str(directory / "keys"),
        "STEPWEAVE_STATE_DIR": str(directory / "state"),
        "STEPWEAVE_BATCHING": "off",
        "STEPWEAVE_WARMUP": "false",
        "STEPWEAVE_DRAIN_NOTICE": "0",
        "STEPWEAVE_MAX_QUEUE": "1",  # two prompts, or one that leaves and one that comes
        "STEPWEAVE_MAX_STEPS": str(STEPS),
        "STEPWEAVE_MAX_BODY_BYTES": str(MAX_BODY),
        "STEPWEAVE_MAX_UPLOAD_BYTES": str(MAX_UPLOAD),
    }
    with serve(directory / "log.txt", "tests.support.told_service:Stepweave", **settings) as served:
        served.wait_until_ready()
        made = Counted(served, directory / "state")
        with made.client:
            yield made


@pytest.mark.parametrize("surface", SURFACES)
def test_what_is_answered_is_what_is_counted(counted: Counted, surface: str) -> None:
    with counted.counting("succeeded"):
        assert counted.ask(surface) == 200
    with counted.counting("failed"):
        assert counted.ask(surface, "it fails") == 500
    with counted.counting("invalid"):
        assert counted.ask(surface, num_inference_steps=0) == 400
    with counted.counting("invalid"):
        assert counted.ask(surface, "a" * 2 * MAX_UPLOAD) == 413
    with counted.counting("invalid"):
        assert counted.ask(surface, headers={"Content-Type": "text/plain"}) == 415
    with counted.counting("invalid", client=""):
        assert counted.ask(surface, headers={"Authorization": "Bearer x"}) == 401
    with counted.counting("invalid", client=""):
        assert counted.ask(surface, headers={"Origin": "https://a.test"}) == 400
    key = {"Idempotency-Key": surface}
    with counted.counting("succeeded", "succeeded", "invalid"):
        assert [counted.ask(surface, headers=key), counted.ask(surface, headers=key)] == [200, 200]
        assert counted.ask(surface, "another", headers=key) == 409
    if surface in WITH_MODEL:
        with counted.counting("invalid"):
            assert counted.ask(surface, model="another") == 404
    if surface in WITH_DEADLINE:
        with counted.counting("late"):
            assert (
                counted.ask(surface, "it lasts", num_inference_steps=STEPS, deadline_ms=100) == 504
            )
    if surface in WITH_URLS:
        with counted.counting("failed"), counted.without_files():
            assert counted.ask(surface) == 500
        with counted.counting("succeeded"):
            assert counted.ask(surface) == 200


@pytest.mark.parametrize("surface", SURFACES)
def test_a_client_that_leaves_is_counted_as_such(counted: Counted, surface: str) -> None:
    with counted.counting("cancelled"):
        request = counted.request(surface, "it lasts", num_inference_steps=STEPS)
        # the answer would take minutes
        request.extensions = {
            "timeout": {"connect": SECONDS, "write": SECONDS, "pool": SECONDS, "read": 0.5}
        }
        with httpx.Client() as client:
            if surface in STREAMS:
                client.send(request, stream=True)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.send(request)
    if surface in STREAMS:
        with counted.counting("cancelled"), counted.following(surface):
            pass


@pytest.mark.parametrize("surface", ["generations, urls", "edits"])
def test_a_job_is_counted_when_it_is_over_by_what_is_kept(counted: Counted, surface: str) -> None:
    def later(prompt: str, **fields: Any) -> str:
        request = counted.request(
            surface, prompt, {"Prefer": "respond-async", **fields.pop("headers", {})}, **fields
        )
        answer = counted.client.send(request)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    with counted.counting("succeeded"):
        later("a star")
    with counted.counting("failed"):
        later("it fails")
    with counted.counting("late"):
        later("it lasts", num_inference_steps=STEPS, deadline_ms=100)
    with counted.counting("failed"), counted.without_files():
        before = counted.counts()
        later("a star")
        # the files are away until it has been given up
        wait_until(lambda: counted.counts() != before)
    with counted.counting("invalid"):
        assert (
            counted.ask(surface, headers={"Prefer": "respond-async"}, num_inference_steps=0) == 400
        )
    with counted.counting("cancelled"):
        id = later("it lasts", num_inference_steps=STEPS)
        before = counted.counts()
        wait_until(lambda: job(counted, id)["step"])
        assert counted.counts() == before, "it is not over"
        counted.client.delete(f"{counted.url}/v1/jobs/{id}", headers=counted.headers)
    key = {"Idempotency-Key": f"later {surface}"}
    with counted.counting("cancelled", "cancelled"):  # two requests for one job
        ids = {later("it lasts", num_inference_steps=STEPS, headers=key) for _ in range(2)}
        (id,) = ids
        counted.client.delete(f"{counted.url}/v1/jobs/{id}", headers=counted.headers)
    with counted.counting("succeeded", "succeeded"):
        first = later("a star", headers=key)
        wait_until(lambda: job(counted, first)["state"] == "succeeded")
        assert later("a star", headers=key) == first, "it is over"


def job(counted: Counted, id: str) -> Any:
    return counted.client.get(f"{counted.url}/v1/jobs/{id}", headers=counted.headers).json()


def test_a_store_that_is_locked_fails_what_it_was_to_keep(counted: Counted) -> None:
    with contextlib.closing(
        sqlite3.connect(counted.state / "jobs.sqlite", isolation_level=None)
    ) as other:
        for surface, headers in (
            ("generations", {"Prefer": "respond-async"}),
            ("generations, a stream", {"Idempotency-Key": "locked"}),
            ("infer", {"Idempotency-Key": "locked"}),
        ):
            with counted.counting("failed"):
                other.execute("BEGIN EXCLUSIVE")
                assert counted.ask(surface, headers=headers) == 500
                other.execute("ROLLBACK")


def test_nothing_else_is_counted(counted: Counted) -> None:
    with counted.counting():
        for method, path in (
            ("GET", GENERATIONS),
            ("PUT", "/generate"),
            ("OPTIONS", EDITS),
            ("POST", "/nope"),
            ("POST", "/v1/models"),
            ("GET", "/v1/models"),
            ("GET", "/v1/jobs"),
            ("GET", "/images/x.png"),
            ("POST", "/v2/models/shapes"),
            ("GET", "/v1/jobs/x/events"),
            ("GET", "/api/status"),
            ("GET", "/readyz"),
        ):
            counted.client.request(method, counted.url + path, headers=counted.headers)


def test_every_route_that_makes_images_is_counted(counted: Counted) -> None:
    """Of the document's POSTs all are, but these."""
    others = ("/drain", "/v1/images/variations", "/v1/loras", "/v2/repository/index")
    paths = counted.client.get(f"{counted.url}/openapi.json", headers=counted.headers).json()[
        "paths"
    ]
    for path in [
        path for path, methods in paths.items() if "post" in methods and path not in others
    ]:
        with counted.counting("invalid"):
            url = counted.url + path.replace("{model}", "shapes").replace("{version}", "1")
            assert counted.client.post(url, content=b"-", headers=counted.headers).status_code in (
                400,
                415,
            )


def test_requests_are_counted_as_they_begin_where_the_example_server_does(counted: Counted) -> None:
    def total() -> Any:
        return counted.client.get(f"{counted.url}/api/status", headers=counted.headers).json()[
            "total_requests"
        ]

    before = total()
    with counted.counting("cancelled"), counted.following():
        assert total() == before + 1
    assert total() == before + 1 == counted.counts().total()


def test_who_is_refused_is_counted_as_such(counted: Counted) -> None:
    """Once: a place is kept for those who are."""
    with counted.counting("cancelled", "cancelled", *["refused"] * len(SURFACES)):
        with counted.following(), counted.following("generate_stream"):
            assert [counted.ask(surface) for surface in SURFACES] == [429] * len(SURFACES)


def test_a_server_that_drains_has_counted_every_request(counted: Counted) -> None:
    bearer = {"Authorization": f"Bearer {(counted.state / 'drain-token').read_text()}"}
    assert httpx.post(f"{counted.url}/drain", headers=bearer).status_code == 200
    for surface in SURFACES:
        with counted.counting("unavailable"):
            assert counted.ask(surface) == 503


# --- what no client can bring about at will ---


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.contextmanager
def held(target: str) -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """A function that waits within the block: what is set once it is called, and what lets it go
    on."""
    called, go = asyncio.Event(), asyncio.Event()
    module, _, name = target.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    async def waits(*args: Any, **options: Any) -> Any:
        called.set()
        await go.wait()
        return await real(*args, **options)

    with patch(target, waits):
        yield called, go


@pytest.mark.anyio
async def test_a_client_that_leaves_between_the_images_and_the_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "stepweave.access")
    async with serving() as app:
        with held("stepweave.api.routes.openai.json_answer") as (called, go):
            exchange = app.post()
            await asyncio.wait_for(called.wait(), SECONDS)
            leaving = asyncio.ensure_future(exchange.leave())
            await asyncio.sleep(0)
            go.set()
            await leaving
        assert app.outcomes() == {"cancelled": 1}
        assert "generations 499 " in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["answer", "stream"])
@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), BrokenPipeError(32, "broken"), OSError()]
)
async def test_a_connection_that_fails_is_of_a_client_that_left(
    fields: Fields, error: OSError
) -> None:
    async with serving() as app:
        exchange = app.post(**fields)

        async def fails(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise error

        exchange._send = fails  # type: ignore[method-assign]
        with contextlib.suppress(Exception):  # whatever comes of it for the server
            await exchange.done()
        assert app.outcomes() == {"cancelled": 1}


@pytest.mark.anyio
async def test_an_answer_that_cannot_be_made_failed() -> None:
    async with serving() as app:
        with patch("stepweave.api.routes.openai.json_answer", side_effect=TypeError("x")):
            assert (await app.post().done()).status == 500
        with patch("stepweave.api.events._completed", side_effect=TypeError("x")):
            assert (await app.post(stream=True).done()).names == ["error"]
        assert app.outcomes() == {"failed": 2}


@pytest.mark.anyio
async def test_an_answer_that_breaks_off_failed(caplog: pytest.LogCaptureFixture) -> None:
    """Its status has been sent by then."""
    caplog.set_level(logging.INFO, "stepweave.access")
    async with serving() as app:
        with (
            patch("stepweave.api.events._completed", side_effect=TypeError("x")),
            patch("stepweave.api.events._failed", side_effect=TypeError("y")),
        ):
            exchange = await app.post(stream=True).done()
        assert exchange.status == 200
        assert app.outcomes() == {"failed": 1}
        assert "generations 500 " in caplog.text


@pytest.mark.anyio
async def test_a_request_that_the_server_cuts_off_failed() -> None:
    async with serving() as app:
        app.record.gated = True
        exchange = app.post()
        await app.until(lambda: app.record.running)
        exchange.task.cancel()
        app.record.release.set()
        with pytest.raises(asyncio.CancelledError):
            await exchange.task
        app.exchanges.remove(exchange)
        assert app.outcomes() == {"failed": 1}


@pytest.mark.anyio
async def test_clients_of_keys_without_names_are_told_apart() -> None:
    async with serving(api_keys="the-first-of-two-keys,the-second-of-two-keys") as app:
        for key in ("first", "second", "second", "third"):
            await app.post(headers={"Authorization": f"Bearer the-{key}-of-two-keys"}).done()
        samples = next(iter(app.server.metrics.requests.collect())).samples
        counts = {
            (one.labels["client"], one.labels["outcome"]): one.value for one in samples if one.value
        }
        assert counts == {("key1", "succeeded"): 1, ("key2", "succeeded"): 2, ("", "invalid"): 1}


@pytest.mark.anyio
async def test_each_client_that_has_a_key_has_its_series_from_the_first_scrape() -> None:
    async with serving(api_keys="the-first-of-two-keys,the-second-of-two-keys") as app:
        app.server.metrics.render()
        for client in ("", "key1", "key2"):
            for outcome in ("succeeded", "failed", "refused"):
                assert app.metric("stepweave_requests_total", client=client, outcome=outcome) == 0


def test_ever_new_names_do_not_become_ever_more_series() -> None:
    metrics = Metrics(in_flight=lambda: 0, waiting=lambda: 0)
    with patch("stepweave.telemetry.metrics.MAX_CLIENT_LABELS", 3):
        for number in range(10):
            metrics.answered(200, f"client{number}")
        metrics.answered(429, "client1")
        metrics.answered(401)
    samples = next(iter(metrics.requests.collect())).samples
    assert {one.labels["client"] for one in samples} == {"", "client0", "client1", "(other)"}
    counts = {
        (one.labels["client"], one.labels["outcome"]): one.value for one in samples if one.value
    }
    assert counts == {
        ("client0", "succeeded"): 1,
        ("client1", "succeeded"): 1,
        ("(other)", "succeeded"): 8,
        ("client1", "refused"): 1,
        ("", "invalid"): 1,
    }
