"""What requests may call the model by, and in which form images come back to those that do not
say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from stepweave.config import Settings
from stepweave.config.values import MAX_NAME
from stepweave.errors import ConfigError
from stepweave.serving.names import ModelNames
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess

pytestmark = pytest.mark.usefixtures("no_settings")

Make = Callable[..., InProcess]
PROMPTS = {
    "inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a red circle"]}]
}


def infer(app: InProcess, model: str, **fields: Any) -> httpx.Response:
    return app.client.post(f"/v2/models/{model}/infer", json={**PROMPTS, **fields})


@pytest.mark.parametrize(
    ("names", "told", "taken", "refused"),
    [
        ((), "own", ["own"], ["other", "*", "", "own:x"]),
        (("a", "b"), "a", ["a", "b"], ["own", "*", "a,b"]),
        (
            ("a", "*"),
            "a",
            ["a", "own", "anything at all", "*", "n" * MAX_NAME],
            ["a:b", ":", "", "n" * (MAX_NAME + 1)],
        ),
        (("*",), "own", ["own", "gpt-image-1", "black-forest-labs/FLUX.1-dev"], ["own:x"]),
        (("*", "a"), "own", ["own", "a", "b"], ["a:b"]),
    ],
)
def test_names_that_are_taken(
    names: tuple[str, ...], told: str, taken: list[str], refused: list[str]
) -> None:
    known = ModelNames(names, "own")
    assert known.told == told
    assert [name for name in taken if not known.take(name)] == []
    assert [name for name in refused if known.take(name)] == []
    assert all("STEPWEAVE_MODEL_NAMES" in known.refusal(name) for name in refused)


def test_an_own_name_with_a_colon_is_the_models_own() -> None:
    assert ModelNames((), "a:b").take("a:b") and ModelNames(("*",), "a:b").take("a:b")


@pytest.mark.parametrize(
    "wrong", ["a:b", "a b", "*,a:b", "-a", "a/", "ü", "n" * (MAX_NAME + 1), ",", "**"]
)
def test_a_setting_that_is_no_name_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("STEPWEAVE_MODEL_NAMES", wrong)
    with pytest.raises(ConfigError, match="STEPWEAVE_MODEL_NAMES"):
        Settings.load()


def test_names_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWEAVE_MODEL_NAMES", " gpt-image-1 , black-forest-labs/FLUX.1-dev,*")
    assert Settings.load().model_names == ("gpt-image-1", "black-forest-labs/FLUX.1-dev", "*")


def test_where_any_name_is_first_the_models_own_is_known_like_those_that_follow() -> None:
    names = ModelNames(("*", "sdxl"), "own")
    assert (names.told, names.listed, names.any) == ("own", ("own", "sdxl"), True)


def test_every_route_takes_every_name_and_tells_the_first(in_process: Make) -> None:
    app = in_process(model_names=("gpt-image-1", "sdxl"))
    for name in ("gpt-image-1", "sdxl"):
        assert app.post(model=name).json()["model"] == "gpt-image-1"
        assert app.client.get(f"/v1/models/{name}").json()["id"] == "gpt-image-1"
        assert app.client.get(f"/v2/models/{name}").json()["name"] == "gpt-image-1"
        assert app.client.get(f"/v2/models/{name}/ready").json() == {
            "name": "gpt-image-1",
            "ready": True,
        }
        assert infer(app, name, model_name=name).json()["model_name"] == "gpt-image-1"
    assert infer(app, "sdxl", model_name="gpt-image-1").status_code == 400
    assert [one["id"] for one in app.client.get("/v1/models").json()["data"]] == ["gpt-image-1"]
    assert app.client.get("/api/status").json()["current_model"] == "gpt-image-1"
    labels = {"pipeline": "FakePipeline", "revision": "", "device": "cpu", "dtype": "float32"}
    assert app.metric("stepweave_model_info", **labels) == 1
    for refused in (app.post(model="shapes"), app.client.get("/v1/models/shapes")):
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (404, "model_not_found")
        assert (
            "'gpt-image-1', 'sdxl'" in error["message"]
            and "STEPWEAVE_MODEL_NAMES" in error["message"]
        )
    assert infer(app, "shapes").status_code == 404


def test_a_star_takes_any_name_and_no_colon(in_process: Make) -> None:
    app = in_process(model_names="*")
    for name in ("gpt-image-1", "dall-e-3", "something", "owner/name", "a name with spaces"):
        assert app.post(model=name).json()["model"] == "shapes"
        assert infer(app, name).status_code == 200
    refused = app.post(model="shapes:lora").json()["error"]
    assert (refused["code"], refused["param"]) == ("model_not_found", "model")
    assert "colon" in refused["message"]
    names = app.client.get("/openapi.json").json()["components"]["schemas"]["GenerationRequest"][
        "properties"
    ]["model"]
    assert names["anyOf"][0]["pattern"] == "^[^:]+$"


def test_jobs_are_stored_under_the_name_that_is_told(in_process: Make) -> None:
    app = in_process(model_names=("first", "second"))
    body = {"prompt": "a red circle", "model": "second"}
    headers = {"Idempotency-Key": "once"}
    answers = [
        app.client.post("/v1/images/generations", json=body, headers=headers).json()
        for _ in range(2)
    ]
    assert [answer["model"] for answer in answers] == ["first", "first"]
    assert answers[0]["data"] == answers[1]["data"]


def test_urls_where_a_setting_says_so_and_the_request_does_not(in_process: Make) -> None:
    app = in_process(FakePipeline(edits=True), response_format="url", trusted_hosts="testserver")
    for fields, form in (
        ({}, "url"),
        ({"response_format": None}, "url"),
        ({"response_format": "b64_json"}, "b64_json"),
    ):
        assert form in app.post(**fields).json()["data"][0]
    streamed = app.post(stream=True).text
    done = json.loads(next(line for line in streamed.splitlines() if line.startswith("data: "))[6:])
    assert done["url"].startswith("http://testserver/images/") and done["b64_json"]
    job = app.client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"Prefer": "respond-async"}
    ).json()
    for line in app.client.get(f"/v1/jobs/{job['id']}/events").text.splitlines():
        assert not line.startswith("event: error")
    assert "url" in app.client.get(f"/v1/jobs/{job['id']}").json()["result"]["data"][0]
    schemas = app.client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["GenerationRequest"]["properties"]["response_format"]["default"] == "url"
    assert schemas["EditRequest"]["properties"]["response_format"]["default"] == "url"


def test_an_image_as_it_is_needs_no_trusted_host(in_process: Make) -> None:
    app = in_process(response_format="url")
    answer = app.client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"Accept": "image/png"}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert app.post().status_code == 400  # nobody said that URLs may begin with this host
