"""Latency of first events, probes and cancellation of an idle and a busy server: `python -m
benchmarks.responses`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np

from benchmarks.measure import Part, Report, Spread, Value
from benchmarks.serving.contestants import serve
from benchmarks.serving.figures import in_flight

BUSY_JOBS = 16
BUSY_STEPS = 60
GENERATIONS = "/v1/images/generations"
PROBES = ("/livez", "/readyz", "/metrics")
TICK = 0.01  # seconds between two rounds of probes
CANCELLED_STEPS = 150  # of jobs that are cancelled
SAVED = re.compile(r"^stepweave_steps_saved_total\S* (\S+)", re.MULTILINE)


def body(number: int, **fields: object) -> dict[str, object]:
    return {
        "prompt": f"a large red circle on a blue background, {number}",
        "seed": number,
        **fields,
    }


@contextlib.asynccontextmanager
async def busy(client: httpx.AsyncClient, jobs: int) -> AsyncIterator[None]:
    """Keep `jobs` jobs running within the context."""

    async def generate(number: int) -> None:
        while True:
            answer = await client.post(
                GENERATIONS, json=body(number, num_inference_steps=BUSY_STEPS)
            )
            answer.raise_for_status()
            number += jobs

    tasks = [asyncio.create_task(generate(number)) for number in range(jobs)]
    try:
        if tasks:
            await asyncio.sleep(2)
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while tasks and in_flight((await client.get("/metrics")).text):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def first_events(client: httpx.AsyncClient, count: int) -> dict[str, Spread]:
    """Seconds from the request to the first event, the first preview, and the image."""
    seconds: dict[str, list[float]] = {
        "stepweave.queued": [],
        "image_generation.partial_image": [],
        "completed": [],
    }
    for number in range(count):
        began, seen = time.perf_counter(), set()
        request = body(10_000 + number, stream=True, partial_images=3, events="all")
        async with client.stream("POST", GENERATIONS, json=request) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                name = line.removeprefix("event: ").replace(
                    "image_generation.completed", "completed"
                )
                if line.startswith("event: ") and name in seconds and name not in seen:
                    seen.add(name)
                    seconds[name].append(time.perf_counter() - began)
    return {name: Spread.of(taken) for name, taken in seconds.items()}


async def probes(client: httpx.AsyncClient, count: int) -> dict[str, list[float]]:
    """Seconds of each probe, one after the other."""
    seconds: dict[str, list[float]] = {path: [] for path in PROBES}
    for _ in range(count):
        for path in PROBES:
            began = time.perf_counter()
            (await client.get(path)).raise_for_status()
            seconds[path].append(time.perf_counter() - began)
        await asyncio.sleep(TICK)
    return seconds


async def cancellations(client: httpx.AsyncClient, count: int) -> dict[str, tuple[Spread, Spread]]:
    """Steps run after the last one that the client knew of when it cancelled, and seconds until the
    job had ended."""
    results: dict[str, list[tuple[float, float]]] = {"DELETE": [], "disconnect": []}
    for number in range(count):
        for way, taken in results.items():
            saved = await _saved(client)
            request = body(
                20_000 + number, stream=True, events="all", num_inference_steps=CANCELLED_STEPS
            )
            async with client.stream("POST", GENERATIONS, json=request) as answer:
                answer.raise_for_status()
                step = 0
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        step = json.loads(line[6:]).get("step", step)
                    if step >= 5 + number % 7:
                        break
                began = time.perf_counter()
                if way == "DELETE":
                    (
                        await client.delete(f"/v1/jobs/{answer.headers['x-stepweave-job']}")
                    ).raise_for_status()
            while (now := await _saved(client)) == saved:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            taken.append((CANCELLED_STEPS - (now - saved) - step, time.perf_counter() - began))
    return {
        way: (
            Spread.of([steps for steps, _ in taken]),
            Spread.of([seconds for _, seconds in taken]),
        )
        for way, taken in results.items()
    }


async def _saved(client: httpx.AsyncClient) -> float:
    match = SAVED.search((await client.get("/metrics")).text)
    assert match is not None
    return float(match[1])


async def measure(url: str, repeats: int, report: Report) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * BUSY_JOBS)
    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=limits, trust_env=False
    ) as client:
        await client.post(GENERATIONS, json=body(0))
        events: list[dict[str, Value]] = []
        probed: list[dict[str, Value]] = []
        ended: list[dict[str, Value]] = []
        ratios: list[dict[str, Value]] = []
        idle: dict[str, list[float]] = {}
        for jobs in (0, BUSY_JOBS):
            async with busy(client, jobs):
                for name, taken in (await first_events(client, repeats)).items():
                    events.append({"beside": f"{jobs} jobs", "what": name, "seconds": taken})
                probe_seconds = await probes(client, 20 * repeats)
                for path, seconds in probe_seconds.items():
                    median, p99, most = np.percentile(seconds, (50, 99, 100)).tolist()
                    probed.append(
                        {
                            "beside": f"{jobs} jobs",
                            "route": path,
                            "median ms": 1e3 * median,
                            "p99 ms": 1e3 * p99,
                            "most ms": 1e3 * most,
                            "requests": len(seconds),
                        }
                    )
                    if jobs:
                        ratio = {
                            q: float(np.percentile(seconds, q) / np.percentile(idle[path], q))
                            for q in (50, 99)
                        }
                        ratios.append({"busy / idle": path, "median": ratio[50], "p99": ratio[99]})
                idle = idle or probe_seconds
                for way, (steps, waited) in (await cancellations(client, repeats)).items():
                    ended.append(
                        {
                            "beside": f"{jobs} jobs",
                            "by": way,
                            "steps": steps,
                            "most steps": steps.high,
                            "seconds": waited,
                        }
                    )
    about = f"jobs of {BUSY_STEPS} steps beside; client and server share the cores."
    report.add(
        "first events",
        Part(f"From the request to the first event; 20 steps, 3 previews; {about}", (events,)),
    )
    report.add(
        "probes",
        Part(
            f"One request after the other, {TICK * 1e3:.0f} ms between rounds; {about}",
            (probed, ratios),
        ),
    )
    report.add(
        "cancel",
        Part(
            f"Denoising steps run after the last one that the client knew of, of "
            f"{CANCELLED_STEPS}; {about}",
            (ended,),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.responses", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=15,
        help="repetitions of each measurement (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/responses.json"),
        help="report file (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; it must be at least 1")
    report = Report(arguments.json, repeats=arguments.repeats)
    with serve("responses", {}, arguments.json.parent) as server:
        asyncio.run(measure(server.url, arguments.repeats, report))
    report.close()


if __name__ == "__main__":
    main()
