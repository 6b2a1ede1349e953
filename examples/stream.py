"""Server-sent events: previews while an image is made, then the image."""

import base64
import json
import os
from pathlib import Path

import httpx

server = os.environ.get("STEPWEAVE_URL", "http://localhost:3000")
body = {
    "prompt": "a large red circle on a blue background",
    "seed": 7,
    "stream": True,
    "partial_images": 3,
    "events": "all",  # queue position and progress, too
}
with httpx.stream("POST", f"{server}/v1/images/generations", json=body, timeout=None) as answer:
    answer.raise_for_status()
    for line in answer.iter_lines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if event["type"] == "stepweave.progress":
            print(f"step {event['step']} of {event['total_steps']}")
        elif "b64_json" in event:
            name = f"stream-{event.get('partial_image_index', 'final')}.png"
            Path(name).write_bytes(base64.b64decode(event["b64_json"]))
            print(name)
