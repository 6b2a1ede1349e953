"""Shared fixtures: a real server in a process of its own, and an app in this one around a fake
pipeline."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from starlette.testclient import TestClient

from stepweave.api.app import Api
from stepweave.api.middleware.contract import ContractMiddleware
from stepweave.config import PREFIX, Settings
from stepweave.config.preset import Preset
from stepweave.planning.cost import CostModel
from stepweave.serving.server import Server
from tests.support.distribution import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.served import Served, serve
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def quick_garbage() -> None:
    """What is there now stays, as nobody needs to find out again: where memory runs out, the engine
    collects garbage, and of all that the tests before have imported and built that takes most of a
    second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def every_row_pays() -> Iterator[None]:
    """Forwards are shared as far as they may be: on tiny modules, what pays is a matter of
    chance."""
    with patch.object(CostModel, "knee", lambda self, key, most: most):
        yield


@pytest.fixture(autouse=True)
def as_many_torch_threads_as_here() -> None:
    """Threads that a test starts compute as its own does, to the last bit: a server of a test
    before may have set another number."""
    torch.set_num_threads(torch.get_num_threads())


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Torch computes on one thread: the threads under test are enough for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has none of the server's settings, nor other variables with their prefix."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One real server with the embedded model for the whole session; it must end cleanly on
    SIGTERM."""
    with serve(tmp_path_factory.mktemp("serve") / "log.txt") as server:
        server.wait_until_ready()
        yield server
        assert server.stop() == 0


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., InProcess]]:
    """Makes apps around a fake pipeline, or the one given: `in_process(max_queue=2)`; with `loads`,
    around the model of the settings."""
    for name in [name for name in os.environ if name.startswith("STEPWEAVE_")]:
        monkeypatch.delenv(name)
    with contextlib.ExitStack() as stack:

        def make(
            pipeline: Any = None, *, ready: bool = True, loads: bool = False, **settings: Any
        ) -> InProcess:
            fake = FakePipeline()
            if loads or pipeline is not None and not isinstance(pipeline, FakePipeline):
                # a tiny model's start tries long images of many latents, and each scheduler at all
                # the steps that there may be
                settings = {"max_pixels": 128 * 128, "max_steps": 50, **settings}
            pipeline = pipeline or fake
            server = Server(
                Settings(**{"batching": "off", **settings}),
                load=None if loads else lambda *_: (pipeline, Preset()),
            )
            stack.callback(server.close)
            stack.callback(fake.record.release.set)  # before close: nothing may wait for ever
            app = ContractMiddleware(Api(server).app(), server)
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            if ready:
                server.start()
                wait_until(lambda: server.status.stage in ("ready", "failed"))
                assert server.status.stage == "ready", server.status.message
            return InProcess(client, server, pipeline)

        yield make
