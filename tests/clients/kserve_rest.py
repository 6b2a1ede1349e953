"""What KServe's REST client makes of the server: `python kserve_rest.py URL MODEL` writes what it
found to stdout, as JSON.

Runs in an environment of its own, which has kserve and not Stepweave.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

PROMPTS = ["a large red circle on a blue background", "a green triangle"]


def request(model: str, binary: bool) -> InferRequest:
    """Two prompts with seeds 5 and 6, two steps."""
    prompt = InferInput("prompt", [2], "BYTES")
    prompt.set_data_from_numpy(np.array(PROMPTS, dtype=np.object_), binary_data=binary)
    seed = InferInput("seed", [2], "INT64")
    seed.set_data_from_numpy(np.array([5, 6]), binary_data=binary)
    parameters = {"num_inference_steps": 2, "reproducible": True}
    return InferRequest(model, [prompt, seed], request_id="44", parameters=parameters)


async def main(url: str, model: str) -> dict[str, Any]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=60)) as client:
        found: dict[str, Any] = {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model_ready": [await client.is_model_ready(url, name) for name in (model, "nothing")],
            "answers": [],
        }
        for binary in (True, False):
            answer = await client.infer(url, request(model, binary), model_name=model)
            outputs = {output.name: output.as_numpy().tolist() for output in answer.outputs}
            found["answers"].append({"id": answer.id, "model": answer.model_name, **outputs})
        found["errors"] = []
        for name, asked in (("nothing", request("nothing", True)), (model, request(model, True))):
            asked.parameters = {"seed": -1}
            try:
                await client.infer(url, asked, model_name=name)
            except httpx.HTTPStatusError as error:
                found["errors"].append([error.response.status_code, str(error)])
    return found


if __name__ == "__main__":
    json.dump(asyncio.run(main(*sys.argv[1:])), sys.stdout)
