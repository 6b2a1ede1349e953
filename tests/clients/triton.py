"""What tritonclient makes of the server: `python triton.py HOST:PORT MODEL` writes what it found to
stdout, as JSON.

Runs in an environment of its own, which has tritonclient and not Stepweave.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as client
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

PROMPTS = ["a large red circle on a blue background", "ein grünes Dreieck auf weißem Grund"]


def tensors(kind: Any, binary: bool) -> list[Any]:
    """Two prompts with seeds 5 and 6, two steps."""
    values = {
        "prompt": (np.array(PROMPTS, dtype=np.object_), "BYTES"),
        "seed": (np.array([5, 6], dtype=np.int64), "INT64"),
        "num_inference_steps": (np.array([2], dtype=np.int32), "INT32"),
        "guidance_scale": (np.array([3.5], dtype=np.float32), "FP32"),
    }
    found = []
    for name, (array, datatype) in values.items():
        found.append(kind(name, list(array.shape), datatype))
        found[-1].set_data_from_numpy(array, binary_data=binary)
    return found


def read(result: Any, binary: bool) -> dict[str, Any]:
    images = result.as_numpy("image").tolist()
    return {
        "response": {
            name: value for name, value in result.get_response().items() if name != "outputs"
        },
        "images": [base64.b64encode(one).decode() if binary else one for one in images],
        "parameters": [json.loads(one) for one in result.as_numpy("parameters").tolist()],
    }


def sync(url: str, model: str) -> dict[str, Any]:
    with client.InferenceServerClient(url, network_timeout=60, connection_timeout=60) as server:
        found: dict[str, Any] = {
            "live": server.is_server_live(),
            "ready": server.is_server_ready(),
            "model_ready": [
                server.is_model_ready(*one)
                for one in ((model,), (model, "1"), (model, "2"), ("nothing",))
            ],
            "metadata": server.get_server_metadata(),
            "model_metadata": server.get_model_metadata(model, "1"),
        }
        fixed = {"parameters": {"reproducible": True}, "request_id": "42"}
        inputs = tensors(client.InferInput, binary=True)
        found["binary"] = read(server.infer(model, inputs, **fixed), binary=True)
        for compression in ("gzip", "deflate"):
            result = server.infer(
                model, inputs, "1", request_compression_algorithm=compression, **fixed
            )
            found[compression] = read(result, binary=True)
        names = ("image", "parameters")
        outputs = [client.InferRequestedOutput(name, binary_data=False) for name in names]
        inputs = tensors(client.InferInput, binary=False)
        found["json"] = read(server.infer(model, inputs, outputs=outputs, **fixed), binary=False)
        only = server.infer(model, inputs, outputs=[client.InferRequestedOutput("parameters")])
        found["only"] = [output["name"] for output in only.get_response()["outputs"]]
        found["errors"] = []
        for name, wrong in (
            (model, {"parameters": {"seed": -1}}),
            ("nothing", {}),
            (model, {"model_version": "9"}),
        ):
            try:
                server.infer(name, inputs[:1], **wrong)
            except InferenceServerException as error:
                found["errors"].append([error.status(), error.message(), str(error)])
        columns = tensors(client.InferInput, binary=True)
        for one in columns[:3]:
            one.set_shape([*one.shape(), 1])
        found["columns"] = read(
            server.infer(model, columns, parameters={"reproducible": True, "more": 1}), binary=True
        )
        found["others"] = {
            name: outcome(server, name, arguments) for name, arguments in others(model).items()
        }
    called = {"close", "infer", *(name.partition(" ")[0] for name in others(model))}
    of_the_client_alone = {
        "generate_request_body",
        "parse_response_body",
        "plugin",
        "register_plugin",
        "unregister_plugin",
    }
    public = {name for name in dir(client.InferenceServerClient) if not name.startswith("_")}
    found["not called"] = sorted(
        public
        - called
        - of_the_client_alone
        - {"is_server_live", "is_server_ready", "is_model_ready", "get_server_metadata"}
        - {"get_model_metadata"}
    )
    return found


def others(model: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of the client's other methods, by name; a word after it says what is asked."""
    return {
        "get_model_config": (model,),
        "get_model_config version": (model, "1"),
        "get_model_repository_index": (),
        "load_model": (model,),
        "unload_model": (model,),
        "get_inference_statistics": (),
        "get_inference_statistics model": (model,),
        "get_inference_statistics version": (model, "1"),
        "get_trace_settings": (),
        "get_trace_settings model": (model,),
        "update_trace_settings": (None, {"trace_level": ["OFF"]}),
        "update_trace_settings model": (model, {"trace_level": ["OFF"]}),
        "get_log_settings": (),
        "update_log_settings": ({"log_verbose_level": 1},),
        "get_system_shared_memory_status": (),
        "register_system_shared_memory": ("a", "/a", 4),
        "unregister_system_shared_memory": (),
        "get_cuda_shared_memory_status": ("a",),
        "register_cuda_shared_memory": ("a", b"handle", 0, 4),
        "unregister_cuda_shared_memory": ("a",),
        "async_infer": ("nothing", tensors(client.InferInput, binary=True)),
    }


def outcome(server: Any, name: str, arguments: tuple[Any, ...]) -> Any:
    """What a method returns, or `[status, text]` of what it raises."""
    try:
        found = getattr(server, name.partition(" ")[0])(*arguments)
        return found.get_result() if name == "async_infer" else found
    except InferenceServerException as error:
        return [error.status(), str(error)]


async def asynchronous(url: str, model: str) -> dict[str, Any]:
    async with aio.InferenceServerClient(url) as server:
        found = {"ready": await server.is_server_ready()}
        fixed = {"parameters": {"reproducible": True}, "request_id": "43"}
        found["binary"] = read(
            await server.infer(model, tensors(aio.InferInput, binary=True), **fixed), binary=True
        )
        try:
            await server.infer("nothing", tensors(aio.InferInput, binary=True))
        except InferenceServerException as error:
            found["error"] = [error.status(), error.message(), str(error)]
        found["index"] = await server.get_model_repository_index()
    return found


if __name__ == "__main__":
    json.dump(
        {"sync": sync(*sys.argv[1:]), "async": asyncio.run(asynchronous(*sys.argv[1:]))}, sys.stdout
    )
