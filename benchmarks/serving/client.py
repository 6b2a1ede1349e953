"""The clients, on one event loop: an open loop of arrivals, and a closed loop of clients that wait
for answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import httpx

from benchmarks.locust.schedule import Kind
from benchmarks.serving.mix import IMAGE, Request

PATH = "/v1/images/generations"
CHECK_SECONDS = 0.5  # between two checks that the server is alive

Status = Literal["answered", "refused", "missed", "failed", "unfinished"]


class BenchmarkError(Exception):
    """The benchmark cannot go on."""


@dataclass(frozen=True)
class Attempt:
    """A request sent once: `began` in seconds from the start of the run, `seconds` until the
    answer."""

    status: Status
    began: float
    seconds: float
    code: str = ""  # of the error answer, or a description of the failure
    retry_after: float | None = None


@dataclass
class Outcome:
    """The attempts of a request: several if it was refused and sent again."""

    request: Request
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def status(self) -> Status:
        return self.attempts[-1].status if self.attempts else "unfinished"

    @property
    def finish(self) -> float:
        """Seconds from the start of the run to the last answer."""
        return self.attempts[-1].began + self.attempts[-1].seconds

    @property
    def latency(self) -> float | None:
        """Seconds from the scheduled arrival to the image."""
        return self.finish - self.request.offset if self.status == "answered" else None

    @property
    def lag(self) -> float:
        """Seconds by which the client sent it late."""
        return self.attempts[0].began - self.request.offset if self.attempts else 0.0

    @property
    def on_time(self) -> bool:
        """Answered with an image, within the deadline if it has one."""
        deadline = self.request.deadline
        return self.latency is not None and (deadline is None or self.latency <= deadline)


@contextlib.asynccontextmanager
async def connect(
    url: str, seconds: float, transport: httpx.AsyncBaseTransport | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a new connection for each request and a timeout of `seconds`."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(
        base_url=url,
        timeout=seconds,
        limits=limits,
        headers=headers,
        transport=transport,
        trust_env=False,
    ) as client:
        yield client


async def send(client: httpx.AsyncClient, body: bytes, start: float) -> Attempt:
    """Post a body; returns the result."""
    began = time.perf_counter()
    code, retry_after = "", None
    status: Status = "failed"
    try:
        response = await client.post(PATH, content=body)
    except httpx.TransportError as error:
        code = type(error).__name__
    else:
        if response.status_code == 200:
            status = "answered" if IMAGE in response.content else "failed"
            code = "" if status == "answered" else "HTTP 200 without an image"
        else:
            code = _code(response)
            if response.status_code == 429:
                status = "refused"
                retry_after = (
                    float(response.headers["Retry-After"])
                    if "Retry-After" in response.headers
                    else None
                )
            elif code == "deadline_too_short":
                status = "refused"
            elif response.status_code == 504:
                status = "missed"
            else:
                code = f"HTTP {response.status_code} {code}"
    return Attempt(status, began - start, time.perf_counter() - began, code, retry_after)


# like `send`: the client, the body, and the time when the run started
Post = Callable[[httpx.AsyncClient, bytes, float], Awaitable[Attempt]]


async def offer(
    client: httpx.AsyncClient,
    requests: Sequence[Request],
    check: Callable[[], None],
    *,
    drain: float,
    returns: int = 0,
    post: Post = send,
) -> list[Outcome]:
    """Send each request when it is due, independently of the others, and wait for the answers.

    Args:
        check: raises if the server has ended.
        drain: seconds after the last arrival, when requests without an answer are aborted, as
            unfinished.
        returns: how often a refused client waits for `Retry-After` and sends the same body again.
        post: sends a body and reads the answer.
    """
    outcomes = [Outcome(request) for request in requests]
    pending: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    try:
        for outcome in outcomes:
            while (wait := start + outcome.request.offset - time.perf_counter()) > 0:
                await asyncio.sleep(min(wait, CHECK_SECONDS))
                check()
            pending.add(asyncio.create_task(_visit(client, outcome, start, returns, post)))
        until = time.perf_counter() + drain
        while pending and time.perf_counter() < until:
            done, pending = await asyncio.wait(pending, timeout=CHECK_SECONDS)
            for task in done:
                task.result()
            check()
    finally:
        await _cancel(pending)
    return outcomes


async def saturate(
    client: httpx.AsyncClient,
    requests: Iterator[Request],
    check: Callable[[], None],
    *,
    solo: Mapping[Kind, float],
    clients: int,
    ramp: float,
    seconds: float,
) -> float:
    """Throughput of a closed loop of clients in requests of the mix per second, measured after
    `ramp` seconds.

    Answers are weighted with the time of their kind alone, relative to the mean: policies that
    prefer short requests finish more of them at first, and would seem faster than they are. Raises
    BenchmarkError if a request is not answered with an image.
    """
    start = time.perf_counter()
    mean = sum(solo.values()) / len(solo)
    done_work = 0.0

    async def work() -> None:
        nonlocal done_work
        for request in requests:
            attempt = await send(client, request.body, start)
            require(attempt)
            if ramp <= attempt.began + attempt.seconds < ramp + seconds:
                done_work += solo[request.kind] / mean

    pending = {asyncio.create_task(work()) for _ in range(clients)}
    try:
        while pending and time.perf_counter() < start + ramp + seconds:
            done, pending = await asyncio.wait(pending, timeout=min(CHECK_SECONDS, ramp + seconds))
            check()
            for task in done:
                task.result()
    finally:
        await _cancel(pending)
    return done_work / seconds


def require(attempt: Attempt) -> None:
    """Raise BenchmarkError unless the answer is an image."""
    if attempt.status != "answered":
        raise BenchmarkError(
            f"a request that should be answered was {attempt.status}: {attempt.code}"
        )


async def _visit(
    client: httpx.AsyncClient, outcome: Outcome, start: float, returns: int, post: Post
) -> None:
    for left in range(returns, -1, -1):
        attempt = await post(client, outcome.request.body, start)
        outcome.attempts.append(attempt)
        if attempt.retry_after is None or not left:
            break
        await asyncio.sleep(attempt.retry_after)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _code(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{error['code']} ({error['param']})" if error["param"] else str(error["code"])
    except (ValueError, LookupError, TypeError):
        return "with an unexpected body"
