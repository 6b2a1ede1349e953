"""Real connections: how many, how long they may send nothing, how they end, and what their
requests' targets are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import uvicorn
from uvicorn.server import ServerState

from stepweave.api import connections, disconnect
from stepweave.api.connections import Connection, Connections
from tests.support.asgi import App, serving
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.anyio
GENERATIONS = "/v1/images/generations"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Client:
    """One connection of a client, which reads answers as they are sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: dict[str, str] = field(default_factory=dict)

    def send(
        self,
        target: str,
        *lines: str,
        method: str = "GET",
        body: bytes = b"",
        host: str = "localhost",
    ) -> None:
        length = [f"Content-Length: {len(body)}"] if body else []
        head = "\r\n".join(
            [f"{method} {target} HTTP/1.1", f"Host: {host}", *length, *lines, "", ""]
        )
        self.writer.write(head.encode() + body)

    def post(self, **fields: Any) -> None:
        body = json.dumps({"prompt": "a", "num_inference_steps": 1, "seed": 1} | fields).encode()
        self.send(GENERATIONS, "Content-Type: application/json", method="POST", body=body)

    async def answer(self) -> tuple[int, bytes]:
        """The next answer's status and body, of a length that its head tells."""
        async with asyncio.timeout(SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            self.head = {
                name.lower(): value
                for name, _, value in (line.partition(": ") for line in head[1:-2])
            }
            return int(head[0].split()[1]), await self.reader.readexactly(
                int(self.head["content-length"])
            )

    async def ended(self) -> bytes:
        """What is left until the server ends the connection."""
        async with asyncio.timeout(SECONDS):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


@dataclass
class Port:
    """A server's own port."""

    app: App
    open: Connections
    state: ServerState
    address: tuple[str, int]
    clients: list[Client] = field(default_factory=list)
    seen: list[Connection] = field(default_factory=list)

    async def connect(self) -> Client:
        """A connection that the server has seen."""
        client = Client(*await asyncio.open_connection(*self.address))
        self.clients.append(client)
        own = client.writer.get_extra_info("sockname")
        await self.app.until(lambda: own in {one.client for one in self.seen})
        return client


@contextlib.asynccontextmanager
async def listening(
    limit: int = 100, sent_bytes: int | None = None, **settings: Any
) -> AsyncIterator[Port]:
    """`sent_bytes` are those that the kernel takes of what is sent, but for some."""
    async with serving(**settings) as app:
        loop, state, held = asyncio.get_running_loop(), ServerState(), Connections(limit)
        app.server.leaving.listeners.append(held.close_idle)
        config = uvicorn.Config(app.asgi, log_config=None, access_log=False)
        config.load()
        with socket.socket() as own:
            if sent_bytes is not None:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sent_bytes)
            own.bind(("127.0.0.1", 0))
            port = Port(app, held, state, own.getsockname())

            def begin() -> Connection:
                port.seen.append(Connection(held, config, state, {}))
                return port.seen[-1]

            server = await loop.create_server(begin, sock=own)
            try:
                yield port
            finally:
                held.close_idle(False)
                for client in port.clients:
                    client.writer.close()
                server.close()
                for connection in list(state.connections):
                    connection.transport.abort()
                await app.until(lambda: not state.connections)
                await app.until(lambda: not state.tasks)


# --- how long ---


@pytest.mark.parametrize(
    "sent", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: b\r\n"]
)
async def test_a_connection_without_a_whole_head_is_closed(sent: bytes) -> None:
    with patch.object(connections, "HEAD_SECONDS", 0.3):
        async with listening() as port:
            client = await port.connect()
            client.writer.write(sent)
            assert await client.ended() == b""
            await port.app.until(lambda: not port.state.connections)


async def test_a_head_that_comes_drop_by_drop_has_no_more_time_than_another() -> None:
    with patch.object(connections, "HEAD_SECONDS", 0.5):
        async with listening() as port:
            client = await port.connect()

            async def drip() -> None:
                client.writer.write(b"GET /livez HTTP/1.1\r\nX-A: ")
                while True:
                    client.writer.write(b"a")
                    await asyncio.sleep(0.02)

            dripping = asyncio.ensure_future(drip())
            assert await client.ended() == b""
            dripping.cancel()


