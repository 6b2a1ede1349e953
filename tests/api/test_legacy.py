"""The surface of the diffusers example servers, as their READMEs' clients use it, and the URLs of
images."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.requests import Request

from stepweave.api.urls import base_url
from stepweave.config import Settings
from stepweave.errors import InvalidRequestError
from stepweave.store.files import StoredFile
from tests.support.in_process import InProcess
from tests.support.served import Served
from tests.support.waiting import SECONDS, wait_until

Make = Callable[..., InProcess]
ROUTE = "/api/diffusers/inference"
DOCUMENTED = {  # examples/server-async/README.md
    "prompt": "A futuristic cityscape, vibrant colors",
    "num_inference_steps": 30,
    "num_images_per_prompt": 1,
}
OF_ITS_TEST = {  # examples/server-async/test.py
    "prompt": "The T-800 Terminator Robot Returning From The Future, Anime Style",
    "num_inference_steps": 30,
    "num_images_per_prompt": 1,
}


@pytest.fixture
def make(in_process: Make) -> Make:
    """Apps that Starlette's test client reaches at a host that is trusted."""
    return lambda *args, **settings: in_process(
        *args, **{"trusted_hosts": "testserver", **settings}
    )


@pytest.mark.parametrize("body", [DOCUMENTED, OF_ITS_TEST])
def test_the_documented_requests_get_urls_of_images(served: Served, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{served.url}{ROUTE}", json=body, timeout=SECONDS)
    answer.raise_for_status()
    assert list(answer.json()) == ["response"]
    (url,) = answer.json()["response"]
    assert url.startswith(f"{served.url}/images/")
    fetched = httpx.get(url, timeout=SECONDS)
    fetched.raise_for_status()
    with Image.open(io.BytesIO(fetched.content)) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
        assert f"Steps: {body['num_inference_steps']}" in image.info["parameters"]


def test_the_other_example_servers_documented_request(make: Make) -> None:
    """Of examples/server, as it stands: its server ignores the model's name and always answers with
    URLs."""
    app = make(model_names="*", response_format="url")
    body = {"model": "something", "prompt": "a kitten in front of a fireplace"}
    answer = app.client.post("/v1/images/generations", json=body)
    fetched = app.client.get(answer.json()["data"][0]["url"])
    assert Image.open(io.BytesIO(fetched.content)).size == (64, 64)


def test_everything_that_the_route_takes(make: Make) -> None:
    app = make()
    body = {
        "prompt": "a star",
        "negative_prompt": "blue",
        "num_inference_steps": 3,
        "num_images_per_prompt": 3,
        "model": "shapes",
    }
    urls = app.client.post(ROUTE, json=body).json()["response"]
    call = app.pipeline.record.calls[-1]
    assert (call["prompt"], call["negative_prompt"], call["num_inference_steps"]) == (
        "a star",
        "blue",
        3,
    )
    assert len(set(urls)) == call["num_images_per_prompt"] == 3
    assert all(re.fullmatch(r"http://testserver/images/[0-9a-f]{32}\.png", url) for url in urls)
    assert len({app.client.get(url).content for url in urls}) == 3


@pytest.mark.parametrize(("settings", "steps"), [({}, 28), ({"max_steps": 100}, 28)])
def test_defaults_are_the_example_servers(make: Make, settings: dict[str, Any], steps: int) -> None:
    app = make(**settings)
    assert (
        app.client.post(ROUTE, json={"prompt": "a star", "negative_prompt": ""}).status_code == 200
    )
    call = app.pipeline.record.calls[-1]
    assert (
        call["num_inference_steps"],
        call["num_images_per_prompt"],
        call["negative_prompt"],
    ) == (steps, 1, None)


@pytest.mark.parametrize(
    ("body", "status", "param", "shown"),
    [
        ({}, 400, "prompt", "missing"),
        ({"prompt": " "}, 400, "prompt", "' '"),
        ({"prompt": 1}, 400, "prompt", "1"),
        ({"num_inference_steps": 0}, 400, "num_inference_steps", "0"),
        ({"num_inference_steps": -1}, 400, "num_inference_steps", "-1"),
        ({"num_inference_steps": 201}, 400, "num_inference_steps", "the limit is 200"),
        ({"num_inference_steps": "thirty"}, 400, "num_inference_steps", "'thirty'"),
        ({"num_images_per_prompt": 0}, 400, "num_images_per_prompt", "0"),
        ({"num_images_per_prompt": 9}, 400, "num_images_per_prompt", "the limit is 8"),
    ],
)
def test_what_is_refused(
    make: Make, body: dict[str, Any], status: int, param: str, shown: str
) -> None:
    app = make(warmup=False)
    answer = app.client.post(ROUTE, json={"prompt": "a star", **body} if body else {})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert shown in error["message"]
    assert answer.json()["detail"] == error["message"], "what clients of FastAPI's servers read"
    assert app.pipeline.record.calls == []
    assert app.metric("stepweave_requests_total", outcome="invalid") == 1


def test_numbers_may_be_texts_and_what_is_unknown_is_ignored_with_a_warning(make: Make) -> None:
    """As the example server's own model of the body does."""
    app = make(warmup=False)
    body = {"prompt": "a star", "num_inference_steps": "3", "seed": 3, "steps": {"a": [1]}}
    answer = app.client.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    assert app.pipeline.record.calls[-1]["num_inference_steps"] == 3
    assert "Unknown fields are ignored: 'seed', 'steps'." in json.loads(
        answer.headers["X-Stepweave-Warnings"]
    )


def test_the_models_name_is_ignored_as_the_example_server_does(make: Make) -> None:
    app = make(warmup=False)
    for model in ("stabilityai/stable-diffusion-3-medium", "", None):
        assert app.client.post(ROUTE, json={"prompt": "a star", "model": model}).status_code == 200


def test_errors_have_the_detail_that_clients_of_the_example_server_read(make: Make) -> None:
    app = make(warmup=False, api_keys="secret", max_body_bytes=1024)
    key = {"Authorization": "Bearer secret"}
    for answer, status in (
        (app.client.get("/images/x.png"), 401),
        (app.client.get("/images/x.png", headers=key), 404),
        (app.client.get("/images", headers=key), 404),
        (app.client.get(ROUTE, headers=key), 405),
        (app.client.post("/api/status", headers=key), 405),
        (app.client.post(ROUTE, content=b"x" * 2000, headers=key), 413),
        (app.client.post(ROUTE, content=b"{}", headers=key), 415),
        (app.client.post(ROUTE, json={}, headers=key), 400),
    ):
        body = answer.json()
        assert answer.status_code == status
        assert set(body) == {"error"} | ({"detail"} if answer.url.path != "/images" else set())
        assert body.get("detail", body["error"]["message"]) == body["error"]["message"]


def test_only_json_is_read(make: Make) -> None:
    assert (
        make().client.post(ROUTE, content=b"{}", headers={"Content-Type": "text/plain"}).status_code
        == 415
    )


def test_no_image_is_made_that_could_not_be_fetched(in_process: Make) -> None:
    app = in_process(warmup=False)
    answer = app.client.post(ROUTE, json={"prompt": "a star"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_base_url")
    assert app.pipeline.record.calls == []


def test_images_are_private_and_typed(make: Make) -> None:
    app = make()
    (url,) = app.client.post(ROUTE, json={"prompt": "a star"}).json()["response"]
    answer = app.client.get(url)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    left = re.fullmatch(r"private, max-age=(\d+)", answer.headers["cache-control"])
    assert left is not None
    assert 3500 < int(left[1]) <= 3600
    assert app.client.head(url).status_code == 200


@pytest.mark.parametrize("name", ["0" * 32 + ".png", "..%2f..%2fetc%2fpasswd", "%00", "x" * 5000])
def test_unknown_images_are_not_found(make: Make, name: str) -> None:
    answer = make(warmup=False).client.get(f"/images/{name}")
    assert answer.status_code == 404
    assert len(answer.json()["error"]["message"]) < 300


def test_an_image_tells_how_long_it_is_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make(warmup=False)

    async def get(name: str) -> StoredFile | None:
        return {"soon": StoredFile(b"RIFF", "image/webp", 12.9), "gone": None}[name]

    monkeypatch.setattr(app.server.files, "get", get)
    answer = app.client.get("/images/soon")
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == (
        "image/webp",
        "private, max-age=12",
    )
    gone = app.client.get("/images/gone")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "image_not_found")


def test_status_counts_what_runs_and_what_ran(make: Make) -> None:
    app = make(warmup=False)
    expected = {
        "current_model": "shapes",
        "type_models": "t2im",
        "memory": {},
        "active_inferences": 0,
        "total_requests": 0,
    }
    assert app.client.get("/api/status").json() == expected
    app.pipeline.record.gated = True
    thread = threading.Thread(
        target=app.client.post, args=(ROUTE,), kwargs={"json": {"prompt": "a star"}}
    )
    thread.start()
    assert app.pipeline.record.started.wait(SECONDS)
    assert app.client.get("/api/status").json() == {
        **expected,
        "active_inferences": 1,
        "total_requests": 1,
    }
    app.pipeline.record.release.set()
    thread.join(SECONDS)
    wait_until(lambda: app.client.get("/api/status").json() == {**expected, "total_requests": 1})


def test_status_of_a_gpu_has_the_example_servers_keys(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make(warmup=False)
    monkeypatch.setattr(app.server, "device", "cuda:0")
    monkeypatch.setattr(app.server.metrics.vram, "_values", lambda: (3 * 2**29, 2**31, 0, 0, 0))
    assert app.client.get("/api/status").json()["memory"] == {
        "memory_allocated_gb": 1.5, "memory_reserved_gb": 2.0, "device": "cuda:0",
    }  # fmt: skip


def test_status_waits_for_the_model(in_process: Make) -> None:
    answer = in_process(ready=False).client.get("/api/status")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attributes if name == "href"]


def test_the_root_is_a_page_for_browsers(in_process: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    app = in_process(warmup=False)
    assert app.server.model is not None
    monkeypatch.setattr(app.server.model, "id", "<script>alert('1')</script>")
    answer = app.client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in answer.text
    page = Links()
    page.feed(answer.text)
    assert "script" not in page.tags
    assert "/api/status" in page.links
    assert all(app.client.get(link).status_code == 200 for link in page.links)
    assert f"POST {ROUTE}" in answer.text


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/plain"])
def test_the_root_is_json_for_others(in_process: Make, accept: str) -> None:
    app = in_process(ready=False)
    answer = app.client.get("/", headers={"Accept": accept}).json()
    assert (answer["name"], answer["model"], answer["stage"]) == ("stepweave", None, "starting")
    methods = {route["path"]: route["methods"] for route in answer["routes"]}
    assert methods[ROUTE] == ["POST"] and methods["/images/{filename}"] == ["GET"]
    assert methods["/v1/jobs/{id}"] == ["GET", "DELETE"] and methods["/generate"] == ["POST"]
    assert answer["links"]["status"] == "/api/status"


def request(scheme: str = "http", **headers: str) -> Request:
    named = [
        (name.replace("_", "-").encode(), value.encode("latin-1"))
        for name, value in headers.items()
    ]
    return Request(
        {
            "type": "http",
            "scheme": scheme,
            "server": ("10.0.0.1", 80),
            "path": "/",
            "headers": named,
        }
    )


@pytest.mark.parametrize(
    ("settings", "headers", "expected"),
    [
        ({}, {"host": "localhost:3000"}, "http://localhost:3000"),
        ({}, {"host": "127.0.0.1"}, "http://127.0.0.1"),
        ({}, {"host": "[::1]:3000"}, "http://[::1]:3000"),
        ({}, {"host": "LOCALHOST"}, "http://localhost"),
        (
            {"base_url": "https://images.example.com/a/"},
            {"host": "evil.test"},
            "https://images.example.com/a",
        ),
        (
            {"trusted_hosts": "a.test, *.example.com"},
            {"host": "x.y.example.com:81"},
            "http://x.y.example.com:81",
        ),
        ({"trusted_hosts": "*"}, {"host": "anything.test"}, "http://anything.test"),
        ({"trusted_hosts": "A.test"}, {"host": "a.test"}, "http://a.test"),
        (
            {},
            {"host": "localhost", "x_forwarded_host": "evil.test", "x_forwarded_proto": "https"},
            "http://localhost",
        ),
        (
            {"trust_forwarded": True, "trusted_hosts": "a.test"},
            {
                "host": "10.0.0.1",
                "x_forwarded_host": "a.test, b.test",
                "x_forwarded_proto": "https,http",
            },
            "https://a.test",
        ),
        ({"trust_forwarded": True}, {"host": "localhost"}, "http://localhost"),
    ],
)
def test_where_urls_begin(settings: dict[str, Any], headers: dict[str, str], expected: str) -> None:
    assert base_url(request(**headers), Settings(**settings)) == expected


def test_urls_have_the_requests_scheme() -> None:
    assert base_url(request("https", host="localhost"), Settings()) == "https://localhost"


@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        ({}, {}),
        ({}, {"host": ""}),
        ({}, {"host": "evil.test"}),
        ({}, {"host": "localhost.evil.test"}),
        ({}, {"host": "notlocalhost"}),
        ({"trusted_hosts": "*.example.com"}, {"host": "example.com"}),
        ({"trusted_hosts": "*.example.com"}, {"host": "evilexample.com"}),
        ({"trusted_hosts": ""}, {"host": "localhost"}),
        ({"trusted_hosts": "*"}, {"host": "localhost/evil"}),
        ({"trusted_hosts": "*"}, {"host": "user@localhost"}),
        ({"trusted_hosts": "*"}, {"host": "localhost:99999"}),
        ({"trusted_hosts": "*"}, {"host": "localhost:80:80"}),
        ({"trusted_hosts": "*"}, {"host": "local host"}),
        ({"trusted_hosts": "*"}, {"host": 'a"><script>'}),
        ({"trusted_hosts": "*"}, {"host": "localhost\u00e9"}),
        ({"trusted_hosts": "*"}, {"host": "localhost\n"}),
        ({"trust_forwarded": True}, {"host": "localhost", "x_forwarded_host": "evil.test"}),
        ({"trust_forwarded": True}, {"host": "localhost", "x_forwarded_proto": "javascript"}),
    ],
)
def test_hosts_that_no_url_is_made_of(settings: dict[str, Any], headers: dict[str, str]) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"STEPWEAVE_BASE_URL .* STEPWEAVE_TRUSTED_HOSTS"
    ) as caught:
        base_url(request(**headers), Settings(**settings))
    assert caught.value.code == "no_base_url"


def test_a_client_that_leaves_ends_its_generation(served: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}{ROUTE}",
            json={"prompt": "a star", "num_inference_steps": 200, "num_images_per_prompt": 8},
            timeout=httpx.Timeout(SECONDS, read=0.3),
        )
    wait_until(
        lambda: (
            not httpx.get(f"{served.url}/api/status", timeout=SECONDS).json()["active_inferences"]
        )
    )
