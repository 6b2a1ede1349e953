"""The contract of the HTTP surface, on a fake pipeline."""

from __future__ import annotations

import base64
import inspect
import io
import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import anyio
import pytest
import torch
from PIL import Image

from stepweave.api.answers import MAX_WARNINGS_HEADER, warnings_header
from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import LoadError
from stepweave.parameters import MAX_SEED
from stepweave.serving.model import ServedModel
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.tiny import FAMILIES
from tests.support.waiting import SECONDS, wait_until

Make = Callable[..., InProcess]


def test_a_generation_echoes_everything_it_resolved(in_process: Make) -> None:
    app = in_process()
    response = app.post(
        seed=7, n=2, size="32x48", num_inference_steps=3, guidance_scale=2, negative_prompt="blue"
    )
    assert response.status_code == 200
    answer = response.json()
    assert [item["seed"] for item in answer["data"]] == [7, 8]
    assert answer["parameters"] == {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "seed": 7,
        "size": "32x48",
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "n": 2,
        "output_format": "png",
        "priority": "normal",
        "reproducible": False,
    }
    assert answer["usage"] == {
        "input_tokens": 0,
        "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
        "output_tokens": 2 * 4 * 6,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 2 * 4 * 6},
        "total_tokens": 2 * 4 * 6,
        "images": 2,
        "steps": 6,
        "pixels": 2 * 32 * 48,
    }
    assert (answer["size"], answer["output_format"], answer["background"]) == (
        "32x48",
        "png",
        "opaque",
    )
    timings = answer["timings"]
    assert list(timings) == ["queued", "encode", "denoise", "decode", "encode_image", "total"]
    assert all(seconds > 0 for seconds in timings.values())
    assert timings["total"] >= sum(timings.values()) - timings["total"]
    assert answer["warnings"] == []
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][1]["b64_json"])))
    assert image.size == (32, 48)
    assert json.loads(image.info["stepweave"])["seed"] == 8


