"""Behind a real nginx: what it passes on by default, under a path prefix, and with its buffers."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
import uvicorn
from PIL import Image
from uvicorn.protocols.http import auto

from stepweave.api.connections import Connections
from tests.support.environment import free_port
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.nginx import Nginx, nginx
from tests.support.waiting import SECONDS, wait_until

Make = Callable[..., InProcess]
BODY = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
GENERATIONS = "/v1/images/generations"


@contextlib.contextmanager
def behind(
    directory: Path, made: InProcess, location: str, port: int | None = None
) -> Iterator[Nginx]:
    """nginx before the server; `{server}` in the location's lines is where that is."""
    own, held = free_port(), Connections(100)
    made.server.leaving.listeners.append(held.close_idle)
    with patch.object(auto, "AutoHTTPProtocol"), patch.dict(os.environ):
        held.install()
        config = uvicorn.Config(
            made.client.app, "127.0.0.1", own, lifespan="off", log_level="warning"
        )
        config.load()
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_until(lambda: runner.started)
        with nginx(
            directory, location.replace("SERVER", f"http://127.0.0.1:{own}"), port=port
        ) as proxy:
            yield proxy
    finally:
        runner.should_exit = True
        thread.join(SECONDS)


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=SECONDS) as made:
        yield made


def test_a_plain_proxy_lets_nobody_drain(
    in_process: Make, client: httpx.Client, tmp_path: Path
) -> None:
    made = in_process(state_dir=str(tmp_path / "state"))
    token = (tmp_path / "state" / "drain-token").read_text()
    with behind(tmp_path / "nginx", made, "location / { proxy_pass SERVER; }") as proxy:
        for headers in (
            {},
            {"Host": "localhost"},
            {"Authorization": "Bearer x"},
            {"X-Forwarded-For": "127.0.0.1"},
        ):
            for method in ("POST", "DELETE"):
                assert (
                    client.request(method, f"{proxy.url}/drain", headers=headers).status_code == 404
                )
        assert client.get(f"{proxy.url}/readyz").status_code == 200
        answer = client.post(f"{proxy.url}{GENERATIONS}", json=BODY)
        assert answer.status_code == 200
        Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).verify()
        bearer = {"Authorization": f"Bearer {token}"}
        assert client.post(f"{proxy.url}/drain", headers=bearer).status_code == 200
        assert client.get(f"{proxy.url}/readyz").status_code == 503
        assert client.delete(f"{proxy.url}/drain", headers=bearer).status_code == 200


@pytest.mark.parametrize(
    ("told", "passes_it_on"), [("setting", False), ("setting", True), ("header", False)]
)
def test_a_path_prefix(
    in_process: Make, client: httpx.Client, tmp_path: Path, told: str, passes_it_on: bool
) -> None:
    port = free_port()
    root = f"http://127.0.0.1:{port}/art/work"
    settings = {"base_url": root} if told == "setting" else {"trust_forwarded": True}
    lines = [
        f"proxy_pass SERVER{'' if passes_it_on else '/'};",
        "proxy_set_header X-Forwarded-Host $http_host;",
        "proxy_set_header X-Forwarded-Proto $scheme;",
        "proxy_set_header X-Forwarded-Prefix /art/work;",
    ]
    location = f"location /art/work/ {{ {' '.join(lines)} }}"
    with behind(tmp_path, in_process(**settings), location, port) as proxy:
        assert proxy.port == port
        answer = client.post(f"{root}{GENERATIONS}", json=BODY | {"response_format": "url"})
        url = answer.json()["data"][0]["url"]
        assert url.startswith(f"{root}/images/")
        assert client.get(url).headers["content-type"] == "image/png"
        later = client.post(f"{root}{GENERATIONS}", json=BODY, headers={"Prefer": "respond-async"})
        job = httpx.URL(root).join(later.headers["location"])
        assert job.path.startswith("/art/work/v1/jobs/")
        assert client.get(job).status_code == 200
        servers = client.get(f"{root}/openapi.json").json()["servers"]
        assert str(httpx.URL(root).join(servers[0]["url"])) == root
        links = client.get(f"{root}/").json()["links"]
        assert client.get(httpx.URL(root).join(links["models"])).status_code == 200
        page = client.get(f"{root}/", headers={"Accept": "text/html"}).text
        assert 'href="/art/work/openapi.json"' in page
        legacy = client.post(f"{root}/api/diffusers/inference", json={"prompt": "a"}).json()[
            "response"
        ][0]
        assert client.get(legacy).status_code == 200
        for path in ("/v1/models/", "/generate/", "/nope/", "//evil.test"):
            assert (
                "location" not in client.get(f"{root}{path}", headers={"Host": "evil.test"}).headers
            )


@pytest.mark.parametrize("settings", [{}, {"trust_forwarded": True}])
def test_forwarded_headers_are_believed_where_the_setting_says_so(
    in_process: Make, client: httpx.Client, tmp_path: Path, settings: dict[str, Any]
) -> None:
    made = in_process(trusted_hosts="127.0.0.1,images.example.com", **settings)
    location = "location / { proxy_pass SERVER; }"  # the client's own headers come through
    forged = {
        "X-Forwarded-Host": "images.example.com",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Prefix": "/p",
    }
    with behind(tmp_path, made, location) as proxy:
        url = client.post(
            f"{proxy.url}{GENERATIONS}", json=BODY | {"response_format": "url"}, headers=forged
        ).json()["data"][0]["url"]
        assert url.startswith(
            "https://images.example.com/p/images/" if settings else "http://127.0.0.1:"
        )


def test_events_come_as_they_happen_through_its_buffers(
    in_process: Make, client: httpx.Client, tmp_path: Path
) -> None:
    pipeline = FakePipeline()
    made = in_process(pipeline)
    made.pipeline.record.gated = True
    with behind(tmp_path, made, "location / { proxy_pass SERVER; }") as proxy:
        body = BODY | {"stream": True, "events": "all"}
        with client.stream("POST", f"{proxy.url}{GENERATIONS}", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("event: stepweave.")
            made.pipeline.record.release.set()
            assert "event: image_generation.completed" in list(lines)


def test_a_client_that_leaves_the_proxy_ends_its_job(in_process: Make, tmp_path: Path) -> None:
    made = in_process()
    made.pipeline.record.gated = True
    with behind(tmp_path, made, "location / { proxy_pass SERVER; }") as proxy:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{proxy.url}{GENERATIONS}", json=BODY, timeout=0.5)
        wait_until(lambda: all(one.lost for one in made.server.active.values()))
        made.pipeline.record.release.set()
        wait_until(lambda: not made.server.active)


def test_a_large_upload_and_a_large_answer_go_through_its_buffers(
    in_process: Make, client: httpx.Client, tmp_path: Path
) -> None:
    made = in_process(FakePipeline(edits=True))
    location = "client_max_body_size 16m; location / { proxy_pass SERVER; }"
    image = io.BytesIO()
    Image.effect_noise((1024, 1024), 100).convert("RGB").save(image, "PNG")
    assert len(image.getvalue()) > 1_000_000
    with behind(tmp_path, made, location) as proxy:
        answer = client.post(
            f"{proxy.url}/v1/images/edits",
            data={"prompt": "a", "n": "4", "num_inference_steps": "2", "size": "1024x1024"},
            files={"image": ("a.png", image.getvalue(), "image/png")},
        )
        assert answer.status_code == 200, answer.text
        assert len(json.loads(answer.content)["data"]) == 4