async def test_so_has_the_head_of_a_later_request_and_none_while_an_image_is_made() -> None:
    with patch.object(connections, "HEAD_SECONDS", 0.3):
        async with listening() as port:
            client = await port.connect()
            port.app.record.pause = 0.4  # each step takes longer than a head may
            client.post(num_inference_steps=2)
            assert (await client.answer())[0] == 200
            client.writer.write(b"GET /li")
            assert await client.ended() == b""


async def test_a_kept_connection_has_longer_between_two_requests_than_for_a_head() -> None:
    with patch.object(connections, "HEAD_SECONDS", 0.2):
        async with listening() as port:
            client = await port.connect()
            for _ in range(3):
                client.send("/livez")
                assert (await client.answer())[0] == 200
                await asyncio.sleep(0.4)
            assert len(port.state.connections) == 1


async def test_a_body_that_comes_too_slowly_is_not_waited_for() -> None:
    with (
        patch.object(disconnect, "STALLED_SECONDS", 0.5),
        patch.object(disconnect, "LEAST_BYTES", 1000),
    ):
        async with listening() as port:
            client = await port.connect()
            client.send(
                GENERATIONS,
                "Content-Type: application/json",
                "Content-Length: 100000",
                method="POST",
            )

            async def drip() -> None:
                while True:
                    client.writer.write(b" ")
                    await asyncio.sleep(0.02)

            dripping = asyncio.ensure_future(drip())
            status, body = await client.answer()
            assert (status, json.loads(body)["error"]["code"]) == (499, "cancelled")
            assert "1000 bytes a second" in json.loads(body)["error"]["message"]
            dripping.cancel()


async def test_the_rest_of_a_body_that_was_answered_leaves_the_connection_its_time() -> None:
    with patch.object(connections, "HEAD_SECONDS", 0.4):
        async with listening() as port:
            client = await port.connect()
            client.send("/livez", "Content-Length: 6", method="GET")
            assert (await client.answer())[0] == 200
            for part in (b"abc", b"def"):
                await asyncio.sleep(0.1)
                client.writer.write(part)
            await asyncio.sleep(0.8)
            client.send("/livez")
            assert (await client.answer())[0] == 200
            assert len(port.state.connections) == 1


# --- how many ---


async def test_a_connection_too_many_takes_the_place_of_the_one_idle_for_longest() -> None:
    with patch.object(connections, "IDLE_SECONDS", 0.0):
        async with listening(limit=2) as port:
            first, second = await port.connect(), await port.connect()
            second.send("/livez")
            await second.answer()
            first.send("/livez")  # it is the last one that was used
            await first.answer()
            third = await port.connect()
            assert await second.ended() == b""
            for one in (first, third):
                one.send("/livez")
                assert (await one.answer())[0] == 200


async def test_if_none_is_idle_it_is_refused_but_for_probes() -> None:
    async with listening(limit=2) as port:
        port.app.record.gated = True
        busy = [await port.connect(), await port.connect()]
        for one in busy:
            one.post()
        await port.app.until(lambda: port.app.server.engine and len(port.app.server.active) == 2)
        probe = await port.connect()
        probe.send("/readyz")
        assert (await probe.answer())[0] == 200
        assert probe.head["connection"] == "close"
        assert await probe.ended() == b""
        one_more = await port.connect()
        one_more.post()
        status, body = await one_more.answer()
        error = json.loads(body)["error"]
        assert (status, error["code"], error["type"]) == (
            503,
            "too_many_connections",
            "unavailable",
        )
        assert "the limit is 2" in error["message"]
        assert one_more.head["retry-after"] == "1"
        assert await one_more.ended() == b""
        port.app.record.release.set()
        for one in busy:
            assert (await one.answer())[0] == 200
        free = await port.connect()
        with patch.object(connections, "IDLE_SECONDS", 0.0):
            free = await port.connect()
        free.post()
        assert (await free.answer())[0] == 200


async def test_a_crowd_is_refused_without_being_read() -> None:
    with patch.object(connections, "RESERVE", 2):
        async with listening(limit=1) as port:
            crowd = [await port.connect() for _ in range(8)]
            status, body = await crowd[-1].answer()
            assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
            assert await crowd[-1].ended() == b""
            await port.app.until(lambda: len(port.state.connections) <= 4)


