"""The Open Inference Protocol v2 on a fake pipeline; tests/clients has the real clients."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import math
import re
import struct
import threading
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepweave import __version__
from stepweave.api.open_inference.requests import INPUTS
from stepweave.api.open_inference.tensors import (
    INTEGERS,
    InferenceRequest,
    InputParameters,
    InputTensor,
    OutputTensor,
    read_inputs,
    read_message,
    write_message,
)
from stepweave.api.routes.open_inference import together
from stepweave.errors import InvalidRequestError
from stepweave.serving.status import Status
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.waiting import SECONDS, wait_until

Make = Callable[..., InProcess]
INFER = "/v2/models/shapes/infer"
LENGTH = "Inference-Header-Content-Length"


def tensor(name: str, datatype: str, data: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": data, **more}


PROMPT = tensor("prompt", "BYTES", ["a red circle"])


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(one)) + one for one in elements)


def binary(name: str, datatype: str, raw: bytes, count: int = 1) -> tuple[dict[str, Any], bytes]:
    return {
        "name": name,
        "datatype": datatype,
        "shape": [count],
        "parameters": {"binary_data_size": len(raw)},
    }, raw


def infer(app: InProcess, *inputs: dict[str, Any], **more: Any) -> httpx.Response:
    return app.client.post(INFER, json={"inputs": list(inputs), **more})


def infer_binary(
    app: InProcess, *tensors: tuple[dict[str, Any], bytes], **more: Any
) -> httpx.Response:
    head = json.dumps({"inputs": [one for one, _ in tensors], **more}).encode()
    body = head + b"".join(raw for _, raw in tensors)
    return app.client.post(INFER, content=body, headers={LENGTH: str(len(head))})


def outputs(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def resolved(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(text) for text in outputs(answer)["parameters"]["data"]]


def refused(answer: httpx.Response, **beside: bool) -> tuple[int, str, str]:
    """Status, code and text of an error in the protocol's shape."""
    body = answer.json()
    text = body.pop("error")
    assert body == beside
    assert isinstance(text, str)
    assert answer.headers["x-request-id"]
    return answer.status_code, answer.headers["x-stepweave-code"], text


def pixels(data: bytes | str) -> bytes:
    return Image.open(
        io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data)
    ).tobytes()


# Metadata and health


def test_the_server_tells_what_it_is(in_process: Make) -> None:
    assert in_process(ready=False).client.get("/v2").json() == {
        "name": "stepweave", "version": __version__,
        "extensions": ["binary_tensor_data", "model_configuration", "model_repository"],
    }  # fmt: skip


def test_the_model_tells_what_it_takes(in_process: Make) -> None:
    app = in_process(warmup=False)
    for path in ("/v2/models/shapes", "/v2/models/shapes/versions/1"):
        metadata = app.client.get(path).json()
        assert {name: metadata[name] for name in ("name", "versions", "platform")} == {
            "name": "shapes", "versions": ["1"], "platform": "diffusers_FakePipeline",
        }  # fmt: skip
        assert {one["name"]: one["datatype"] for one in metadata["inputs"]} == {
            "prompt": "BYTES",
            "negative_prompt": "BYTES",
            "size": "BYTES",
            "seed": "INT64",
            "num_inference_steps": "INT32",
            "guidance_scale": "FP32",
        }
        assert {one["name"]: one["datatype"] for one in metadata["outputs"]} == {
            "image": "BYTES",
            "parameters": "BYTES",
        }
        assert {tuple(one["shape"]) for one in metadata["inputs"] + metadata["outputs"]} == {(-1,)}


