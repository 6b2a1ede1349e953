"""Engines and servers end within a bound, whatever hangs; so does their process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepweave import StepEngine
from stepweave.engine import Mode
from stepweave.errors import EngineClosedError, EngineMisuseError, RequestCancelledError
from tests.support.asgi import started
from tests.support.environment import ROOT, clean_environment
from tests.support.toy import Outside
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.anyio
every_mode = pytest.mark.parametrize("mode", get_args(Mode))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hanging(nn.Module):
    """Its forwards wait, from the second on, until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = Outside(hangs=threading.Event(), let_go=threading.Event())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] > 1:
            self.outside.hangs.set()
            assert self.outside.let_go.wait(SECONDS)
        return 2 * x


class Processor:
    def __init__(self, outside: Outside) -> None:
        self.outside = outside

    def postprocess(self, x: torch.Tensor) -> torch.Tensor:
        self.outside.hangs.set()
        assert self.outside.let_go.wait(SECONDS)
        return x


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    """Hangs in its module's second forward, or in work on its images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_modules(network=network)
        self.set_progress_bar_config(disable=True)
        self.image_processor = Processor(self.network.outside)

    @torch.no_grad()
    def __call__(self, steps: int = 3, generator: Any = None) -> torch.Tensor:
        x = torch.ones(1, 2)
        for _ in self.progress_bar(range(steps)):
            x = self.network(x)
        return self.image_processor.postprocess(x)


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    pipeline = Pipeline(Hanging().eval())
    yield pipeline
    pipeline.network.outside.let_go.set()


def hooked(pipeline: Pipeline) -> bool:
    return hasattr(pipeline.network, "_diffusers_hook")


@every_mode
def test_a_forward_that_hangs_does_not_hold_up_the_end(
    mode: Mode, pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    engine = StepEngine(pipeline, mode=mode, threads=1)
    threads = engine._runner.threads
    hanging = engine.submit()
    assert pipeline.network.outside.hangs.wait(SECONDS)
    waiting, woken = engine.submit(1), []
    hanging.add_done_callback(woken.append)
    waiter = threading.Thread(target=hanging.exception)
    waiter.start()
    engine.close(timeout=0.05)
    for job in (hanging, waiting):
        error = job.exception(0)
        assert isinstance(error, (EngineClosedError, RequestCancelledError)) and (
            job is waiting or "0.05 s" in error.message
        )
    waiter.join(SECONDS)
    assert not waiter.is_alive() and woken == [hanging]
    assert sum(engine.stats().jobs.values()) == 2
    [line] = [
        record.getMessage() for record in caplog.records if "still running" in record.getMessage()
    ]
    if mode == "step":
        assert "hooks" in line and hooked(pipeline), "its forward is under way"
        with pytest.raises(EngineMisuseError, match="belongs to another engine"):
            StepEngine(pipeline)
    pipeline.network.outside.let_go.set()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert not hooked(pipeline), "taken away once it has ended"
    assert sum(engine.stats().jobs.values()) == 2, "nothing is told twice"
    with StepEngine(pipeline, mode=mode) as another:
        assert another.submit().result(SECONDS) is not None


def test_work_on_images_that_hangs_does_not_hold_up_the_end(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    engine = StepEngine(pipeline)
    for _ in range(2):  # the first jobs of a pipeline of one's own work on the engine's thread
        pipeline.network.outside.let_go.set()
        engine.submit(1).result(SECONDS)
    pipeline.network.outside.let_go.clear()
    pipeline.network.outside.hangs.clear()
    job = engine.submit(1)
    assert pipeline.network.outside.hangs.wait(SECONDS)
    engine.close(timeout=0.05)
    assert isinstance(job.exception(0), EngineClosedError)
    wait_until(lambda: not hooked(pipeline))  # nothing runs in the modules
    assert "work on images" in caplog.text


@every_mode
def test_an_end_waits_for_what_ends(mode: Mode, pipeline: Pipeline) -> None:
    engine = StepEngine(pipeline, mode=mode)
    job = engine.submit()
    assert pipeline.network.outside.hangs.wait(SECONDS)
    closing = threading.Thread(target=engine.close, kwargs={"timeout": SECONDS})
    closing.start()
    wait_until(lambda: engine._closed)
    assert not job.done()
    pipeline.network.outside.let_go.set()
    closing.join(SECONDS)
    assert isinstance(job.exception(0), RequestCancelledError)
    assert not hooked(pipeline)


def test_a_bound_that_cannot_be_is_refused(pipeline: Pipeline) -> None:
    with StepEngine(pipeline) as engine, pytest.raises(ValueError, match="timeout is -1"):
        engine.close(-1)


# --- the server ---


def soon() -> Any:
    """What hangs in these tests never ends by itself."""
    return patch.multiple("stepweave.serving.lifecycle", ENDING_SECONDS=1.0, KEEPING_SECONDS=0.9)


async def test_a_server_ends_though_a_forward_hangs() -> None:
    async with started(grace=0) as app:
        app.record.gated = True
        answer, kept = app.post(), app.post(headers={"Prefer": "respond-async"})
        await app.until(lambda: app.record.steps_begun)
        await kept.done()
        with soon():
            await asyncio.wait_for(app.server.shut_down(), SECONDS)
        assert app.server.status.stage == "closed"
        assert (await answer.done()).status == 503
        assert answer.error["code"] == "draining"
        assert app.server.active == {}


async def test_requests_end_before_the_hook_that_shuts_down() -> None:
    """Which is called only once all connections have ended."""
    async with started(grace=0) as app:
        app.record.gated = True
        answer = app.post()
        await app.until(lambda: app.record.steps_begun)
        with soon():
            app.server.terminate()
            assert (await answer.done()).status == 503
            await asyncio.wait_for(app.server.shut_down(), SECONDS)


async def test_a_server_ends_though_an_encoder_hangs() -> None:
    let_go, encoding = threading.Event(), threading.Event()

    def encode(*_: Any) -> bytes:
        encoding.set()
        let_go.wait(SECONDS)
        return b""

    async with started(grace=0) as app:
        with patch("stepweave.serving.results.encode", encode), soon():
            answer = app.post()
            await app.until(encoding.is_set)
            await asyncio.wait_for(app.server.shut_down(), SECONDS)
        let_go.set()
        await answer.done()


# --- the process ---

SCRIPT = """
import asyncio, sys, threading
from unittest.mock import patch
from stepweave import StepEngine
from tests.engine import test_closing
from tests.support.waiting import SECONDS

def hang(what):
    if what == "server":
        return asyncio.run(server())
    pipeline = test_closing.Pipeline(test_closing.Hanging().eval())
    engine = StepEngine(pipeline, mode="step" if what != "threads" else what)
    engine.submit(1 if what == "images" else 3)
    assert pipeline.network.outside.hangs.wait(SECONDS)
    return engine

async def server():
    async with test_closing.started(grace=0) as app:
        app.record.gated = True
        hung = threading.Event()
        with patch("stepweave.serving.results.encode", lambda *_: hung.wait()), test_closing.soon():
            app.post()
            await app.until(lambda: app.record.steps_begun)
            await app.server.shut_down()
            print("shut down", flush=True)

StepEngine.close.__defaults__ = (0.05,)
kept = [hang(what) for what in sys.argv[1:]]
"""


WORK = ("forward", "images", "threads", "server")


@pytest.mark.parametrize(
    "hung",
    [WORK, *(pytest.param((what,), marks=pytest.mark.full) for what in WORK)],
    ids="-".join,
)
def test_a_process_ends_though_work_hangs(hung: tuple[str, ...]) -> None:
    environment = clean_environment(PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT))))
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *hung],
        cwd=ROOT,
        env=environment,
        timeout=SECONDS,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
