"""Asynchronous jobs: the answer is there at once, and a retry with the same key is the same job."""

import os
import time
from pathlib import Path

import httpx

server = os.environ.get("STEPWEAVE_URL", "http://localhost:3000")
body = {"prompt": "a large blue ring on a yellow background", "response_format": "url"}
headers = {"Prefer": "respond-async", "Idempotency-Key": f"ring-{time.time_ns()}"}

with httpx.Client(base_url=server, timeout=60) as client:
    first, again = (
        client.post("/v1/images/generations", json=body, headers=headers) for _ in range(2)
    )
    assert first.json()["id"] == again.json()["id"]
    job = first.json()
    while job["state"] in ("queued", "running"):
        print(f"{job['state']}: step {job['step']} of {job['total_steps']}")
        time.sleep(0.2)
        job = client.get(first.url.join(first.headers["Location"])).json()
    assert job["state"] == "succeeded", job["error"]
    image = client.get(job["result"]["data"][0]["url"]).raise_for_status()
    Path("job.png").write_bytes(image.content)
    print("job.png")