class Plain(FakePipeline):
    """Knows neither guidance nor negative prompts."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Any:
        return super().__call__(
            prompt, None, height, width, num_inference_steps, generator=generator
        )


def test_inputs_that_the_pipeline_lacks_are_not_there(in_process: Make) -> None:
    app = in_process(Plain(), warmup=False)
    metadata = app.client.get("/v2/models/shapes").json()
    assert [one["name"] for one in metadata["inputs"]] == [
        "prompt",
        "size",
        "seed",
        "num_inference_steps",
    ]
    answer = infer(app, PROMPT, tensor("guidance_scale", "FP32", [3.0]))
    assert refused(answer)[0] == 400
    assert "Tensor 'guidance_scale': there is no such input" in refused(answer)[2]
    assert infer(app, PROMPT).status_code == 200


def test_health_before_during_and_after(in_process: Make) -> None:
    app = in_process(ready=False)

    def get(path: str) -> tuple[int, Any]:
        answer = app.client.get(path)
        if answer.status_code == 200:
            return 200, answer.json()
        name = path.rpartition("/")[2]
        return refused(answer, **({name: False} if path.startswith("/v2/health/") else {}))[:2]

    assert get("/v2/health/live") == (200, {"live": True})
    for path in ("/v2/health/ready", "/v2/models/shapes/ready", "/v2/models/shapes"):
        assert get(path) == (503, "loading")
        assert app.client.get(path).headers["retry-after"] == "5"
    assert infer(app, PROMPT).status_code == 503
    app.server.status = Status("failed", 0.0, "no such file")
    assert [get(f"/v2/health/{name}")[0] for name in ("live", "ready")] == [503, 503]
    app = in_process(warmup=False)
    with mock.patch.object(app.server, "health", lambda: Status("stuck", 0.0)):
        paths = ("/v2/health/live", "/v2/health/ready", "/v2/models/shapes/ready")
        assert [get(path)[1] for path in paths] == ["engine_stuck"] * 3
    with mock.patch.object(app.server, "health", lambda: Status("draining", 0.0)):
        assert [get(path)[0] for path in paths] == [200, 503, 503]
    assert get("/v2/health/ready") == (200, {"ready": True})
    for path in ("/v2/models/shapes/ready", "/v2/models/shapes/versions/1/ready"):
        assert get(path) == (200, {"name": "shapes", "ready": True})


@pytest.mark.parametrize(
    "path",
    ["models/nothing", "models/shapes/versions/2", "models/shapes/versions/", "models/SHAPES"],
)
def test_other_models_and_versions_are_not_found(in_process: Make, path: str) -> None:
    app = in_process(warmup=False)
    answers = [app.client.get(f"/v2/{path}"), app.client.get(f"/v2/{path}/ready")]
    answers.append(app.client.post(f"/v2/{path}/infer", json={"inputs": [PROMPT]}))
    assert {refused(answer)[:2] for answer in answers} == {(404, "model_not_found")}


def test_a_models_id_may_have_a_slash(in_process: Make) -> None:
    app = in_process(warmup=False, model="owner/name", revision="0" * 40)
    for name in ("owner/name", "owner%2Fname"):
        for path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/1"):
            assert app.client.get(path).json()["name"] == "owner/name"
            assert app.client.get(f"{path}/ready").json()["ready"] is True
            answer = app.client.post(f"{path}/infer", json={"inputs": [PROMPT]})
            assert answer.json()["model_name"] == "owner/name"


# Inference


def test_an_image_and_all_its_parameters_as_json(in_process: Make) -> None:
    app = in_process()
    answer = infer(
        app,
        PROMPT,
        tensor("negative_prompt", "BYTES", ["blue"]),
        tensor("size", "BYTES", ["32x48"]),
        tensor("seed", "INT64", [7]),
        tensor("num_inference_steps", "INT32", [3]),
        tensor("guidance_scale", "FP32", [2.5]),
        id="42",
    )
    assert answer.headers["content-type"] == "application/json"
    assert {name: value for name, value in answer.json().items() if name != "outputs"} == {
        "id": "42", "model_name": "shapes", "model_version": "1",
    }  # fmt: skip
    image = outputs(answer)["image"]
    assert image["parameters"] == {"content_type": "image/png", "encoding": "base64"}
    assert (image["datatype"], image["shape"]) == ("BYTES", [1])
    assert resolved(answer) == [
        {
            "prompt": "a red circle",
            "negative_prompt": "blue",
            "seed": 7,
            "size": "32x48",
            "num_inference_steps": 3,
            "guidance_scale": 2.5,
            "output_format": "png",
            "model": "shapes",
            "flagged": False,
            "warnings": [],
        }
    ]
    same = app.post(seed=7, size="32x48").json()["data"][0]["b64_json"]
    assert pixels(image["data"][0]) == pixels(same)


def test_an_id_that_is_not_given_is_not_answered(in_process: Make) -> None:
    assert "id" not in infer(in_process(warmup=False), PROMPT).json()


def test_each_prompt_is_an_image_with_values_of_its_own(in_process: Make) -> None:
    app = in_process(warmup=False)
    answer = infer(
        app,
        tensor("prompt", "BYTES", ["a", "b", "c"]),
        tensor("seed", "UINT8", [3, 2, 1]),
        tensor("num_inference_steps", "INT16", [2, 3, 4]),
        tensor("guidance_scale", "FP64", [1.5]),
    )
    values = [
        (one["prompt"], one["seed"], one["num_inference_steps"], one["guidance_scale"])
        for one in resolved(answer)
    ]
    assert values == [("a", 3, 2, 1.5), ("b", 2, 3, 1.5), ("c", 1, 4, 1.5)]
    images = outputs(answer)["image"]["data"]
    for image, seed in zip(images, (3, 2, 1), strict=True):
        assert pixels(image) == pixels(app.post(seed=seed).json()["data"][0]["b64_json"])


def test_the_images_of_a_request_are_made_at_once(in_process: Make) -> None:
    app = in_process(warmup=False, batching="threads", threads=3)
    record = app.pipeline.record
    record.gated = True
    thread = threading.Thread(target=infer, args=(app, tensor("prompt", "BYTES", ["a", "b", "c"])))
    thread.start()
    wait_until(lambda: record.running == 3)
    record.release.set()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_binary_tensors_both_ways(in_process: Make) -> None:
    app = in_process(warmup=False)
    prompts = packed("ein weißer Stern".encode(), b"a star")
    answer = infer_binary(
        app,
        binary("prompt", "BYTES", prompts, 2),
        binary("seed", "INT64", struct.pack("<2q", 5, 2**40), 2),
        binary("guidance_scale", "FP32", struct.pack("<f", 7.3)),
        parameters={"binary_data_output": True},
    )
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[LENGTH])
    head, tail = json.loads(answer.content[:length]), answer.content[length:]
    image, parameters = head["outputs"]
    assert "data" not in image
    assert image["parameters"]["content_type"] == "image/png"
    assert "encoding" not in image["parameters"]
    size = image["parameters"]["binary_data_size"]
    first = struct.unpack_from("<I", tail)[0]
    assert pixels(tail[4 : 4 + first]) == pixels(app.post(seed=5).json()["data"][0]["b64_json"])
    assert size + parameters["parameters"]["binary_data_size"] == len(tail)
    values = json.loads(tail[size + 4 : size + 4 + struct.unpack_from("<I", tail, size)[0]])
    # 7.3 in single precision is 7.30000019...; the caller said 7.3
    assert (values["prompt"], values["seed"], values["guidance_scale"]) == (
        "ein weißer Stern",
        5,
        7.3,
    )


def test_json_and_binary_tensors_may_be_mixed(in_process: Make) -> None:
    app = in_process(warmup=False)
    answer = infer_binary(
        app,
        (PROMPT, b""),
        binary("seed", "UINT16", struct.pack("<H", 5)),
        outputs=[{"name": "parameters"}, {"name": "image", "parameters": {"binary_data": True}}],
    )
    length = int(answer.headers[LENGTH])
    parameters, image = json.loads(answer.content[:length])["outputs"]
    assert json.loads(parameters["data"][0])["seed"] == 5
    assert image["parameters"]["binary_data_size"] == len(answer.content) - length
    assert Image.open(io.BytesIO(answer.content[length + 4 :])).size == (64, 64)


def test_outputs_are_selected_and_a_wish_of_their_own_wins(in_process: Make) -> None:
    app = in_process(warmup=False)
    only = infer(app, PROMPT, outputs=[{"name": "parameters"}])
    assert [output["name"] for output in only.json()["outputs"]] == ["parameters"]
    own = [{"name": "parameters", "parameters": {"binary_data": False}}]
    answer = infer(app, PROMPT, outputs=own, parameters={"binary_data_output": True})
    assert LENGTH not in answer.headers
    assert "data" in answer.json()["outputs"][0]


def test_parameters_hold_for_all_images(in_process: Make) -> None:
    app = in_process(warmup=False)
    assert app.server.engine is not None
    shared = {
        "seed": 4,
        "size": "32x32",
        "num_inference_steps": 2,
        "guidance_scale": 3,
        "output_format": "jpeg",
        "reproducible": True,
    }
    with mock.patch.object(app.server.engine, "submit", wraps=app.server.engine.submit) as submit:
        more = {"negative_prompt": "blue", "priority": "high", "deadline_ms": 60_000}
        answer = infer(app, tensor("prompt", "BYTES", ["a", "b"]), parameters=shared | more)
        assert submit.call_args.kwargs["priority"] == "high"
        assert 30 < submit.call_args.kwargs["deadline"] <= 60
        for priority, name in ((1, "high"), (2, "normal"), (3, "low")):
            infer(app, PROMPT, parameters={"priority": priority, "timeout": 30_000_001})
            assert submit.call_args.kwargs["priority"] == name
            assert 15 < submit.call_args.kwargs["deadline"] <= 30.001
    for value in resolved(answer):
        assert {name: value[name] for name in shared} == shared
        assert value["negative_prompt"] == "blue"
    image = outputs(answer)["image"]
    assert image["parameters"]["content_type"] == "image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(image["data"][0]))).format == "JPEG"


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integers_of_every_type(in_process: Make, datatype: str) -> None:
    app = in_process(warmup=False)
    raw = (9).to_bytes(int(re.sub(r"\D", "", datatype)) // 8, "little")
    answer = infer_binary(app, (PROMPT, b""), binary("seed", datatype, raw))
    assert resolved(answer)[0]["seed"] == 9


@pytest.mark.parametrize("nested", [False, True])
def test_a_second_dimension_of_one_is_none(in_process: Make, nested: bool) -> None:
    app = in_process(warmup=False)

    def column(name: str, datatype: str, data: list[Any]) -> dict[str, Any]:
        return tensor(
            name, datatype, [[one] for one in data] if nested else data, shape=[len(data), 1]
        )

    answer = infer(
        app,
        column("prompt", "BYTES", ["a", "b"]),
        column("seed", "INT64", [5, 6]),
        column("guidance_scale", "FP32", [2.5]),
        tensor("num_inference_steps", "INT32", [3]),
    )
    found = [(one["prompt"], one["seed"], one["guidance_scale"]) for one in resolved(answer)]
    assert found == [("a", 5, 2.5), ("b", 6, 2.5)]
    raw = packed(b"a", b"b")
    described = {
        "name": "prompt",
        "datatype": "BYTES",
        "shape": [2, 1, 1],
        "parameters": {"binary_data_size": len(raw)},
    }
    assert [one["prompt"] for one in resolved(infer_binary(app, (described, raw)))] == ["a", "b"]


def test_parameters_that_are_not_known_are_ignored_with_a_warning(in_process: Make) -> None:
    app = in_process(warmup=False)
    answer = infer(
        app,
        PROMPT | {"parameters": {"more": 1, **{f"x{i}": i for i in range(100)}}},
        tensor("num_inference_steps", "INT32", [3]) | {"parameters": None},
        parameters={
            "steps": 3,
            "prompt": "b",
            "sequence_id": 7,
            "seed": 4,
            "priority": None,
            "reproducible": None,
        },
        outputs=[
            {"name": name, "parameters": {"classification": 1, "shared_memory_offset": 1}}
            for name in ("image", "parameters")
        ],
    )
    (found,) = resolved(answer)
    assert (found["prompt"], found["seed"]) == ("a red circle", 4)
    assert "data" in outputs(answer)["image"]
    (warning,) = found["warnings"]
    assert warning.startswith(
        "Unknown parameters are ignored: 'steps', 'prompt', 'sequence_id'. Those that are known "
        "are "
    )
    many = infer(app, PROMPT, parameters={f"{'x' * 500}{i}": i for i in range(1000)})
    assert len(resolved(many)[0]["warnings"][0]) < 1500
    nothing = infer(app, PROMPT, parameters=None, outputs=None, id=None)
    assert resolved(nothing)[0]["warnings"] == []
    assert "id" not in nothing.json()


def test_json_after_a_byte_order_mark(in_process: Make) -> None:
    app = in_process(warmup=False)
    body = b"\xef\xbb\xbf" + json.dumps({"inputs": [PROMPT]}).encode()
    assert resolved(app.client.post(INFER, content=body))[0]["prompt"] == "a red circle"
    described, raw = binary("prompt", "BYTES", packed(b"abc"))
    head = b"\xef\xbb\xbf" + json.dumps({"inputs": [described]}).encode()
    answer = app.client.post(INFER, content=head + raw, headers={LENGTH: str(len(head))})
    assert resolved(answer)[0]["prompt"] == "abc"


# What Triton's and KServe's clients ask beside


def test_the_model_is_listed(in_process: Make) -> None:
    loading = in_process(ready=False).client
    assert refused(loading.get("/v2/models"))[:2] == (503, "loading")
    assert refused(loading.post("/v2/repository/index"))[:2] == (503, "loading")
    app = in_process(warmup=False)
    assert app.client.get("/v2/models").json() == {"models": ["shapes"]}
    ready = [{"name": "shapes", "version": "1", "state": "READY", "reason": ""}]
    for body in (b"", b"{}", b'{"ready": true}', b'{"ready": false}', b'{"ready": null}'):
        assert app.client.post("/v2/repository/index", content=body).json() == ready
    with mock.patch.object(
        app.server, "health", lambda: Status("stuck", 0.0, "no step for an hour")
    ):
        (listed,) = app.client.post("/v2/repository/index").json()
        assert (listed["state"], "no step for an hour" in listed["reason"]) == ("UNAVAILABLE", True)
        assert app.client.post("/v2/repository/index", json={"ready": True}).json() == []
    for body in (b"[]", b"{", b'{"ready": "yes"}', b'{"more": 1}'):
        assert refused(app.client.post("/v2/repository/index", content=body))[0] == 400
    assert refused(app.client.get("/v2/repository/index"))[:2] == (405, "method_not_allowed")


def test_the_models_configuration_is_told_as_triton_does(in_process: Make) -> None:
    app = in_process(Plain(), warmup=False)
    for path in ("/v2/models/shapes/config", "/v2/models/shapes/versions/1/config"):
        told = app.client.get(path).json()
        assert (told["name"], told["max_batch_size"]) == ("shapes", 0)
        assert {one["name"]: (one["data_type"], one["optional"]) for one in told["input"]} == {
            "prompt": ("TYPE_STRING", False),
            "size": ("TYPE_STRING", True),
            "seed": ("TYPE_INT64", True),
            "num_inference_steps": ("TYPE_INT32", True),
        }
        assert [one["name"] for one in told["output"]] == ["image", "parameters"]
    assert refused(app.client.get("/v2/models/other/config"))[:2] == (404, "model_not_found")


@pytest.mark.parametrize("names", [(), ("*",)])
@pytest.mark.parametrize(
    ("method", "path", "shown"),
    [
        ("GET", "models/shapes/nothing", "nothing"),
        ("POST", "repository/models/shapes/load", "explicit model load / unload is not allowed"),
        (
            "POST",
            "repository/models/owner/name/unload",
            "explicit model load / unload is not allowed",
        ),
        ("POST", "repository/other/index", "POST /v2/repository/index"),
        ("GET", "models/stats", "GET /metrics"),
        ("GET", "models/shapes/stats", "GET /metrics"),
        ("GET", "models/shapes/versions/1/stats", "GET /metrics"),
        ("GET", "models/shapes/trace/setting", "no tracing"),
        ("GET", "trace/setting", "no tracing"),
        ("POST", "trace/setting", "no tracing"),
        ("GET", "logging", "the log"),
        ("POST", "logging", "the log"),
        ("GET", "systemsharedmemory/status", "no shared memory"),
        ("POST", "systemsharedmemory/region/a/register", "no shared memory"),
        ("POST", "cudasharedmemory/unregister", "no shared memory"),
        ("GET", "cudasharedmemory/region/a/status", "no shared memory"),
        ("GET", "nothing", "There is no route '/v2/nothing'"),
    ],
)
def test_what_triton_has_and_this_server_does_not_is_refused_with_a_reason(
    in_process: Make, method: str, path: str, shown: str, names: tuple[str, ...]
) -> None:
    client = in_process(warmup=False, model_names=names).client
    answer = client.request(method, f"/v2/{path}", json={"a": 1} if method == "POST" else None)
    assert refused(answer)[0] == 404
    assert shown in refused(answer)[2]


@pytest.mark.parametrize("names", [(), ("*",)])
def test_a_request_that_is_to_be_posted_is_405(in_process: Make, names: tuple[str, ...]) -> None:
    answer = in_process(warmup=False, model_names=names).client.get("/v2/models/shapes/infer")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_zero_is_tritons_default(in_process: Make) -> None:
    app = in_process(warmup=False)
    infer(app, PROMPT, parameters={"priority": 0, "timeout": 0})
    assert len(app.pipeline.record.calls) == 1


def test_more_prompts_than_there_are_places_is_no_matter_of_time(in_process: Make) -> None:
    app = in_process(warmup=False, max_queue=1, batching="off")
    body = {"inputs": [{**PROMPT, "shape": [3], "data": ["a", "b", "c"]}]}
    answer = app.client.post(INFER, json=body)
    assert refused(answer)[0] == 400
    assert "the limit is 1 to 2 elements" in refused(answer)[2]
    assert "retry-after" not in answer.headers


def test_a_timeout_that_has_passed_is_named_as_it_was_sent(in_process: Make) -> None:
    app = in_process(warmup=False)
    app.pipeline.record.pause = 0.05
    answer = app.client.post(INFER, json={"inputs": [PROMPT], "parameters": {"timeout": 1500}})
    assert refused(answer)[0] == 504
    assert "timeout is 1500 microseconds" in refused(answer)[2]


def test_every_error_is_a_text(in_process: Make) -> None:
    """Those of the middleware and of Starlette too."""
    app = in_process(warmup=False, api_keys="secret", max_body_bytes=1024)
    key = {"Authorization": "Bearer secret"}
    unauthorized = app.client.get("/v2")
    assert refused(unauthorized)[:2] == (401, "invalid_api_key")
    assert unauthorized.headers["www-authenticate"] == "Bearer"
    wrong = app.client.post("/v2/health/ready", headers=key)
    assert refused(wrong)[:2] == (405, "method_not_allowed")
    assert wrong.headers["allow"]
    asked = app.client.get(INFER, headers=key)
    assert refused(asked) == (405, "method_not_allowed", f"GET is not allowed on {INFER}.")
    assert asked.headers["allow"] == "POST"
    long = app.client.post(INFER, content=b"x" * 2000, headers=key)
    assert refused(long)[:2] == (413, "body_too_large")
    encoded = app.client.post(INFER, content=b"x", headers={**key, "Content-Encoding": "br"})
    assert refused(encoded)[:2] == (415, "unsupported_media_type")
    assert encoded.headers["accept-encoding"] == "gzip, deflate, identity"
    page = app.client.post(INFER, json={}, headers={**key, "Origin": "https://evil.test"})
    assert refused(page)[:2] == (400, "cross_site")
    app.pipeline.record.pause = 0.2
    late = app.client.post(
        INFER, json={"inputs": [PROMPT], "parameters": {"deadline_ms": 500}}, headers=key
    )
    assert refused(late)[0] in (429, 504)


# What is refused


@pytest.mark.parametrize(
    ("body", "param", "shown"),
    [
        ([], None, "[]"),
        ({}, "inputs", "missing"),
        ({"inputs": []}, "prompt", "missing"),
        ({"inputs": [tensor("seed", "INT64", [1])]}, "prompt", "missing"),
        ({"inputs": [PROMPT, PROMPT]}, "prompt", "given twice"),
        ({"inputs": [PROMPT, tensor("steps", "INT64", [1])]}, "steps", "the inputs are prompt, "),
        (
            {"inputs": [PROMPT, tensor("seed", "FP32", [1.0])]},
            "seed",
            "its datatype is 'FP32'; INT64",
        ),
        (
            {"inputs": [PROMPT, tensor("guidance_scale", "INT32", [1])]},
            "guidance_scale",
            "FP32, FP64 would do",
        ),
        ({"inputs": [tensor("prompt", "STRING", ["a"])]}, "prompt", "BYTES would do"),
        (
            {"inputs": [PROMPT | {"shape": [2]}]},
            "prompt",
            "its shape is [2], but it has 1 elements",
        ),
        (
            {"inputs": [PROMPT | {"shape": []}]},
            "prompt",
            "its shape is []; it must be [n] or [n, 1]",
        ),
        (
            {"inputs": [PROMPT | {"shape": [1, 2]}]},
            "prompt",
            "its shape is [1, 2]; it must be [n] or [n, 1]",
        ),
        ({"inputs": [PROMPT | {"shape": [1, 0]}]}, "prompt", "[1, 0]"),
        (
            {"inputs": [PROMPT | {"shape": [2, 1]}]},
            "prompt",
            "its shape is [2, 1], but it has 1 elements",
        ),
        (
            {"inputs": [PROMPT | {"shape": [1, 1], "data": [["a", "b"]]}]},
            "prompt",
            "['a', 'b'] is no BYTES",
        ),
        (
            {"inputs": [PROMPT | {"shape": [1, 1], "data": [[["a"]]]}]},
            "prompt",
            "['a'] is no BYTES",
        ),
        ({"inputs": [PROMPT | {"shape": [-1]}]}, "prompt", "-1"),
        ({"inputs": [PROMPT | {"shape": [1.5]}]}, "prompt", "1.5"),
        ({"inputs": [PROMPT | {"shape": [True]}]}, "prompt", "True"),
        ({"inputs": [PROMPT | {"shape": "1"}]}, "prompt", "'1'"),
        ({"inputs": [PROMPT | {"more": 1}]}, "prompt", "Unknown field"),
        (
            {
                "inputs": [
                    {
                        "name": "prompt",
                        "shape": [1],
                        "datatype": "BYTES",
                        "parameters": {"shared_memory_region": "a"},
                    }
                ]
            },
            "prompt",
            "there is no shared memory here",
        ),
        (
            {"inputs": [{"name": "prompt", "shape": [1], "data": ["a"]}]},
            "prompt",
            "datatype is missing",
        ),
        (
            {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES"}]},
            "prompt",
            "either in data or",
        ),
        (
            {"inputs": [PROMPT | {"parameters": {"binary_data_size": 4}}]},
            "prompt",
            "either in data or",
        ),
        (
            {"inputs": [{"shape": [1], "datatype": "BYTES", "data": ["a"]}]},
            "inputs.0.name",
            "missing",
        ),
        ({"inputs": [3]}, "inputs.0", "3"),
        ({"inputs": [tensor("prompt", "BYTES", [3])]}, "prompt", "3 is no BYTES"),
        ({"inputs": [tensor("prompt", "BYTES", [["a"]])]}, "prompt", "is no BYTES"),
        ({"inputs": [tensor("prompt", "BYTES", [])]}, "prompt", "the limit is 1 to 8 elements"),
        ({"inputs": [tensor("prompt", "BYTES", ["a"] * 9)]}, "prompt", "its shape is [9]"),
        ({"inputs": [tensor("prompt", "BYTES", ["a", ""])]}, "prompt", "element 1: "),
        (
            {"inputs": [PROMPT, tensor("seed", "INT64", [1, 2])]},
            "seed",
            "its shape is [2]; it must be [1]",
        ),
        ({"inputs": [PROMPT, tensor("seed", "INT64", [True])]}, "seed", "True is no INT64"),
        ({"inputs": [PROMPT, tensor("seed", "INT64", [1.0])]}, "seed", "1.0 is no INT64"),
        ({"inputs": [PROMPT, tensor("seed", "INT64", [-1])]}, "seed", "-1"),
        ({"inputs": [PROMPT, tensor("seed", "UINT8", [256])]}, "seed", "out of the range of UINT8"),
        ({"inputs": [PROMPT, tensor("seed", "INT64", [2**53])]}, "seed", str(2**53)),
        (
            {"inputs": [PROMPT, tensor("num_inference_steps", "INT32", [201])]},
            "num_inference_steps",
            "limit is 200",
        ),
        ({"inputs": [PROMPT, tensor("size", "BYTES", ["7x7"])]}, "size", "multiples of 8"),
        ({"inputs": [PROMPT, tensor("size", "BYTES", ["big"])]}, "size", "WIDTHxHEIGHT"),
        (
            {"inputs": [PROMPT], "outputs": [{"name": "mask"}]},
            "mask",
            "the outputs are image, parameters",
        ),
        ({"inputs": [PROMPT], "outputs": [{"name": "image"}, {"name": "image"}]}, "image", "twice"),
        (
            {"inputs": [PROMPT], "outputs": [{"name": "image", "parameters": {"binary_data": 1}}]},
            "image",
            "binary_data",
        ),
        ({"inputs": [PROMPT], "parameters": []}, "parameters", "[]"),
        ({"inputs": [PROMPT], "parameters": {"seed": [1]}}, "seed", "[1]"),
        ({"inputs": [PROMPT], "parameters": {"seed": "1"}}, "seed", "'1'"),
        ({"inputs": [PROMPT], "parameters": {"output_format": "gif"}}, "output_format", "'gif'"),
        (
            {"inputs": [PROMPT], "parameters": {"binary_data_output": 1}},
            "binary_data_output",
            "true or false",
        ),
        ({"inputs": [PROMPT], "parameters": {"priority": 4}}, "priority", "3 (low)"),
        ({"inputs": [PROMPT], "parameters": {"timeout": -1}}, "timeout", "microseconds"),
        (
            {
                "inputs": [PROMPT],
                "outputs": [{"name": "image", "parameters": {"shared_memory_region": "a"}}],
            },
            "image",
            "no shared memory",
        ),
        ({"inputs": [PROMPT], "parameters": {"timeout": 1, "deadline_ms": 1}}, "timeout", "both"),
        (
            {"inputs": [PROMPT, tensor("seed", "INT8", [1])], "parameters": {"seed": 1}},
            "seed",
            "as a parameter",
        ),
        ({"inputs": [PROMPT], "model_name": "other"}, "model_name", "the path says 'shapes'"),
        ({"inputs": [PROMPT], "id": 42}, "id", "42"),
        ({"inputs": [PROMPT], "more": 1}, "more", "Unknown field"),
    ],
)
def test_json_that_is_wrong(in_process: Make, body: Any, param: str | None, shown: str) -> None:
    app = in_process(warmup=False)
    answer = app.client.post(INFER, json=body)
    status, _, text = refused(answer)
    assert status == 400
    assert shown in text
    assert (param or "") in text
    assert app.pipeline.record.calls == []
    assert app.metric("stepweave_requests_total", outcome="invalid") >= 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
@pytest.mark.parametrize("place", ["inputs", "parameters"])
def test_numbers_that_are_none(in_process: Make, number: str, place: str) -> None:
    scale = json.dumps(tensor("guidance_scale", "FP32", [0.5])) if place == "inputs" else ""
    body = json.dumps({"inputs": [PROMPT, "SCALE"], "parameters": {"guidance_scale": 0.5}})
    body = body.replace(', "SCALE"', f", {scale}" if scale else "").replace("0.5", number)
    body = (
        body
        if place == "parameters"
        else body.replace(f', "parameters": {{"guidance_scale": {number}}}', "")
    )
    answer = in_process(warmup=False).client.post(INFER, content=body.encode())
    status, _, text = refused(answer)
    assert status == 400
    assert re.search("guidance_scale|not valid", text)


@pytest.mark.parametrize(
    ("name", "datatype", "raw", "shown"),
    [
        ("prompt", "BYTES", b"\x05", "element 0 ends within its length"),
        ("prompt", "BYTES", b"\x05\0\0\0abcd", "element 0 has 5 bytes, but 4 are left"),
        ("prompt", "BYTES", b"\xff\xff\xff\xffabcd", "4294967295 bytes"),
        ("prompt", "BYTES", packed(b"a") + b"\1", "element 1 ends within its length"),
        ("prompt", "BYTES", packed(b"a", b"b"), "its shape is [1], but it has 2 elements"),
        ("prompt", "BYTES", b"", "its shape is [1], but it has 0 elements"),
        ("prompt", "BYTES", packed(b"\xff"), "not UTF-8"),
        ("seed", "INT64", b"1234567", "no whole number of INT64"),
        ("seed", "INT64", struct.pack("<q", -5), "-5"),
        ("seed", "UINT64", struct.pack("<Q", 2**64 - 1), str(2**64 - 1)),
        ("guidance_scale", "FP32", struct.pack("<f", math.nan), "nan"),
        ("guidance_scale", "FP64", struct.pack("<d", math.inf), "inf"),
        ("guidance_scale", "FP64", struct.pack("<d", -1.0), "-1.0"),
    ],
)
def test_binary_tensors_that_are_wrong(
    in_process: Make, name: str, datatype: str, raw: bytes, shown: str
) -> None:
    others = () if name == "prompt" else ((PROMPT, b""),)
    answer = infer_binary(in_process(warmup=False), *others, binary(name, datatype, raw))
    status, _, text = refused(answer)
    assert status == 400
    assert shown in text
    assert name in text


@pytest.mark.parametrize("size", [-1, 6, 8, 2**70, "7", 7.0, True])
def test_sizes_of_binary_tensors_that_are_wrong(in_process: Make, size: Any) -> None:
    described, raw = binary("prompt", "BYTES", packed(b"abc"))
    answer = infer_binary(
        in_process(warmup=False), (described | {"parameters": {"binary_data_size": size}}, raw)
    )
    assert refused(answer)[0] == 400
    assert "Tensor 'prompt'" in refused(answer)[2]


@pytest.mark.parametrize("length", ["0", "-1", "100000", "x", "", "1e2", "\u00b2", "9" * 30])
def test_lengths_of_the_json_that_are_wrong(in_process: Make, length: str) -> None:
    body = json.dumps({"inputs": [PROMPT]}).encode()
    headers = {LENGTH.encode(): length.encode("latin-1")}
    answer = in_process(warmup=False).client.post(INFER, content=body, headers=headers)
    assert refused(answer)[0] == 400
    assert LENGTH in refused(answer)[2]


def test_bytes_that_belong_to_no_tensor(in_process: Make) -> None:
    answer = infer_binary(in_process(warmup=False), (PROMPT, b"xyz"))
    assert refused(answer)[0] == 400
    assert "3 bytes after the JSON" in refused(answer)[2]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 5000,
        b'{"inputs": "\\ud800"}',
        b"null",
        b'{"a": ' + b"9" * 9000 + b"}",
    ],
)
def test_bodies_that_are_no_json_object(in_process: Make, body: bytes) -> None:
    answer = in_process(warmup=False).client.post(INFER, content=body)
    assert refused(answer)[0] == 400
    assert len(refused(answer)[2]) < 400


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/octet-stream", 200),
        ("application/json; charset=utf-16", 415),
        ("text/plain", 415),
        ("multipart/form-data", 415),
    ],
)
def test_content_types(in_process: Make, content_type: str, status: int) -> None:
    body = json.dumps({"inputs": [PROMPT]}).encode()
    headers = {"Content-Type": content_type}
    assert (
        in_process(warmup=False).client.post(INFER, content=body, headers=headers).status_code
        == status
    )


def test_a_prompt_that_the_model_refuses_ends_the_others(in_process: Make) -> None:
    app = in_process(warmup=False)
    record = app.pipeline.record
    record.pause = 0.05
    answer = infer(
        app, tensor("prompt", "BYTES", ["a", " "]), parameters={"num_inference_steps": 200}
    )
    assert refused(answer)[0] == 400
    assert "element 1" in refused(answer)[2] or "prompt" in refused(answer)[2]
    wait_until(lambda: record.running == 0)
    assert record.steps_run < 150


# Compression


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("identity", bytes),
        ("GZIP", gzip.compress),
    ],
)
def test_compressed_requests(
    in_process: Make, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    described, raw = binary("prompt", "BYTES", packed(b"abc"))
    head = json.dumps({"inputs": [described]}).encode()
    headers = {"Content-Encoding": encoding, LENGTH: str(len(head))}
    answer = in_process(warmup=False).client.post(INFER, content=pack(head + raw), headers=headers)
    assert resolved(answer)[0]["prompt"] == "abc"


@pytest.mark.parametrize(
    ("encoding", "body", "status", "code"),
    [
        ("gzip", gzip.compress(bytes(100_000_000), mtime=0), 413, "body_too_large"),
        ("deflate", zlib.compress(bytes(100_000_000)), 413, "body_too_large"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-5], 400, "invalid_encoding"),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"x", 400, "invalid_encoding"),
        ("gzip", b"{}", 400, "invalid_encoding"),
        ("deflate", gzip.compress(b"{}", mtime=0), 400, "invalid_encoding"),
        ("gzip", b"", 400, "invalid_encoding"),
        ("br", b"{}", 415, "unsupported_media_type"),
        (
            "gzip, gzip",
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            415,
            "unsupported_media_type",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_compressed_bodies_that_are_wrong(
    in_process: Make, encoding: str, body: bytes, status: int, code: str
) -> None:
    answer = in_process(warmup=False).client.post(
        INFER, content=body, headers={"Content-Encoding": encoding}
    )
    assert refused(answer)[:2] == (status, code)


# Errors and cancellation


def test_one_that_is_refused_ends_the_others(in_process: Make) -> None:
    app = in_process(warmup=False, max_queue=1)
    record = app.pipeline.record
    record.pause = 0.05
    admission = app.server._admission
    assert admission is not None
    admission.enter()  # as another request does
    answer = infer(
        app, tensor("prompt", "BYTES", ["a", "b"]), parameters={"num_inference_steps": 200}
    )
    admission.leave()
    assert refused(answer)[:2] == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    wait_until(lambda: record.running == 0)
    assert record.steps_run < 150


def test_a_failed_generation_is_a_500(in_process: Make) -> None:
    app = in_process(warmup=False)
    app.pipeline.record.error = RuntimeError("secret")
    answer = infer(app, PROMPT)
    assert refused(answer)[0] == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in refused(answer)[2]


def test_a_client_that_leaves_ends_all_its_generations(in_process: Make) -> None:
    app = in_process(warmup=False, batching="threads", threads=2)
    record = app.pipeline.record
    record.pause = 0.05
    fields = {
        "inputs": [tensor("prompt", "BYTES", ["a", "b"])],
        "parameters": {"num_inference_steps": 200},
    }
    messages = iter(
        [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]
    )

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        if message is None:
            await anyio.to_thread.run_sync(wait_until, lambda: record.running == 2)
        return message or {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": INFER,
        "raw_path": INFER.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("testserver", 80),
        "client": ("testclient", 1),
        "asgi": {"version": "3.0"},
    }
    anyio.run(app.client.app, scope, receive, send)
    assert sent[0]["status"] == 499
    wait_until(lambda: record.running == 0)
    assert record.steps_run < 300


def test_the_first_error_ends_the_others() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(2 * SECONDS)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def failing() -> None:
        await asyncio.sleep(0)
        raise InvalidRequestError("wrong")

    with pytest.raises(InvalidRequestError, match="wrong"):
        asyncio.run(together([endless(), failing(), endless()]))
    assert ended == ["cancelled", "cancelled"]


# The wire format, whatever comes

KEYS = st.sampled_from(["name", "shape", "datatype", "data", "parameters", "binary_data_size"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
ANY = st.fixed_dictionaries(
    {"inputs": st.lists(JSON, max_size=3)},
    optional={"outputs": JSON, "id": JSON, "parameters": JSON},
)


@settings(max_examples=60, deadline=None)
@given(
    body=ANY.map(json.dumps).map(str.encode) | st.binary(max_size=60),
    length=st.none() | st.integers(-1, 80).map(str),
)
def test_any_message_is_read_or_refused(body: bytes, length: str | None) -> None:
    try:
        message, tail = read_message(body, length)
        read_inputs(message, tail, INPUTS)
    except InvalidRequestError as error:
        assert len(error.message) < 600


@settings(max_examples=60, deadline=None)
@given(
    raw=st.binary(max_size=40),
    name=st.sampled_from(list(INPUTS)),
    shape=st.integers(0, 6),
    data=st.data(),
)
def test_any_binary_tensor_is_read_or_refused(
    raw: bytes, name: str, shape: int, data: st.DataObject
) -> None:
    datatype = data.draw(st.sampled_from(INPUTS[name]))
    described = InputTensor(
        name=name,
        shape=[shape],
        datatype=datatype,
        parameters=InputParameters(binary_data_size=len(raw)),
    )
    try:
        found = read_inputs(InferenceRequest(inputs=[described]), raw, INPUTS)
    except InvalidRequestError as error:
        assert error.param == name
    else:
        assert len(found[name]) == shape


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(), max_size=5))
def test_texts_survive_the_binary_form(texts: list[str]) -> None:
    tensors = [OutputTensor("prompt", [text.encode() for text in texts], texts, True, {})]
    body, length = write_message(tensors, model_name="", model_version="1")
    assert length is not None
    (described,) = json.loads(body[:length])["outputs"]
    message = InferenceRequest.model_validate({"inputs": [described]})
    assert read_inputs(message, body[length:], INPUTS) == {"prompt": texts}