def test_a_tag_is_repeated_by_every_surface_and_in_the_file(in_process: Make) -> None:
    app, tag = in_process(), 'order 7: "red"'
    body = {"prompt": "x", "request_tag": tag}
    answer = app.post(**body).json()
    assert answer["parameters"]["request_tag"] == tag
    file = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert json.loads(file.info["stepweave"])["request_tag"] == tag
    image = app.client.post("/v1/images/generations", json=body, headers={"Accept": "image/png"})
    assert image.headers["X-Stepweave-Request-Tag"] == tag
    *_, last = app.post(**body, stream=True).text.split("data: ")
    assert json.loads(last)["parameters"]["request_tag"] == tag
    job = app.client.post(
        "/v1/images/generations", json=body, headers={"Prefer": "respond-async"}
    ).json()
    assert job["parameters"]["request_tag"] == tag
    tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    inferred = app.client.post(
        "/v2/models/shapes/infer", json={"inputs": [tensor], "parameters": {"request_tag": tag}}
    ).json()
    assert json.loads(inferred["outputs"][1]["data"][0])["request_tag"] == tag
    assert "request_tag" not in app.post(prompt="x").json()["parameters"]
    for wrong in ("", " x", "a\nb", "é", "x" * 129):
        refused = app.post(prompt="x", request_tag=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_tag")


def test_guidance_is_rescaled_where_the_pipeline_can(in_process: Make) -> None:
    app = in_process(FAMILIES["stable_diffusion"].build(), warmup=False, batching="step")
    asked: dict[str, Any] = {"seed": 7, "num_inference_steps": 2}

    def generated(**fields: Any) -> tuple[bytes, Any, Any]:
        """Pixels; the value in the answer, and in the file."""
        answer = app.post(**asked, **fields).json()
        file = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
        in_file = json.loads(file.info["stepweave"]).get("guidance_rescale")
        return file.tobytes(), answer["parameters"].get("guidance_rescale"), in_file

    plain, *told = generated()
    assert told == [None, None]
    assert generated(guidance_rescale=0) == (plain, 0.0, 0.0)
    rescaled, *told = generated(guidance_rescale=0.7)
    assert told == [0.7, 0.7] and rescaled != plain
    for wrong in (-0.1, 1.1, "0.7", True):
        refused = app.post(**asked, guidance_rescale=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guidance_rescale")

    lacking = in_process()
    refused = lacking.post(guidance_rescale=0.7)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "guidance_rescale is 0.7, but FakePipeline has no guidance_rescale."
    )
    described = [
        one.client.get("/openapi.json").json()["components"]["schemas"]["GenerationRequest"]
        for one in (app, lacking)
    ]
    has, has_not = (schema["properties"]["guidance_rescale"] for schema in described)
    assert has["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    assert has_not["type"] == "null"


def test_image_i_of_n_is_the_image_of_seed_plus_i(in_process: Make) -> None:
    app = in_process()

    def pixels(item: dict[str, Any]) -> bytes:
        return Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).tobytes()

    three = app.post(seed=10, n=3).json()["data"]
    assert pixels(three[2]) == pixels(app.post(seed=12).json()["data"][0]) != pixels(three[0])


def test_defaults_come_from_pipeline_and_seed_is_drawn(in_process: Make) -> None:
    app = in_process()
    first, second = app.post().json(), app.post().json()
    assert first["parameters"]["num_inference_steps"] == 28
    assert first["parameters"]["guidance_scale"] == 7.0
    assert first["parameters"]["size"] == "64x64"
    assert first["data"][0]["seed"] != second["data"][0]["seed"]


def test_the_wish_to_be_reproducible_is_echoed_and_passed_on(in_process: Make) -> None:
    app = in_process()
    assert app.server.engine is not None
    with mock.patch.object(app.server.engine, "submit", wraps=app.server.engine.submit) as submit:
        for fields in ({}, {"reproducible": False}):
            assert app.post(**fields).json()["parameters"]["reproducible"] is False
            assert submit.call_args.kwargs["reproducible"] is False
        answer = app.post(reproducible=True).json()
        assert submit.call_args.kwargs["reproducible"] is True
    assert answer["parameters"]["reproducible"] is True
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert json.loads(image.info["stepweave"])["reproducible"] is True


def test_answers_warn_of_prompts_that_are_cut(in_process: Make) -> None:
    family = FAMILIES["stable_diffusion"]
    app = in_process(family.build(), warmup=False, batching="step")
    answer = app.post(
        prompt="a red circle " * 6, negative_prompt="a star " * 9, num_inference_steps=1
    ).json()
    assert [warning.split(";")[0] for warning in answer["warnings"]] == [
        "prompt: the text encoder (tokenizer) reads 16 tokens",
        "negative_prompt: the text encoder (tokenizer) reads 16 tokens",
    ]
    assert app.post(num_inference_steps=1).json()["warnings"] == []


def test_the_header_of_warnings_is_short_ascii() -> None:
    assert warnings_header(["é \x7f 🔴", "x"]) == '["\\u00e9 \\u007f \\ud83d\\udd34", "x"]'
    assert json.loads(warnings_header(["é \x7f 🔴\r\n"])) == ["é \x7f 🔴\r\n"]
    warnings = ["🔴" * 100] * 5
    text = warnings_header(warnings)
    assert len(text) <= MAX_WARNINGS_HEADER
    assert json.loads(text) == [*warnings[:3], "and 2 more"]
    assert json.loads(warnings_header(["🔴" * 1000])) == ["and 1 more"]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_output_formats(in_process: Make, output_format: str) -> None:
    answer = in_process().post(output_format=output_format).json()
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert image.format == output_format.upper()


@pytest.mark.parametrize(
    ("fields", "param", "shown"),
    [
        ({"prompt": ""}, "prompt", "''"),
        ({"prompt": "  \n"}, "prompt", "empty"),
        ({"prompt": 5}, "prompt", "5"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": "x" * 4001}, "prompt", "4001 characters; the limit is 4000"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt", "4001"),
        ({"num_inference_steps": 0}, "num_inference_steps", "0"),
        ({"num_inference_steps": -1}, "num_inference_steps", "-1"),
        ({"num_inference_steps": 201}, "num_inference_steps", "the limit is 200"),
        ({"num_inference_steps": "20"}, "num_inference_steps", "'20'"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "2.5"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": MAX_SEED + 1}, "seed", str(MAX_SEED)),
        ({"seed": MAX_SEED, "n": 2}, "seed", str(MAX_SEED)),
        ({"size": "16384x8"}, "size", "the model's limit is 8192 a side"),
        ({"seed": True}, "seed", "True"),
        ({"n": 0}, "n", "0"),
        ({"n": 9}, "n", "the limit is 8"),
        ({"size": "65x65"}, "size", "multiples of 8"),
        ({"size": "0x0"}, "size", "multiples of 8"),
        ({"size": "64"}, "size", "'64'"),
        ({"size": "64x-64"}, "size", "'64x-64'"),
        ({"size": "\u0666\u0664x\u0666\u0664"}, "size", "say WIDTHxHEIGHT"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"size": "8192x8192"}, "size", "the limit is 4194304"),
        ({"guidance_scale": -0.5}, "guidance_scale", "-0.5"),
        ({"guidance_scale": [4]}, "guidance_scale", "[4]"),
        ({"response_format": "file"}, "response_format", "'file'"),
        ({"partial_images": 4}, "partial_images", "4"),
        ({"events": "some"}, "events", "'some'"),
        ({"output_compression": 50}, "output_compression", "png has none"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "101"),
        ({"quality": "best"}, "quality", "'best'"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"output_format": "gif"}, "output_format", "'gif'"),
        ({"reproducible": 1}, "reproducible", "reproducible is 1"),
        ({"reproducible": "true"}, "reproducible", "'true'"),
        ({"steps": 20}, "steps", "Unknown field 'steps'"),
    ],
)
def test_bad_values_are_named_with_their_limit(
    in_process: Make, fields: dict[str, Any], param: str, shown: str
) -> None:
    app = in_process()
    response = app.post(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert shown in error["message"]
    assert all("warm up" in call["prompt"] for call in app.pipeline.record.calls)
    assert app.metric("stepweave_requests_total", outcome="invalid") == 1


@pytest.mark.parametrize(
    ("image_format", "size", "most"), [("jpeg", "8x65536", 65500), ("webp", "16384x8", 16383)]
)
def test_a_size_that_the_format_does_not_take_is_refused(
    in_process: Make, image_format: str, size: str, most: int
) -> None:
    answer = in_process(max_pixels=2**30).post(size=size, output_format=image_format)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"
    assert f"{image_format} takes {most} a side" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"prompt":', "invalid_json"),
        (b"", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b"{}", "missing_field"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "invalid_value"),
        (b'{"prompt": "x", "guidance_scale": 1e999}', "invalid_value"),
        (b'{"prompt": "x", "seed": ' + b"9" * 4000 + b"}", "invalid_value"),
        (b"[" * 100_000, "invalid_json"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/generate"])
def test_broken_bodies_are_400(in_process: Make, path: str, body: bytes, code: str) -> None:
    response = in_process().client.post(
        path, content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code
    assert len(response.content) < 1000


@pytest.mark.parametrize("path", ["/v1/images/generations", "/generate"])
def test_a_huge_body_is_413(in_process: Make, path: str) -> None:
    app = in_process()
    response = app.client.post(path, json={"prompt": "a" * 10_000_000})
    assert response.status_code == 413
    assert "1048576 bytes" in response.json()["error"]["message"]


def test_a_huge_chunked_body_is_413(in_process: Make) -> None:
    chunks = (b"a" * 65536 for _ in range(40))
    response = in_process().client.post(
        "/v1/images/generations", content=chunks, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413


def test_other_media_types_are_415(in_process: Make) -> None:
    response = in_process().client.post("/v1/images/generations", data={"prompt": "x"})
    assert response.status_code == 415
    assert "application/x-www-form-urlencoded" in response.json()["error"]["message"]


def test_unknown_routes_methods_and_models(in_process: Make) -> None:
    client = in_process().client
    assert client.get("/nope").json()["error"]["code"] == "not_found"
    refused = client.put("/v1/models")
    assert refused.status_code == 405
    assert "GET" in refused.headers["Allow"]
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert (
        client.post("/v1/images/generations", json={"prompt": "x", "model": "other"}).status_code
        == 404
    )


def test_models_tell_the_limits(in_process: Make) -> None:
    client = in_process(max_steps=50).client
    (model,) = client.get("/v1/models").json()["data"]
    assert model == client.get(f"/v1/models/{model['id']}").json()
    assert model["stepweave"]["native_size"] == "64x64"
    assert model["stepweave"]["max_num_inference_steps"] == 50


def test_request_ids(in_process: Make) -> None:
    client = in_process().client
    assert (
        client.get("/livez", headers={"X-Request-ID": "mine-1"}).headers["X-Request-ID"] == "mine-1"
    )
    for bad in ("x" * 129, "a b", "é".encode("latin-1")):
        assert client.get("/nope", headers={"X-Request-ID": bad}).headers["X-Request-ID"] != bad
    assert (
        client.get("/livez").headers["X-Request-ID"] != client.get("/livez").headers["X-Request-ID"]
    )


def test_a_failure_is_500_with_an_id_that_is_in_the_log(
    in_process: Make, caplog: pytest.LogCaptureFixture
) -> None:
    app = in_process()
    app.pipeline.record.error = RuntimeError("secret detail")
    response = app.client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"X-Request-ID": "abc"}
    )
    assert response.status_code == 500
    assert "abc" in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert "request abc failed" in caplog.text
    assert "secret detail" in caplog.text
    app.pipeline.record.error = None
    assert app.post().status_code == 200, "one failure must not hurt the next request"


def test_a_job_that_does_not_fit_into_memory_says_so_and_is_not_sent_again(
    in_process: Make,
) -> None:
    app = in_process()
    app.pipeline.record.error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB."
    )
    response = app.client.post("/v1/images/generations", json={"prompt": "x"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "out_of_memory"
    assert "not enough memory" in error["message"]
    assert response.headers["X-Request-ID"] in error["message"]
    assert "GiB" not in error["message"]
    assert response.headers["X-Should-Retry"] == "false"
    metrics = app.client.get("/metrics").text
    assert 'stepweave_out_of_memory_failures_total{model_name="shapes"} 1.0' in metrics
    assert 'stepweave_requests_total{client="",model_name="shapes",outcome="failed"} 1.0' in metrics


def test_while_loading_everything_is_503_but_livez(in_process: Make) -> None:
    app = in_process(ready=False)
    assert app.client.get("/livez").status_code == 200
    for response in (app.client.get("/readyz"), app.client.get("/v1/models"), app.post()):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "loading"
        assert int(response.headers["Retry-After"]) >= 1
    body = app.client.get("/readyz").json()
    assert (body["stage"], body["progress"]) == ("starting", 0.0)


def test_a_model_that_cannot_load_fails_readyz_and_livez(in_process: Make) -> None:
    class Needing:
        def __call__(self, prompt: str, network: torch.nn.Module) -> None: ...

    app = in_process(ready=False)
    app.server._load_pipeline = lambda *_: (Needing(), Preset())
    app.server.start()
    app.server._loader.join(SECONDS)
    for path in ("/readyz", "/livez"):
        response = app.client.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "load_failed"
        assert "Needing needs network, which requests cannot send" in response.json()["message"]


class Films(FakePipeline):
    """Whose class does not tell that it makes no images."""

    films = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        return SimpleNamespace(frames=[made.images]) if self.films else made


# as `inspect` would find it, were it written out
Films.__call__.__signature__ = inspect.signature(FakePipeline.__call__)  # type: ignore[attr-defined]


def test_what_makes_no_images_fails_its_warm_up(in_process: Make) -> None:
    app = in_process(ready=False)
    app.server._load_pipeline = lambda *_: (Films(), Preset())
    app.server.start()
    wait_until(lambda: app.server.status.stage in ("ready", "failed"))
    assert app.server.status.stage == "failed"
    assert (
        "Films makes no images: it returned frames (list)"
        in app.client.get("/readyz").json()["message"]
    )


def test_without_a_warm_up_the_first_request_tells_and_the_server_serves_no_more(
    in_process: Make,
) -> None:
    app = in_process(Films(), warmup=False)
    assert app.client.get("/readyz").status_code == 200
    told = "Films makes no images: it returned frames (list), and no list of images"
    error = app.post()
    assert error.status_code == 500
    assert error.json()["error"]["code"] == "no_images"
    assert told in error.json()["error"]["message"]
    for path in ("/readyz", "/livez"):
        response = app.client.get(path)
        assert response.status_code == 503
        assert told in response.json()["message"]
    refused = app.post()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "load_failed"


def test_a_model_that_has_made_images_is_not_given_up_for_one_result(in_process: Make) -> None:
    pipeline = Films()
    pipeline.films = False
    app = in_process(pipeline, warmup=False)
    assert app.post().status_code == 200
    pipeline.films = True
    assert app.post().json()["error"]["code"] == "no_images"
    assert app.client.get("/readyz").status_code == 200
    pipeline.films = False
    assert app.post().status_code == 200


def test_beyond_the_queue_is_429_with_retry_after(in_process: Make) -> None:
    app = in_process(max_queue=2)
    app.pipeline.record.gated = True
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(app.post().status_code)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    app.until_metric(3, "stepweave_requests_in_flight")
    # the engine's thread takes the third a moment later
    app.until_metric(2, "stepweave_requests_waiting")
    refused = app.post()
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "the limit is 3" in refused.json()["error"]["message"]
    assert int(refused.headers["Retry-After"]) >= 1
    app.pipeline.record.release.set()
    for thread in threads:
        thread.join(SECONDS)
    assert answers == [200, 200, 200]
    app.until_metric(0, "stepweave_requests_in_flight")
    app.until_metric(1, "stepweave_requests_total", outcome="refused")


def test_an_unknown_field_of_any_length_makes_a_short_answer(in_process: Make) -> None:
    response = in_process().post(**{"x" * 500_000: 1})
    assert response.status_code == 400
    assert len(response.content) < 1000


def test_a_client_that_leaves_while_it_sends_the_body_is_cancelled_not_failed(
    in_process: Make,
) -> None:
    app = in_process()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    for path in ("/v1/images/generations", "/generate"):
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("testserver", 80),
            "client": ("testclient", 1),
            "asgi": {"version": "3.0"},
        }
        anyio.run(app.client.app, scope, receive, send)
    assert {message["status"] for message in sent if "status" in message} == {499}
    app.until_metric(2, "stepweave_requests_total", outcome="cancelled")
    assert app.metric("stepweave_requests_total", outcome="failed") == 0


@pytest.mark.parametrize(("setting", "value"), [("max_steps", 27), ("max_pixels", 4096 - 1)])
def test_a_limit_below_the_models_default_fails_the_start(setting: str, value: int) -> None:
    with pytest.raises(
        (LoadError, ValueError), match=f"STEPWEAVE_{setting.upper()}={value}|greater than or equal"
    ):
        ServedModel(FakePipeline(), Preset(), Settings(**{setting: value}))


def test_the_shortest_limits_still_start(in_process: Make) -> None:
    assert (
        in_process(max_steps=28, max_prompt_characters=1, max_images=1).post(prompt="x").status_code
        == 200
    )
