"""OpenAI's client: `pip install openai`."""

import base64
import os
from pathlib import Path

from openai import OpenAI

server = os.environ.get("STEPWEAVE_URL", "http://localhost:3000")
client = OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("STEPWEAVE_CLIENT_KEY", "unused"))
answer = client.images.generate(
    prompt="a large red circle on a blue background",
    size="64x64",
    n=2,
    extra_body={"seed": 7, "num_inference_steps": 20},  # what OpenAI's API does not have
)
for number, image in enumerate(answer.data, 1):
    Path(f"openai-{number}.png").write_bytes(base64.b64decode(image.b64_json))
    print(f"openai-{number}.png")
