"""What litellm makes of the server: `python lite_llm.py URL IMAGE` writes what it found to stdout,
as JSON.

Runs in an environment of its own, which has litellm and not Stepweave. IMAGE is the file to be
edited.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched from elsewhere

import litellm
import openai

PROMPT = "a large red circle on a blue background"


def told(answer: Any) -> dict[str, Any]:
    """An answer of litellm's own type."""
    return {
        "images": [{"b64_json": one.b64_json, "url": one.url} for one in answer.data],
        "usage": answer.usage.model_dump(),
        "size": answer.size,
    }


def main(url: str, image: str) -> dict[str, Any]:
    litellm.suppress_debug_info = True  # which it prints to stdout
    common: dict[str, Any] = {
        "api_base": f"{url}/v1",
        "api_key": "unused",
        "model": "openai/shapes",
    }
    common |= {
        "prompt": PROMPT,
        "extra_body": {"seed": 5, "num_inference_steps": 2, "reproducible": True},
    }
    found = {"generation": told(litellm.image_generation(**common, n=2, size="64x64"))}
    with open(image, "rb") as file:
        found["edit"] = told(litellm.image_edit(**common, image=file))
    found["errors"] = []
    for wrong in ({"n": 99}, {"model": "openai/dall-e-3"}):
        try:
            litellm.image_generation(**{**common, **wrong})
        except openai.APIError as error:
            found["errors"].append([type(error).__name__, str(error)])
    return found


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
