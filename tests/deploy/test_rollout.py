"""Two replicas that are restarted in turn, as a rolling update does, under load: nothing is
lost."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.environment import free_port
from tests.support.nginx import nginx
from tests.support.served import Served, serve
from tests.support.waiting import SECONDS

GENERATIONS = "/v1/images/generations"
LOAD = 0.7  # of what one replica makes while the other loads
REQUESTS = 300  # at least
CLIENTS = 24
EDITS = 4  # one request in so many is an edit
SEEDS = 12
PRE_STOP_SECONDS = 10  # from the announcement to SIGTERM, as in the manifests
CLOSE = 2  # of 255: shared steps differ from single ones in the last bits


def body_of(seed: int) -> dict[str, object]:
    colour = ("red", "green", "blue")[seed % 3]
    return {
        "prompt": f"a large {colour} circle on a white background",
        "seed": seed,
        "num_inference_steps": 6,
    }


def send(client: httpx.Client, url: str, seed: int, edits: bytes | None = None) -> httpx.Response:
    """A request for an image; of that seed, or an edit of `edits`."""
    if edits is None:
        return client.post(f"{url}{GENERATIONS}", json=body_of(seed))
    fields = {
        "prompt": "a large yellow circle on a blue background",
        "seed": str(seed),
        "num_inference_steps": "6",
    }
    return client.post(f"{url}/v1/images/edits", data=fields, files={"image": edits})


def image_of(answer: httpx.Response) -> np.ndarray:
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@dataclass
class Replica:
    """A server that is started again on its own port, with its own state."""

    folder: Path
    port: int = field(default_factory=free_port)
    starts: int = 0

    def start(self, exits: contextlib.ExitStack) -> Served:
        self.starts += 1
        self.folder.mkdir(exist_ok=True)
        settings = {"STEPWEAVE_STATE_DIR": str(self.folder / "state"), "STEPWEAVE_CPU_THREADS": "1"}
        return exits.enter_context(
            serve(self.folder / f"log-{self.starts}.txt", port=self.port, **settings)
        )

    def announce(self) -> None:
        """As a preStop hook does."""
        token = (self.folder / "state" / "drain-token").read_text()
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.post(f"{self.url}/drain", headers=headers, timeout=SECONDS).status_code == 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Clients:
    """Send requests at a rate, each when it is due, whatever became of those before; the images are
    compared with `expected`."""

    def __init__(
        self,
        where: Callable[[], str],
        expected: list[np.ndarray],
        edits: list[bytes | None],
        rate: float,
        keep: bool,
    ) -> None:
        self.sent = 0
        self.answered = 0
        self.connections = 0  # that were opened
        self.lost: list[str] = []
        self.late = 0.0  # seconds by which a request was sent after it was due, at most
        self._where = where
        self._expected = expected
        self._edits = edits  # by seed
        self._rate = rate
        self._keep = keep
        self._due: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=one) for one in (self._pace, *[self._work] * CLIENTS)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()

    def _pace(self) -> None:
        began = time.monotonic()
        for number in itertools.count():
            due = began + number / self._rate
            if self._ending.wait(max(0.0, due - time.monotonic())):
                break
            self._due.put((number, due))
            self.sent += 1
        for _ in range(CLIENTS):
            self._due.put(None)

    def _work(self) -> None:
        # kept for as long as the replica keeps it
        limits = httpx.Limits(
            max_keepalive_connections=10 if self._keep else 0, keepalive_expiry=None
        )
        with httpx.Client(
            timeout=SECONDS, limits=limits, event_hooks={"request": [self._trace]}
        ) as client:
            while (item := self._due.get()) is not None:
                number, due = item
                self.late = max(self.late, time.monotonic() - due)
                seed, where = number % SEEDS, self._where()
                try:
                    answer = send(client, where, seed, self._edits[seed])
                    if answer.status_code != 200:
                        self.lost.append(f"{where}: {answer.status_code} {answer.text[:200]}")
                    elif np.abs(image_of(answer) - self._expected[seed]).max() > CLOSE:
                        self.lost.append(f"{where}: another image for seed {seed}")
                    else:
                        self.answered += 1
                except Exception as error:
                    self.lost.append(f"{where}: {error!r}")

    def _trace(self, request: httpx.Request) -> None:
        def seen(event: str, _: object) -> None:
            self.connections += event == "connection.connect_tcp.complete"

        request.extensions["trace"] = seen


def made_while(url: str, loading: Callable[[], bool]) -> float:
    """Requests a second that a replica answers with a few clients at a time, while the other
    loads."""
    done, ending = Counter[str](), threading.Event()

    def work() -> None:
        with httpx.Client(timeout=SECONDS) as client:
            for seed in itertools.cycle(range(SEEDS)):
                if ending.is_set():
                    break
                done[str(client.post(f"{url}{GENERATIONS}", json=body_of(seed)).status_code)] += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while loading():
        time.sleep(0.1)
    ending.set()
    for thread in threads:
        thread.join(SECONDS)
    assert set(done) == {"200"}
    return done["200"] / (time.monotonic() - began)


@pytest.fixture
def exits() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def upstream(replicas: list[Replica]) -> str:
    servers = "".join(f"server 127.0.0.1:{one.port}; " for one in replicas)
    return f"upstream stepweave {{ {servers} keepalive 32; }}"


PROXY = """location / {
    proxy_pass http://stepweave;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
}"""


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("through", ["replicas", "nginx"])
def test_a_rolling_update_loses_nothing(
    through: str, exits: contextlib.ExitStack, tmp_path: Path
) -> None:
    replicas = [Replica(tmp_path / name) for name in ("a", "b")]
    servers = [replicas[0].start(exits)]
    servers[0].wait_until_ready()
    servers.append(replicas[1].start(exits))

    def loading() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{replicas[1].url}/readyz", timeout=SECONDS).status_code != 200
        return True

    rate = LOAD * made_while(replicas[0].url, loading)
    with httpx.Client(timeout=SECONDS) as client:
        source = base64.b64decode(send(client, replicas[1].url, 0).json()["data"][0]["b64_json"])
        edits = [source if seed % EDITS == 1 else None for seed in range(SEEDS)]
        expected = [
            image_of(send(client, replicas[1].url, seed, edits[seed])) for seed in range(SEEDS)
        ]
    rotation, turn = list(replicas), itertools.count()
    proxy = (
        exits.enter_context(nginx(tmp_path / "nginx", PROXY, upstream(rotation)))
        if through == "nginx"
        else None
    )

    def rotate(chosen: list[Replica]) -> None:
        """As when an endpoint is removed, or added."""
        nonlocal rotation
        rotation = chosen
        if proxy is not None:
            proxy.reload(PROXY, upstream(rotation))

    def where() -> str:
        if proxy is not None:
            return proxy.url
        serving = rotation
        return serving[next(turn) % len(serving)].url

    with Clients(where, expected, edits, rate, keep=proxy is None) as clients:
        for i, replica in enumerate(replicas):
            replica.announce()
            rotate([one for one in replicas if one is not replica])
            time.sleep(PRE_STOP_SECONDS)
            assert servers[i].stop() == 0
            servers[i] = replica.start(exits)
            servers[i].wait_until_ready()
            rotate(list(replicas))
        deadline = time.monotonic() + 600
        while clients.sent < REQUESTS and time.monotonic() < deadline:
            time.sleep(0.2)
    sys.stdout.write(
        f"{through}: {clients.sent} requests over {clients.connections} connections, {rate:.2f} a "
        f"second, at most "
        f"{clients.late:.1f} s late\n"
    )
    assert not clients.lost, f"{len(clients.lost)} of {clients.sent} lost: {clients.lost[:5]}"
    assert clients.answered == clients.sent >= REQUESTS
    if proxy is None:
        assert clients.connections < clients.sent / 2, (
            "most went over connections that had been used before"
        )
