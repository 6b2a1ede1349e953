"""What tritonclient makes of the server: `python triton.py HOST:PORT MODEL` writes what it found to stdout, as JSON.

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
        "response": {name: value for name, value in result.get_response().items() if name != "outputs"},
        "images": [base64.b64encode(one).decode() if binary else one for one in images],
        "parameters": [json.loads(one) for one in result.as_numpy("parameters").tolist()],
    }


def sync(url: str, model: str) -> dict[str, Any]:
    with client.InferenceServerClient(url, network_timeout=60, connection_timeout=60) as server:
        found: dict[str, Any] = {
            "live": server.is_server_live(),
            "ready": server.is_server_ready(),
            "model_ready": [
                server.is_model_ready(*one) for one in ((model,), (model, "1"), (model, "2"), ("nothing",))
            ],
            "metadata": server.get_server_metadata(),
            "model_metadata": server.get_model_metadata(model, "1"),
        }
        fixed = {"parameters": {"reproducible": True}, "request_id": "42"}
        inputs = tensors(client.InferInput, binary=True)
        found["binary"] = read(server.infer(model, inputs, **fixed), binary=True)
        for compression in ("gzip", "deflate"):
            result = server.infer(model, inputs, "1", request_compression_algorithm=compression, **fixed)
            found[compression] = read(result, binary=True)
        names = ("image", "parameters")
        outputs = [client.InferRequestedOutput(name, binary_data=False) for name in names]
        inputs = tensors(client.InferInput, binary=False)
        found["json"] = read(server.infer(model, inputs, outputs=outputs, **fixed), binary=False)
        only = server.infer(model, inputs, outputs=[client.InferRequestedOutput("parameters")])
        found["only"] = [output["name"] for output in only.get_response()["outputs"]]
        found["errors"] = []
        for name, wrong in ((model, {"parameters": {"seed": -1}}), ("nothing", {}), (model, {"model_version": "9"})):
            try:
                server.infer(name, inputs[:1], **wrong)
            except InferenceServerException as error:
                found["errors"].append([error.status(), error.message()])
    return found


async def asynchronous(url: str, model: str) -> dict[str, Any]:
    async with aio.InferenceServerClient(url) as server:
        found = {"ready": await server.is_server_ready()}
        fixed = {"parameters": {"reproducible": True}, "request_id": "43"}
        found["binary"] = read(await server.infer(model, tensors(aio.InferInput, binary=True), **fixed), binary=True)
        try:
            await server.infer("nothing", tensors(aio.InferInput, binary=True))
        except InferenceServerException as error:
            found["error"] = [error.status(), error.message()]
    return found


if __name__ == "__main__":
    json.dump({"sync": sync(*sys.argv[1:]), "async": asyncio.run(asynchronous(*sys.argv[1:]))}, sys.stdout)
