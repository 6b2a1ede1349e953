"""The servers of the comparison that are the project's own: they make the pipeline's images."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.ladder.servers import bare
from benchmarks.ladder.servers import loop as served
from benchmarks.ladder.servers.diffusers_examples import Pipeline
from benchmarks.ladder.servers.model import PATH, Asked, call, call_each_kind, load
from benchmarks.ladder.servers.step_loop import RULES, StepLoop
from tests.support.waiting import SECONDS

SAME = 2.0  # the benchmark's tolerance
RED = "a large red circle on a blue background"
ASKED = [
    Asked(RED, 1, 4, 64, 64, 2.0),
    Asked("a small green star on a white background", 2, 4, 64, 64, 2.0),
    Asked(RED, 3, 3, 64, 64, 1.0),
    Asked(RED, 4, 2, 128, 64, 2.0),
    Asked(RED, 5, 2, 64, 64, 2.0),
]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load()


@pytest.fixture(scope="module")
def expected(pipeline: Any) -> list[Image.Image]:
    return [call(pipeline, [asked])[0] for asked in ASKED]


@pytest.fixture
def loops(pipeline: Any) -> Iterator[Any]:
    made: list[StepLoop] = []

    def make(rule: str, **settings: Any) -> StepLoop:
        made.append(StepLoop(pipeline, RULES[rule], **settings))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


def differences(images: list[Image.Image], others: list[Image.Image]) -> list[float]:
    assert [image.size for image in images] == [image.size for image in others]
    arrays = ([np.asarray(image, dtype=float) for image in some] for some in (images, others))
    return [float(np.abs(a - b).mean()) for a, b in zip(*arrays, strict=True)]


def test_requests_of_one_kind_share_a_call_and_answers_keep_their_order(
    pipeline: Any, expected: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = call

    def counted(pipeline: Any, asked: list[Asked]) -> list[Image.Image]:
        sizes.append(len(asked))
        return original(pipeline, asked)

    monkeypatch.setattr("benchmarks.ladder.servers.model.call", counted)
    order = [0, 2, 1, 3, 4]
    files = call_each_kind(pipeline, [ASKED[i] for i in order])
    images = [Image.open(io.BytesIO(base64.b64decode(file))) for file in files]
    assert max(differences(images, [expected[i] for i in order])) < SAME
    assert sorted(sizes) == [1, 1, 1, 2]


@pytest.mark.parametrize("rule", RULES)
def test_a_step_loop_makes_the_images_of_the_pipelines_own_calls(
    loops: Any, expected: list[Image.Image], rule: str
) -> None:
    loop = loops(rule)
    futures = [loop.submit(asked) for asked in ASKED]
    images = [future.result(SECONDS) for future in futures]
    assert max(differences(images, expected)) < SAME
    assert min(differences(images[:2], expected[1::-1])) > SAME, "the images do differ"


def test_requests_share_steps_by_the_rule_and_up_to_the_largest_batch(loops: Any) -> None:
    largest = {}
    for rule in RULES:
        loop = loops(rule, max_batch=3)
        with loop.wake:  # so that all wait when the first is admitted
            same = [loop.submit(Asked(RED, seed, 4, 64, 64, 2.0)) for seed in range(2)]
            others = [loop.submit(Asked(RED, 2 + n, n, 64, 64, 1.0)) for n in (1, 2, 3)]
            wide = loop.submit(Asked(RED, 9, 1, 128, 64, 2.0))
        for future in (*same, *others, wide):
            future.result(SECONDS)
        largest[rule] = loop.largest
    assert largest == {"equal": 2, "size": 3}


@pytest.mark.parametrize(("turn", "first"), [(0.0, "another"), (SECONDS, "equal")])
def test_once_its_turn_is_over_a_batch_admits_no_more_while_another_kind_waits(
    loops: Any, turn: float, first: str
) -> None:
    loop = loops("size", turn=turn, max_batch=2)
    order: list[str] = []
    with loop.wake:
        wanted = {
            "short": Asked(RED, 1, 1, 64, 64, 2.0),
            "another": Asked(RED, 2, 2, 128, 64, 2.0),
            "second": Asked(RED, 3, 2, 64, 64, 2.0),
            "equal": Asked(RED, 4, 2, 64, 64, 2.0),
        }
        futures = {name: loop.submit(asked) for name, asked in wanted.items()}
        for name, future in futures.items():
            future.add_done_callback(lambda _, name=name: order.append(name))
    for future in futures.values():
        future.result(SECONDS)
    loop.close()
    assert order[:2] == ["short", "second"] and order[2] == first


def test_a_request_that_cannot_run_fails_and_the_next_one_is_served(
    loops: Any, expected: list[Image.Image]
) -> None:
    loop = loops("size")
    with pytest.raises(IndexError):
        loop.submit(Asked(RED, 1, 0, 64, 64, 2.0)).result(SECONDS)
    assert differences([loop.submit(ASKED[0]).result(SECONDS)], expected[:1])[0] < SAME


def test_the_app_of_a_step_loop_answers_as_openai_does(
    loops: Any, expected: list[Image.Image]
) -> None:
    body = {
        "prompt": RED, "seed": 1, "num_inference_steps": 4, "size": "64x64", "guidance_scale": 2.0
    }  # fmt: skip

    async def run() -> tuple[int, httpx.Response]:
        transport = httpx.ASGITransport(served.app(loops("equal")))
        async with httpx.AsyncClient(transport=transport, base_url="http://loop") as client:
            ready = await client.get("/readyz")
            return ready.status_code, await client.post(PATH, content=json.dumps(body))

    status, response = asyncio.run(run())
    assert (status, response.status_code) == (200, 200)
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    assert image.format == "PNG" and differences([image], expected[:1])[0] < SAME


def test_the_pipeline_of_diffusers_examples_reads_the_request_from_the_prompt(
    expected: list[Image.Image],
) -> None:
    body = {
        "prompt": RED, "seed": 4, "num_inference_steps": 2, "size": "128x64", "guidance_scale": 2.0
    }  # fmt: skip
    pipeline = load(Pipeline)
    images = pipeline(json.dumps(body), num_inference_steps=50, generator=None).images
    assert differences(images, [expected[3]])[0] < SAME


@pytest.mark.full
def test_bare_calls_are_those_of_the_pipeline(pipeline: Any) -> None:
    before = dict(vars(pipeline.transformer))
    wanted = [("transformer", 1024, 2), ("vae.decode", 1024, 1), ("text_encoder", 16, 3)]
    took = dict(zip(wanted, bare.measure(pipeline, wanted), strict=True))
    assert vars(pipeline.transformer) == before  # what noted its calls is gone
    assert all(0 < best <= same for same, best in took.values())
