"""A real server that is killed, comes back, and is told to end in the middle of its work."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.served import Served, serve
from tests.support.waiting import SECONDS

LONG = {"prompt": "a large red circle on a blue background", "num_inference_steps": 200, "n": 8}


def post(server: Served, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=SECONDS
    )


@pytest.mark.full  # tests/api/test_jobs.py starts a server on what a killed one left
def test_jobs_outlive_a_crash_and_the_end_waits_for_no_longer_than_its_grace(
    tmp_path: Path,
) -> None:
    settings = {
        "STEPWEAVE_STATE_DIR": str(tmp_path / "state"),
        "STEPWEAVE_WARMUP": "false",
        "STEPWEAVE_GRACE": "2",
    }
    with serve(tmp_path / "first.log", **settings) as server:
        server.wait_until_ready()
        done = post(
            server, {**LONG, "n": 1, "num_inference_steps": 1}, **{"Idempotency-Key": "one"}
        ).json()
        left = post(server, LONG, Prefer="respond-async")
        assert left.status_code == 202
        while (
            httpx.get(server.url + left.headers["location"], timeout=SECONDS).json()["state"]
            == "queued"
        ):
            time.sleep(0.05)
        # the worker first: without its parent it would be started anew
        for process in (
            psutil.Process(server.process.pid),
            *psutil.Process(server.process.pid).children(True),
        ):
            process.suspend()
        for process in (
            *psutil.Process(server.process.pid).children(True),
            psutil.Process(server.process.pid),
        ):
            process.kill()
    with serve(tmp_path / "second.log", **settings) as server:
        server.wait_until_ready()
        job = httpx.get(server.url + left.headers["location"], timeout=SECONDS).json()
        assert (job["state"], job["error"]["code"]) == ("failed", "restarted")
        assert "restarted while the job was" in job["error"]["message"]
        again = post(
            server, {**LONG, "n": 1, "num_inference_steps": 1}, **{"Idempotency-Key": "one"}
        ).json()
        assert again == done
        told = []
        stream = {"json": {**LONG, "stream": True, "events": "all"}, "timeout": 60}
        with httpx.stream("POST", f"{server.url}/v1/images/generations", **stream) as answer:
            for line in answer.iter_lines():
                told.append(line)
                if line.startswith("data: {") and json.loads(line[6:]).get("step") == 2:
                    server.process.send_signal(signal.SIGTERM)
        assert told[-3] == "event: error"
        assert json.loads(told[-2].removeprefix("data: "))["error"]["code"] == "draining"
        assert server.process.wait(SECONDS) == 0