async def test_heads_that_are_not_whole_keep_no_probe_out() -> None:
    with patch.object(connections, "IDLE_SECONDS", 0.0):
        async with listening(limit=3) as port:
            crowd = [await port.connect() for _ in range(6)]
            for one in crowd[3:]:
                one.writer.write(b"GET /livez HTTP/1.1\r\nHost")
            await port.app.until(
                lambda: sum(bool(one.conn.trailing_data[0]) for one in port.seen) == 3
            )
            probe = await port.connect()
            probe.send("/livez")
            assert (await probe.answer())[0] == 200
            assert await crowd[3].ended() == b""


async def test_answers_that_nobody_reads_are_bounded_over_all() -> None:
    with (
        patch.object(connections, "UNREAD_BYTES", 1_500_000),
        patch.object(disconnect, "STALLED_SECONDS", 9 * SECONDS),
    ):
        async with listening(sent_bytes=4096) as port:
            for _ in range(3):
                with socket.socket() as own:
                    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    own.connect(port.address)
                    client = Client(*await asyncio.open_connection(sock=own.dup(), limit=1024))
                port.clients.append(client)
                client.post(size="512x512")  # a megabyte
                await port.app.until(
                    lambda: port.open.unread or len(port.state.connections) < len(port.clients)
                )
            await port.app.until(lambda: len(port.state.connections) == 1)
            assert port.open.unread <= 1_500_000


async def test_one_that_has_an_answer_to_read_is_neither_idle_nor_forgotten() -> None:
    with (
        patch.object(connections, "IDLE_SECONDS", 0.0),
        patch.object(disconnect, "STALLED_SECONDS", 9 * SECONDS),
    ):
        async with listening(limit=2, sent_bytes=4096) as port:
            with socket.socket() as own:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                own.connect(port.address)
                reading = Client(*await asyncio.open_connection(sock=own.dup(), limit=1024))
            port.clients.append(reading)
            reading.post(size="512x512")
            await port.app.until(lambda: port.open.unread > 100_000)
            idle = await port.connect()
            await port.connect()
            assert await idle.ended() == b""
            assert port.open.unread > 100_000
            assert {
                one for one in port.seen if one.transport.get_write_buffer_size()
            } <= port.open._open


# --- how they end ---


async def test_a_drain_closes_idle_connections_and_answers_the_others() -> None:
    async with listening(drain_notice=SECONDS) as port:
        idle, new, busy = [await port.connect() for _ in range(3)]
        idle.send("/livez")
        await idle.answer()
        port.app.record.gated = True
        busy.post()
        await port.app.until(lambda: port.app.server.active)
        await port.app.drain()
        assert await idle.ended() == b""
        assert await new.ended() == b""
        later = await port.connect()
        port.app.record.release.set()
        for one in (busy, later):
            if one is later:
                one.post()
            assert (await one.answer())[0] == 200
            assert one.head["connection"] == "close"
            assert await one.ended() == b""


async def test_a_drain_that_is_taken_back_closes_no_more() -> None:
    with (
        patch.object(connections, "IDLE_SECONDS", 0.2),
        patch.object(connections, "LOOK_SECONDS", 0.05),
    ):
        async with listening() as port:
            await port.app.drain()
            first = await port.connect()
            assert await first.ended() == b""
            await port.app.drain("DELETE")
            kept = await port.connect()
            await asyncio.sleep(0.5)
            kept.send("/livez")
            assert (await kept.answer())[0] == 200


async def test_a_client_that_still_sends_its_body_reads_why_it_is_refused() -> None:
    async with listening(drain_notice=0) as port:
        await port.app.drain()
        body = b"x" * 8_000_000  # more than the kernel holds
        for path in ("/v1/images/edits", GENERATIONS):
            client = await port.connect()
            kind = (
                "multipart/form-data; boundary=x" if path.endswith("edits") else "application/json"
            )
            client.send(path, f"Content-Type: {kind}", method="POST", body=body)
            status, answer = await client.answer()
            assert status in (413, 503), answer
            async with asyncio.timeout(SECONDS):
                await client.writer.drain()  # all of it was taken
            client.writer.close()
        await port.app.until(lambda: not port.state.connections)


async def test_a_slow_upload_that_is_refused_in_a_drain_has_its_time_to_read_why() -> None:
    with (
        patch.object(connections, "IDLE_SECONDS", 0.5),
        patch.object(connections, "LOOK_SECONDS", 0.02),
    ):
        async with listening(drain_notice=0) as port:
            await port.app.drain()
            client = await port.connect()
            kind, length = (
                "Content-Type: multipart/form-data; boundary=x",
                "Content-Length: 9999999",
            )
            client.send("/v1/images/edits", kind, length, method="POST")
            await port.app.until(lambda: port.seen[-1].lingers)
            for _ in range(50):
                client.writer.write(b"x" * 1000)
                await client.writer.drain()
                await asyncio.sleep(0.02)
            assert (await client.answer())[0] == 503


