"""The contestants' servers: started when they are first needed, and suspended between their
turns, so that a server that polls takes no time from the one that is measured."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.ladder.client import Sender, open_loop
from benchmarks.ladder.contestants import Contestant, environment_of
from benchmarks.ladder.runs import CLIENTS
from benchmarks.ladder.scenarios import warm_up
from benchmarks.serving import first
from benchmarks.serving.client import BenchmarkError, connect
from benchmarks.serving.contestants import Served, free_port, launch
from benchmarks.serving.report import progress

ANSWER_SECONDS = 3600  # the runs have limits of their own
BURSTS = 2
MORE_BURSTS = 4  # of a Stepweave that has not certified all calls
WARM_UP_SECONDS = 300


@dataclass(frozen=True)
class Turn:
    """A server that runs: a client of it, a check that raises if it has ended, and the CPU seconds
    that its processes have used."""

    client: httpx.AsyncClient
    check: Callable[[], None] = lambda: None
    cpu: Callable[[], float | None] = lambda: None


class Fleet:
    """Use as a context: at its end all servers are stopped."""

    def __init__(self, out: Path, threads: int) -> None:
        self._out = out
        self._threads = threads
        self.temporary = (out / "temporary").resolve()
        self._servers: dict[str, Served] = {}
        self._warm: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            _resume(server)
        self._stack.close()

    @contextlib.asynccontextmanager
    async def turn(self, contestant: Contestant) -> AsyncIterator[Turn]:
        """The contestant's server, which runs while the context lasts. Raises BenchmarkError if it
        cannot be started or warmed up."""
        if contestant.url:
            async with connect(contestant.url, ANSWER_SECONDS) as client:
                yield await self._warm_up(contestant, Turn(client))
            return
        server = self._servers.get(contestant.name) or self._start(contestant)
        with _running(server):
            async with connect(server.url, ANSWER_SECONDS) as client:
                turn = Turn(client, server.check, lambda: _cpu(server))
                yield await self._warm_up(contestant, turn)

    def drop(self, contestant: Contestant) -> None:
        """Stop a server that has failed; its next turn starts it again."""
        self._warm.discard(contestant.name)
        if server := self._servers.pop(contestant.name, None):
            _resume(server)
            server.stop()

    def _start(self, contestant: Contestant) -> Served:
        progress(f"starting {contestant.name}")
        self.temporary.mkdir(parents=True, exist_ok=True)
        port = free_port()
        server = self._stack.enter_context(
            launch(
                contestant.name,
                [*contestant.command, str(port)],
                port,
                environment_of(contestant, self._threads, self.temporary),
                self._out / "logs",
                contestant.ready,
            )
        )
        self._servers[contestant.name] = server
        return server

    async def _warm_up(self, contestant: Contestant, turn: Turn) -> Turn:
        """Once in the life of a server, the same bursts for every contestant; more for a Stepweave
        that is still proving which calls it may batch."""
        if contestant.name in self._warm:
            return turn
        for burst in range(BURSTS + MORE_BURSTS * contestant.stepweave):
            outcomes = await open_loop(
                turn.client,
                warm_up(burst, CLIENTS),  # of each kind as many as share steps later
                turn.check,
                Sender(contestant),
                drain=WARM_UP_SECONDS,
            )
            for outcome in outcomes:
                if outcome.status != "answered":
                    code = outcome.attempts[-1].code if outcome.attempts else "no answer"
                    raise BenchmarkError(f"{contestant.name}: warm-up {outcome.status}: {code}")
            if contestant.stepweave and burst >= BURSTS - 1:
                known = first.Contestant(contestant.name, turn.client, turn.check)
                if not await first.unproven(known):
                    break
        self._warm.add(contestant.name)
        return turn


@contextlib.contextmanager
def _running(server: Served) -> Iterator[None]:
    _resume(server)
    try:
        yield
    finally:
        for process in _family(server):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()


def _resume(server: Served) -> None:
    for process in reversed(_family(server)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _family(server: Served) -> list[psutil.Process]:
    try:
        parent = psutil.Process(server.process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu(server: Served) -> float:
    """CPU seconds of the server's processes, all threads, since they started."""
    seconds = 0.0
    for process in _family(server):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds
