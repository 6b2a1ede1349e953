"""Server-sent events, and clients that leave, on a fake pipeline."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from PIL import Image

from stepweave.serving.request import ActiveRequest
from stepweave.serving.server import Server
from tests.support.asgi import App, Exchange, serving
from tests.support.bodies import natively
from tests.support.served import Served, metric
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.anyio

STREAM = {"Accept": "text/event-stream"}
VERBOSE = {"Accept": "text/event-stream; profile=stepweave"}
KEY = {"Idempotency-Key": "k"}
COMPLETED = "image_generation.completed"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def positions(exchange: Exchange) -> list[int]:
    return [event.data["position"] for event in exchange.events if event.name == "stepweave.queued"]


def steps(exchange: Exchange) -> list[int]:
    return [event.data["step"] for event in exchange.events if event.name == "stepweave.progress"]


def comments(exchange: Exchange) -> int:
    return exchange.content.count(b": still here\n\n")


# --- what is told ---


@pytest.mark.parametrize(
    "asked",
    [
        {"stream": True},
        {"headers": STREAM},
        {"stream": True, "headers": {"Accept": "application/json"}},
    ],
)
async def test_only_openais_events_are_told_unless_others_are_asked_for(
    asked: dict[str, Any],
) -> None:
    async with serving() as app:
        answer = await app.post(**asked, n=2, seed=5, output_format="webp").done()
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == (
            "no-store",
            "no",
        )
        assert answer.names == [COMPLETED, COMPLETED]
        plain = (await app.post(n=2, seed=5, output_format="webp").done()).json()
        for i, event in enumerate(answer.events):
            assert event.data["type"] == COMPLETED
            assert event.data["b64_json"] == plain["data"][i]["b64_json"]
            assert (event.data["image_index"], event.data["seed"], event.data["output_format"]) == (
                i,
                5 + i,
                "webp",
            )
            assert event.data["parameters"] == plain["parameters"]
            assert event.data["usage"] == plain["usage"]
        assert app.outcomes() == {"succeeded": 2}


@pytest.mark.parametrize("asked", [{"stream": True, "events": "all"}, {"headers": VERBOSE}])
async def test_all_events_in_their_order(asked: dict[str, Any]) -> None:
    async with serving() as app:
        app.record.gated = True
        answer = app.post(**asked, num_inference_steps=20)
        await answer.until(steps)
        for step in (1, 2, 3):
            app.record.allow(1)
            await answer.until(lambda one, step=step: step in steps(one))
        app.record.release.set()
        await answer.done()
        assert answer.names[-1] == COMPLETED
        told = steps(answer)
        assert told[0] == 0
        assert told == sorted(set(told))
        assert len(told) > 3
        assert all(
            event.data["total_steps"] == 20
            for event in answer.events
            if event.name == "stepweave.progress"
        )
        assert {event.data.get("id") for event in answer.events[:-1]} == {
            answer.headers["x-stepweave-job"]
        }
        assert answer.names.index("stepweave.progress") >= len(positions(answer)), (
            "the queue comes first"
        )


async def test_urls_in_a_stream() -> None:
    async with serving() as app:
        answer = await app.post(stream=True, response_format="url").done()
        data = answer.events[0].data
        assert data["b64_json"], "as OpenAI's type requires"
        assert (await app.get(data["url"].removeprefix("http://localhost:3000"))).status == 200


async def test_the_place_in_the_queue_is_told_when_it_changes() -> None:
    async with serving() as app:
        app.record.gated = True
        first = app.post()
        await app.until(lambda: app.record.running)
        second, third = (app.post(headers=VERBOSE, num_inference_steps=1) for _ in range(2))
        with patch("stepweave.serving.request.PLACE_SECONDS", 0.005):
            await third.until(positions)
            assert positions(third) == [2]
            await second.leave()
            await third.until(lambda one: positions(one) == [2, 1])
            app.record.release.set()
            await third.done()
        assert steps(third)[-1] == 1
        assert (await first.done()).status == 200


async def test_the_first_event_comes_at_once() -> None:
    async with serving() as app:
        app.record.gated = True
        with (
            patch("stepweave.serving.request.PLACE_SECONDS", 2 * SECONDS),
            patch("stepweave.serving.request.SILENT_SECONDS", 2 * SECONDS),
        ):
            for _ in range(3):
                answer = app.post(headers=VERBOSE)
                await answer.until(lambda one: one.events)
            app.record.release.set()
            await app.idle()


async def test_silence_is_broken_by_comments() -> None:
    async with serving() as app:
        app.record.gated = True
        with patch("stepweave.serving.request.SILENT_SECONDS", 0.03):
            streams = [app.post(stream=True) for _ in range(2)] + [app.post(headers=VERBOSE)]
            for one in streams:
                await one.until(lambda one: comments(one) >= 2)
                assert comments(one) <= (one.times[-1] - one.began) / 0.03, (
                    "no more than one in that time"
                )
            app.record.release.set()
            for one in streams:
                assert (await one.done()).names[-1] == COMPLETED


async def test_steps_that_a_client_is_not_told_of_do_not_keep_it_waiting() -> None:
    """A proxy sees bytes only."""
    async with serving() as app:
        app.record.pause = 0.01
        with patch("stepweave.serving.request.SILENT_SECONDS", 0.05):
            answer = app.post(stream=True, num_inference_steps=200)
            await answer.until(lambda one: comments(one) >= 3)
            assert app.record.steps_run < 200, "while steps are run"
            app.record.pause = 0.0
            await answer.done()
        assert answer.names == [COMPLETED]
        assert comments(answer) <= (answer.times[-1] - answer.began) / 0.05


@pytest.mark.parametrize(
    "prompt",
    [
        "a\r\n\r\nevent: error\ndata: {}\n\n",
        "a\rb\x0bc\x0cd\x85e\u2028f\u2029g",
        "data: x",
        ': "\\u0000" </script> \ufeff 🔴 é',
        "\x01\x1b[31m\x7f",
    ],
)
async def test_no_prompt_breaks_the_format(prompt: str) -> None:
    async with serving() as app:
        answer = await app.post(headers=VERBOSE, prompt=prompt).done()
        assert answer.events[-1].name == COMPLETED
        assert answer.events[-1].data["parameters"]["prompt"] == prompt
        assert answer.content.isascii()
        assert not set(answer.content) & set(b"\r\x0b\x0c\x1b\x7f")


class Previewer:
    """Stands in for the one that reads latents: here they are a colour and seconds."""

    def image(self, latents: tuple[int, float], width: int, height: int, row: int) -> Image.Image:
        colour, seconds = latents
        time.sleep(seconds)
        return Image.new("RGB", (8, 8), (colour, row, 0))


def colours(exchange: Exchange) -> list[tuple[int, int, bytes]]:
    return [
        (
            event.data["partial_image_index"],
            event.data["image_index"],
            base64.b64decode(event.data["b64_json"]),
        )
        for event in exchange.events
        if event.name == "image_generation.partial_image"
    ]


async def test_all_followers_see_all_previews_in_their_order() -> None:
    async with serving() as app:
        app.server.previewer = Previewer()  # type: ignore[assignment]
        app.record.gated = True
        first = app.post(headers=KEY, stream=True, partial_images=3, n=2)
        await first.until(lambda one: one.messages)
        [ticket] = app.server.active.values()
        assert [step for step in range(1, 5) if ticket.wants(step, 4)] == [1, 2, 3]
        second = app.post(headers=KEY, stream=True, partial_images=3, n=2)
        for latents in ((10, 0.05), (20, 0.0), (30, 0.0)):  # the first takes the longest
            await asyncio.to_thread(ticket.denoised, ticket.job, latents)
        await second.until(lambda one: len(colours(one)) == 6)
        late = app.send("GET", f"/v1/jobs/{ticket.id}/events")
        await late.until(lambda one: len(colours(one)) == 6)
        app.record.release.set()
        told = [colours(await one.done()) for one in (first, second, late)]
        assert told[0] == told[1] == told[2]
        assert [(number, image) for number, image, _ in told[0]] == [
            (i, j) for i in range(3) for j in range(2)
        ]
        assert len({data for _, _, data in told[0]}) == 6
        assert first.events[-2:] == second.events[-2:]


async def test_a_preview_that_fails_costs_no_image(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as app:
        app.server.previewer = Previewer()  # type: ignore[assignment]
        app.record.gated = True
        answer = app.post(stream=True, partial_images=2)
        await answer.until(lambda one: one.messages)
        [ticket] = app.server.active.values()
        for latents in ("no colour", (20, 0.0)):
            await asyncio.to_thread(ticket.denoised, ticket.job, latents)  # type: ignore[arg-type]
        app.record.release.set()
        await answer.done()
        assert answer.names == ["image_generation.partial_image", COMPLETED]
        assert "a preview failed" in caplog.text


async def test_a_slow_client_is_told_less_and_not_kept_in_memory() -> None:
    async with serving() as app:
        app.server.previewer = Previewer()  # type: ignore[assignment]
        app.record.gated = True
        slow = app.post(headers=VERBOSE, num_inference_steps=100, partial_images=3)
        await slow.until(lambda one: steps(one))
        [ticket] = app.server.active.values()
        slow.reads.clear()
        before = len(slow.events)
        for colour in (1, 2, 3):
            await asyncio.to_thread(ticket.denoised, ticket.job, (colour, 0.0))  # type: ignore[arg-type]
        app.record.pause = 0.001
        app.record.release.set()
        await app.until(lambda: ticket.done)
        assert app.record.steps_run == 100, "it holds up nobody"
        slow.reads.set()
        await slow.done()
        assert len(colours(slow)) == 3
        assert slow.names[-1] == COMPLETED
        assert len(slow.events) - before <= 6


# --- errors ---


async def test_what_goes_wrong_before_the_stream_has_its_own_status() -> None:
    async with serving(max_queue=0) as app:
        app.record.gated = True
        first = app.post()
        await app.until(lambda: app.server.active)
        for answer, status in (
            (app.post(stream=True), 429),
            (app.post(headers=STREAM, size="65x65"), 400),
            (app.post(stream=True, model="other"), 404),
            (app.post(headers=VERBOSE, num_inference_steps=0), 400),
        ):
            await answer.done()
            assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
            assert answer.error["message"]
        app.record.release.set()
        await first.done()


async def test_what_goes_wrong_later_is_an_event_that_clients_raise() -> None:
    async with serving() as app:
        app.record.error = RuntimeError("secret detail")
        failed = await app.post(stream=True).done()
        assert (failed.status, failed.names) == (200, ["error"])
        assert set(failed.events[0].data) == {"error"}
        assert set(failed.events[0].data["error"]) == {"message", "type", "code", "param"}
        assert failed.headers["x-request-id"] in failed.events[0].data["error"]["message"]
        assert b"secret" not in failed.content
        app.record.error = None
        app.record.pause = 0.02
        late = await app.post(stream=True, deadline_ms=30, num_inference_steps=50).done()
        assert late.events[-1].data["error"]["code"] == "deadline_exceeded"
        assert app.outcomes() == {"failed": 1, "late": 1}


async def test_a_stream_whose_job_is_deleted_says_so() -> None:
    async with serving() as app:
        app.record.gated = True
        answer = app.post(headers=VERBOSE, num_inference_steps=100)
        app.record.allow(2)
        await answer.until(lambda one: 2 in steps(one))
        id = answer.headers["x-stepweave-job"]
        assert (await app.job(id))["state"] == "running"
        deleted = app.send("DELETE", f"/v1/jobs/{id}")
        await app.told_to_end()
        app.record.release.set()
        assert (await deleted.done()).json()["state"] == "cancelled"
        await answer.done()
        assert answer.events[-1].data == {
            "error": {
                "message": "The job was cancelled.",
                "type": "cancelled",
                "code": "cancelled",
                "param": None,
            }
        }
        assert (await app.get(f"/v1/jobs/{id}")).status == 404, (
            "only what is asked for later is kept"
        )


# --- clients that leave ---


class NativeApp(App):
    """The native APIs as the service has them, without BentoML around them."""

    def __init__(self, app: App) -> None:
        super().__init__(app.server, app.record)
        natively(self)


Send = Callable[[App], Exchange]
WAYS: dict[str, Send] = {
    "json": lambda app: app.post(num_inference_steps=100),
    "json with a key": lambda app: app.post(headers=KEY, num_inference_steps=100),
    "image": lambda app: app.post(headers={"Accept": "image/png"}, num_inference_steps=100),
    "stream": lambda app: app.post(stream=True, num_inference_steps=100),
    "stream of all events": lambda app: app.post(headers=VERBOSE, num_inference_steps=100),
    "native": lambda app: NativeApp(app).post("/generate", num_inference_steps=100),
    "native stream": lambda app: NativeApp(app).post("/generate_stream", num_inference_steps=100),
    "legacy": lambda app: app.send(
        "POST",
        "/api/diffusers/inference",
        b'{"prompt": "a", "num_inference_steps": 100}',
        {"Content-Type": "application/json"},
    ),
}
every_way = pytest.mark.parametrize("send", WAYS.values(), ids=WAYS.keys())


@every_way
async def test_a_job_ends_at_the_next_step_after_its_client_has_left(send: Send) -> None:
    async with serving() as app:
        app.record.gated = True
        exchange = send(app)
        app.record.allow(3)
        await app.until(lambda: app.record.held_after(3))
        await app.leave(exchange)
        await app.idle()
        assert app.record.steps_run == 4
        assert app.metric("stepweave_steps_saved_total") == 96
        assert app.outcomes() == {"cancelled": 1}


@every_way
async def test_a_client_that_leaves_while_it_waits_is_forgotten(send: Send) -> None:
    async with serving() as app:
        app.record.gated = True
        first = app.post()
        await app.until(lambda: app.record.running)
        calls = len(app.record.calls)
        exchange = send(app)
        await app.until(lambda: len(app.server.active) == 2)
        await exchange.leave()
        await app.until(lambda: len(app.server.active) == 1)
        app.record.release.set()
        await first.done()
        await app.idle()
        assert len(app.record.calls) == calls
        assert app.outcomes() == {"cancelled": 1, "succeeded": 1}


@every_way
async def test_a_client_that_leaves_while_it_is_accepted_is_forgotten(send: Send) -> None:
    accept, entered, gate, ended = Server.accept, asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(server: Server, *args: Any, **kwargs: Any) -> ActiveRequest:
        entered.set()
        try:
            await gate.wait()
            return await accept(server, *args, **kwargs)
        finally:
            ended.set()

    async with serving() as app:
        app.record.gated = True
        with patch.object(Server, "accept", slow):
            exchange = send(app)
            await entered.wait()
            leaving = asyncio.ensure_future(exchange.leave())
            await asyncio.sleep(0.01)  # it may be noticed meanwhile, or later
            gate.set()
            await ended.wait()
            await app.told_to_end()
            app.record.release.set()
            await leaving
        await app.idle()
        assert app.record.steps_run <= 1, "of 100"


@every_way
async def test_who_reads_to_the_end_gets_it(send: Send) -> None:
    """So that what is tested above is the leaving."""
    async with serving() as app:
        answer = await send(app).done()
        assert answer.status == 200
        assert app.record.steps_run == 100
        assert app.outcomes() == {"succeeded": 1}


async def test_a_connection_that_breaks_before_the_first_byte_ends_the_job() -> None:
    async with serving() as app:
        app.record.gated = True
        answer = app.post(stream=True, num_inference_steps=200)

        async def broken(message: Any) -> None:
            raise OSError("broken pipe")

        answer._send = broken  # type: ignore[method-assign]
        await app.until(lambda: app.server.active or app.outcomes())  # it may be over soon
        await app.told_to_end()
        app.record.release.set()
        await answer.done()
        await app.until(lambda: not app.server.active)
        assert app.record.steps_run <= 1
        assert app.outcomes() == {"cancelled": 1}


async def test_a_stream_can_be_left_while_its_client_reads_nothing() -> None:
    async with serving() as app:
        app.record.gated = True
        answer = app.post(headers=VERBOSE, num_inference_steps=200)
        await answer.until(steps)
        answer.reads.clear()
        app.record.allow(3)
        await app.until(lambda: app.record.held_after(3))
        await asyncio.sleep(0.02)  # it may be told of them meanwhile, which it does not read
        await app.leave(answer)
        await app.until(lambda: not app.server.active)
        assert app.record.steps_run == 4


def test_leaving_a_native_stream_of_a_real_server(served: Served) -> None:
    def in_flight() -> bool:
        return metric(served.url, "stepweave_requests_in_flight") != 0

    body = {
        "prompt": "a red circle",
        "num_inference_steps": 200,
        "size": "256x256",
        "events": "all",
    }
    with httpx.stream(
        "POST", f"{served.url}/generate_stream", json=body, timeout=SECONDS
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()  # held on to: its end would close the connection
        for line in lines:
            if line.startswith("data: ") and json.loads(line[6:]).get("step", 0) > 1:
                break
        assert in_flight()
    wait_until(lambda: not in_flight())
    line = r"POST /generate_stream 499 \d+ ms, request " + answer.headers["x-request-id"]
    wait_until(lambda: re.search(line, served.log.read_text()))