async def test_a_client_that_never_ends_its_body_is_not_read_for_ever() -> None:
    with patch.object(connections, "LINGER_SECONDS", 0.3):
        async with listening(drain_notice=0) as port:
            await port.app.drain()
            client = await port.connect()
            client.send(
                "/v1/images/edits",
                "Content-Type: multipart/form-data; boundary=x",
                "Content-Length: 9999",
                method="POST",
            )
            assert (await client.answer())[0] == 503
            assert await client.ended() == b""
            await port.app.until(lambda: not port.state.connections)


# --- what is asked for ---


@pytest.mark.parametrize(
    "target",
    ["http://localhost/livez", "HTTP://other.test:81/livez", "https://localhost/livez?a=b"],
)
async def test_the_absolute_form_is_served(target: str) -> None:
    async with listening() as port:
        client = await port.connect()
        client.send(target, host="evil.test")
        assert (await client.answer())[0] == 200


async def test_the_absolute_form_names_the_host() -> None:
    async with listening() as port:
        for target, host, expected in (
            (f"http://localhost{GENERATIONS}", "evil.test", 200),
            (f"http://evil.test{GENERATIONS}", "localhost", 400),
        ):
            client = await port.connect()
            body = json.dumps(
                {"prompt": "a", "num_inference_steps": 1, "response_format": "url"}
            ).encode()
            client.send(
                target, "Content-Type: application/json", method="POST", body=body, host=host
            )
            status, answer = await client.answer()
            assert status == expected, answer
            if status == 200:
                assert json.loads(answer)["data"][0]["url"].startswith("http://localhost/images/")


@pytest.mark.parametrize(
    ("method", "target", "status", "code"),
    [
        ("OPTIONS", "*", 200, None),
        ("GET", "*", 400, "invalid_target"),
        ("CONNECT", "localhost:80", 400, "invalid_target"),
        ("GET", "http://user@localhost/livez", 400, "invalid_target"),
        ("GET", "ftp://localhost/livez", 400, "invalid_target"),
        ("GET", "http://localhost", 200, None),
        ("GET", "/livez/", 200, None),
        ("GET", "/v1/models/", 200, None),
        ("GET", "//evil.test/livez", 404, "not_found"),
        ("GET", "/nope/", 404, "not_found"),
    ],
)
async def test_targets(method: str, target: str, status: int, code: str | None) -> None:
    async with listening() as port:
        client = await port.connect()
        client.send(target, method=method, host="evil.test")
        found, body = await client.answer()
        assert found == status, body
        if code is not None:
            assert json.loads(body)["error"]["code"] == code
        if target == "*" and status == 200:
            assert client.head["allow"] == "GET, POST, DELETE, HEAD, OPTIONS"
        assert "location" not in client.head


@pytest.mark.parametrize("size", ["0", "5"])
async def test_two_lengths_close_the_connection(size: str) -> None:
    async with listening() as port:
        client = await port.connect()
        lines = (f"Content-Length: {size}", "Transfer-Encoding: chunked")
        client.send(GENERATIONS, "Content-Type: application/json", *lines, method="POST")
        client.writer.write(
            b"0\r\n\r\nGET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
        )  # what one of them takes for a request of its own
        status, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "ambiguous_length")
        assert client.head["connection"] == "close"
        assert await client.ended() == b""


async def test_a_chunk_that_is_none_is_counted_as_it_is_answered() -> None:
    async with listening() as port:
        client = await port.connect()
        client.send(
            GENERATIONS,
            "Content-Type: application/json",
            "Transfer-Encoding: chunked",
            method="POST",
        )
        client.writer.write(b"2\r\n{}\r\nno chunk\r\n")
        status, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
        await port.app.until(lambda: port.app.outcomes() == {"invalid": 1})


async def test_what_is_no_http_has_the_contracts_error() -> None:
    async with listening() as port:
        client = await port.connect()
        client.writer.write(b"\x16\x03\x01\r\n\r\n")
        status, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
        assert await client.ended() == b""
