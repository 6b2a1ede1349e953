"""The app in the test's own event loop, with clients that read, wait and disconnect when a test
says
so.

async with serving() as app:
    first = app.post(prompt="a star")
    await first.leave()
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

from starlette.datastructures import Headers

from stepweave.api.app import Api
from stepweave.api.middleware.contract import ContractMiddleware
from stepweave.api.responses import is_of_protocol
from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.serving.names import told_name
from stepweave.serving.server import Server
from tests.support.environment import clean_environment
from tests.support.fake_pipeline import FakePipeline, Record
from tests.support.waiting import SECONDS

GENERATIONS = "/v1/images/generations"


class Event(NamedTuple):
    """A server-sent event."""

    name: str
    data: dict[str, Any]


class Exchange:
    """A request, and its answer so far."""

    def __init__(
        self,
        app: Any,
        method: str,
        path: str,
        body: bytes | None = b"",
        headers: Sequence[tuple[str, str]] = (),
        client: str = "127.0.0.1",
    ) -> None:
        """With a `body` of None, `send_body` sends it."""
        path, _, query = path.partition("?")
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
        if not any(name == b"host" for name, _ in raw):
            raw.append((b"host", b"localhost:3000"))
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": raw,
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 3000),
            "client": (client, 50_000),
            "asgi": {"version": "3.0"},
        }
        self.began = time.monotonic()
        self.messages: list[Any] = []
        self.times: list[float] = []  # of each message
        self.reads = asyncio.Event()  # while unset, the client does not read
        self.reads.set()
        self._body = body
        self._left = asyncio.Event()
        self._comes = asyncio.Event()  # the body is sent, or the client disconnects
        self._news = asyncio.Condition()
        self.task = asyncio.ensure_future(self._run(app))

    async def _run(self, app: Any) -> None:
        try:
            await app(self.scope, self._receive, self._send)
        finally:
            async with self._news:
                self._news.notify_all()

    async def _receive(self) -> dict[str, Any]:
        while self._body is None and not self._left.is_set():
            await self._comes.wait()
            self._comes.clear()
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if self._left.is_set():
            return
        async with self._news:
            self.messages.append(message)
            self.times.append(time.monotonic())
            self._news.notify_all()

    async def until(self, found: Callable[[Exchange], Any]) -> Exchange:
        """Wait until the condition holds for the exchange."""
        async with asyncio.timeout(SECONDS), self._news:
            await self._news.wait_for(lambda: found(self) or self.task.done())
        if not found(self):
            self.task.result()
            raise AssertionError(f"it ended without: {self.messages}")
        return self

    async def done(self) -> Exchange:
        await asyncio.wait_for(asyncio.shield(self.task), SECONDS)
        return self

    def send_body(self, body: bytes) -> None:
        """Send the body."""
        self._body = body
        self._comes.set()

    async def leave(self) -> None:
        """Close the connection; returns once the app has noticed."""
        self._left.set()
        self._comes.set()
        self.reads.set()
        await self.done()

    @property
    def has_sent(self) -> bool:
        """Whether the app has taken the body."""
        return self._body is None

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> Headers:
        return Headers(raw=self.messages[0]["headers"])

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> Any:
        """The error's members; for the Open Inference Protocol, whose errors are texts, the message
        and the code in the header."""
        error = self.json()["error"]
        if is_of_protocol(self.scope["path"]):
            assert isinstance(error, str)
            return {"message": error, "code": self.headers["x-stepweave-code"]}
        assert set(error) == {"message", "type", "code", "param"}
        return error

    @property
    def events(self) -> list[Event]:
        """The server-sent events, parsed as in WHATWG HTML, 9.2.6."""
        found = []
        for block in self.content.decode().split("\n\n")[:-1]:
            if not block.startswith(":"):
                lines = [line.partition(": ") for line in block.split("\n")]
                assert [name for name, _, _ in lines] == ["event", "data"], block
                found.append(Event(lines[0][2], json.loads(lines[1][2])))
        return found

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]


class App:
    """A server, its app, and the record of its fake pipeline."""

    def __init__(self, server: Server, record: Record) -> None:
        self.server = server
        self.record = record
        self.asgi = ContractMiddleware(Api(server).app(), server)
        self.exchanges: list[Exchange] = []
        self._tasks = asyncio.all_tasks()

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = b"",
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        client: str = "127.0.0.1",
    ) -> Exchange:
        pairs = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
        exchange = Exchange(self.asgi, method, path, body, pairs, client)
        self.exchanges.append(exchange)
        return exchange

    async def drain(self, method: str = "POST", **headers: str) -> Exchange:
        """Drain the server as a preStop hook does, unless `headers` differ."""
        token = self.server.drain_token
        assert token is not None
        given = {"Authorization": f"Bearer {token.path.read_text()}"} | headers
        return await self.send(method, "/drain", b"", given).done()

    def post(
        self, path: str = GENERATIONS, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> Exchange:
        """Post a JSON request, by default with 4 steps."""
        body = json.dumps(
            {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1} | fields
        ).encode()
        return self.send(
            "POST", path, body, {"Content-Type": "application/json", **(headers or {})}
        )

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Exchange:
        return await self.send("GET", path, headers=headers or {}).done()

    async def delete(self, path: str, headers: Mapping[str, str] | None = None) -> Exchange:
        return await self.send("DELETE", path, headers=headers or {}).done()

    async def job(self, id: str, **headers: str) -> Any:
        found = await self.get(f"/v1/jobs/{id}", headers)
        assert found.status == 200, found.content
        return found.json()

    async def until_state(self, id: str, *states: str, **headers: str) -> Any:
        async with asyncio.timeout(SECONDS):
            while (job := await self.job(id, **headers))["state"] not in states:  # noqa: ASYNC110 -- as clients do
                await asyncio.sleep(0.005)
        return job

    async def until(self, found: Callable[[], Any]) -> None:
        """Poll until the condition holds."""
        async with asyncio.timeout(SECONDS):
            while not found():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def leave(self, exchange: Exchange) -> None:
        """Disconnect the client of a gated job, then open the gate."""
        leaving = asyncio.ensure_future(exchange.leave())
        await self.told_to_end()
        self.record.release.set()
        await leaving

    async def told_to_end(self) -> None:
        """Wait until every job is cancelled; gated ones end at their next step."""
        active = self.server.active
        await self.until(
            lambda: all(each.job.done() or each.job.cancelled for each in active.values())
        )

    def outcomes(self) -> dict[str, int]:
        """Counts of requests by outcome."""
        samples = next(iter(self.server.metrics.requests.collect())).samples
        counts: dict[str, int] = {}
        for one in samples:
            if one.value:
                counts[one.labels["outcome"]] = counts.get(one.labels["outcome"], 0) + int(
                    one.value
                )
        return counts

    def metric(self, name: str, **labels: str) -> float:
        labels = {"model_name": told_name(self.server.settings), **labels}
        value = self.server.metrics.registry.get_sample_value(name, labels)
        assert value is not None
        return value

    async def idle(self) -> None:
        """Wait until no request is active, stored or admitted."""
        jobs, admission = self.server.jobs, self.server._admission
        assert jobs is not None and admission is not None
        self.record.release.set()
        for exchange in self.exchanges:
            await exchange.done()
        await self.until(lambda: not self.server.active)
        await self.until(
            lambda: not any((jobs._owners, jobs._open, jobs._under_way, jobs._keeping))
        )
        await self.until(lambda: asyncio.all_tasks() <= self._tasks)
        assert (admission.in_flight, self.record.running) == (0, 0)


@contextlib.asynccontextmanager
async def started(pipeline: Any = None, **settings: Any) -> AsyncIterator[App]:
    """Start a server, without checks at the end of the block."""
    fake = FakePipeline() if pipeline is None else pipeline
    with patch.dict(os.environ, clean_environment(), clear=True):
        made = Settings(**{"batching": "off", "warmup": False, **settings})
    server = Server(made, load=lambda *_: (fake, Preset()))
    server.start()
    try:
        async with asyncio.timeout(SECONDS):
            while server.status.stage != "ready":
                assert server.status.stage != "failed", server.status.message
                await asyncio.sleep(0.002)
        yield App(server, getattr(fake, "record", Record()))
    finally:
        getattr(fake, "record", Record()).release.set()
        await asyncio.to_thread(server.close)


@contextlib.asynccontextmanager
async def serving(pipeline: Any = None, **settings: Any) -> AsyncIterator[App]:
    """Start a server; checks at the end that no request is left, and that no error was
    unhandled."""
    untold: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: untold.append(context))
    async with started(pipeline, **settings) as app:
        yield app
        await app.idle()
        gc.collect(1)  # asyncio reports unretrieved errors when their tasks are collected
        await asyncio.sleep(0)
        assert untold == []
