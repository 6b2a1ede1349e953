"""Results and errors reach who waits, whatever they are: nothing that carries them takes them for a
signal of its own."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import greenlet
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import stepweave
from stepweave import Job, StepEngine
from stepweave.engine import Mode
from stepweave.errors import StepweaveError
from stepweave.outcome import Outcome
from stepweave.threads import DaemonExecutor, on_thread
from tests.support.asgi import App, serving
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.anyio
every_mode = pytest.mark.parametrize("mode", get_args(Mode))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """Not even its traceback can be set."""

    message: str = "frozen"


class Mute(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("it cannot say what it is")

    __repr__ = __str__


class Odd(RuntimeError):
    """Neither true, nor equal to anything."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        raise ValueError("it cannot be compared")

    __hash__ = None  # type: ignore[assignment]


SIGNALS: list[Callable[[], BaseException]] = [
    StopIteration,
    lambda: StopIteration("a value"),
    StopAsyncIteration,
    TimeoutError,
    concurrent.futures.CancelledError,
    concurrent.futures.InvalidStateError,
    asyncio.CancelledError,
    GeneratorExit,
    greenlet.GreenletExit,
    KeyboardInterrupt,
    SystemExit,
    type("Own", (StopIteration,), {}),
]
ERRORS: list[Callable[[], BaseException]] = [
    Frozen,
    Mute,
    Odd,
    asyncio.InvalidStateError,
    lambda: ExceptionGroup("several", [StopIteration(), ValueError()]),
]
every_error = pytest.mark.parametrize(
    "error", [*SIGNALS, *ERRORS], ids=lambda make: type(make()).__name__
)


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Processor:
    def postprocess(self, finish: Callable[[], Any]) -> Any:
        return finish()


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    """Ends with what a call of `finish` gives, made by its image processor if `processed`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_modules(network=network)
        self.set_progress_bar_config(disable=True)
        self.image_processor = Processor()

    @torch.no_grad()
    def __call__(
        self,
        finish: Callable[[], Any] = lambda: "done",
        processed: bool = False,
        generator: Any = None,
    ) -> Any:
        x = torch.ones(1, 2)
        for _ in self.progress_bar(range(2)):
            x = self.network(x)
        return self.image_processor.postprocess(finish) if processed else finish()


def made() -> Pipeline:
    return Pipeline(Double().eval())


def raising(error: BaseException) -> Callable[[], Any]:
    def raise_it() -> Any:
        raise error

    return raise_it


@every_error
@every_mode
async def test_an_error_of_any_kind_reaches_all_who_wait(
    mode: Mode, error: Callable[[], BaseException]
) -> None:
    with StepEngine(made(), mode=mode) as engine:
        for processed in (False, True):
            raised = error()
            job = engine.submit(raising(raised), processed)
            waiting = [
                asyncio.ensure_future(asyncio.to_thread(job.exception, SECONDS)),
                asyncio.ensure_future(_caught(job)),
            ]
            done, _ = await asyncio.wait(waiting, timeout=SECONDS)
            assert len(done) == 2, "who waits is never told"
            told, awaited = (one.result() for one in waiting)
            assert told is awaited
            if error in SIGNALS:
                assert type(told) is StepweaveError and told.__cause__ is raised
                assert type(raised).__name__ in told.message
            else:
                assert told is raised
            with pytest.raises(type(told)):
                await asyncio.wait_for(asyncio.to_thread(job.result, SECONDS), SECONDS)
        assert await asyncio.wait_for(_value(engine.submit()), SECONDS) == "done"
        # counted just after they are told
        wait_until(lambda: dict(engine.stats().jobs).get("failed") == 2)
        assert engine.stats().errors == 0


async def _caught(job: Job) -> BaseException | None:
    try:
        await job
    except Exception as error:
        return error
    return None


async def _value(job: Job) -> Any:
    return await job


class Unlike:
    """A result that cannot be compared, nor be told whether it is true."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("it cannot be compared")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")


@pytest.mark.parametrize("processed", [False, True])
@every_mode
async def test_a_result_is_what_the_call_returned_whatever_that_is(
    mode: Mode, processed: bool
) -> None:
    awaitable: Future[Any] = Future()
    with StepEngine(made(), mode=mode) as engine:
        for value in (
            ValueError("returned"),
            StopIteration(),
            awaitable,
            Unlike(),
            None,
            Outcome(1),
            ValueError,
        ):
            job = engine.submit(lambda value=value: value, processed)
            assert await asyncio.wait_for(_value(job), SECONDS) is value
            assert job.exception(0) is None
        # counted just after they are told
        wait_until(lambda: dict(engine.stats().jobs) == {"succeeded": 7})


@pytest.mark.parametrize("kind", [StopIteration, KeyboardInterrupt, Frozen])
@every_mode
def test_an_error_of_a_module_in_company_fails_the_jobs_alone(
    mode: Mode, kind: type[BaseException]
) -> None:
    pipeline = made()
    with StepEngine(pipeline, mode=mode) as engine:
        with patch.object(Double, "forward", side_effect=kind):
            jobs = [engine.submit(generator=torch.Generator()) for _ in range(3)]
            errors = [job.exception(SECONDS) for job in jobs]
        named = [error.__cause__ if type(error) is StepweaveError else error for error in errors]
        assert [type(error) for error in named] == [kind] * 3 or mode == "step"
        assert engine.submit().result(SECONDS) == "done"


# --- through the server ---


@every_error
async def test_a_place_comes_back_once_whatever_the_pipeline_raises(
    error: Callable[[], BaseException],
) -> None:
    """Two that never end would leave no place at all."""
    async with serving(max_queue=1) as app:
        admission = app.server._admission
        assert admission is not None
        app.record.error = error()  # type: ignore[assignment]
        for _ in range(3):
            failed = await app.post().done()
            assert failed.status == 500
            assert failed.error["code"] == "generation_failed"
            await app.until(lambda: admission.in_flight == 0)
        later = await app.post(headers={"Prefer": "respond-async"}).done()
        job = await app.until_state(later.json()["id"], "failed")
        assert type(app.record.error).__name__ in job["error"]["message"]
        streamed = await app.post(stream=True).done()
        assert streamed.names[-1] == "error"
        app.record.error = None
        assert (await app.post().done()).status == 200
        assert app.outcomes() == {"failed": 5, "succeeded": 1}


@pytest.mark.parametrize("kind", [StopIteration, KeyboardInterrupt, asyncio.CancelledError, Frozen])
async def test_a_place_comes_back_whatever_the_encoder_raises(kind: type[BaseException]) -> None:
    async with serving(max_queue=1) as app:
        with patch("stepweave.serving.results.encode", side_effect=kind):
            for _ in range(3):
                assert (await app.post().done()).status == 500
        assert (await app.post().done()).status == 200


@pytest.mark.parametrize("kind", [StopIteration, SystemExit])
async def test_a_preview_that_fails_holds_up_nothing(kind: type[BaseException]) -> None:
    class Failing:
        def image(self, *args: Any) -> Any:
            raise kind

    async with serving() as app:
        app.server.previewer = Failing()  # type: ignore[assignment]
        latents: Any = object()
        app.record.gated = True
        answer = app.post(stream=True, partial_images=2)
        await app.until(lambda: app.server.active)
        [ticket] = app.server.active.values()
        assert ticket.wants(2, 4)
        ticket.denoised(ticket.job, latents)
        app.record.release.set()
        assert (await answer.done()).names == ["image_generation.completed"]


# --- the watchdog ---


async def not_answered(app: App) -> None:
    admission = app.server._admission
    assert admission is not None
    for _ in range(3):  # with two places
        lost = await app.post().done()
        assert (lost.status, lost.error["code"]) == (500, "not_delivered")
        await app.until(lambda: admission.in_flight == 0)


def impatient(app: App, seconds: float) -> None:
    app.server.settings = app.server.settings.model_copy(update={"stuck_seconds": seconds})


@pytest.mark.parametrize(
    "how", ["never told", "told to a future that nobody reads", "the engine forgot it"]
)
async def test_a_request_whose_result_is_lost_fails_after_a_while(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    carriers = {
        "never told": patch("stepweave.jobs.job._Result.set_result", lambda *_: None),
        "told to a future that nobody reads": patch(
            "stepweave.jobs.job.asyncio.wrap_future",
            lambda _: asyncio.get_running_loop().create_future(),
        ),
        "the engine forgot it": patch("stepweave.jobs.running.RunningJob.finish", lambda *_: None),
    }
    async with serving(max_queue=1) as app:
        usual = app.server.settings.stuck_seconds
        impatient(app, 0.01)
        with carriers[how]:
            await not_answered(app)
        impatient(app, usual)
        assert (await app.post().done()).status == 200
        assert app.outcomes() == {"failed": 3, "succeeded": 1}
    assert caplog.text.count("not answered within 0.01 s of the job's end") == 3


async def test_a_request_whose_encoder_hangs_fails_after_a_while() -> None:
    let_go = threading.Event()
    async with serving(max_queue=1) as app:
        usual = app.server.settings.stuck_seconds
        impatient(app, 0.01)
        with patch("stepweave.serving.results.encode", side_effect=lambda *_: let_go.wait(SECONDS)):
            await not_answered(app)
            let_go.set()
        impatient(app, usual)
        assert (await app.post().done()).status == 200


async def test_a_request_whose_job_takes_long_does_not_fail() -> None:
    async with serving() as app:
        impatient(app, 1e-3)
        app.record.gated = True
        answer = app.post()
        await app.until(lambda: app.record.held_after(0))
        for _ in range(20):  # looks of the watchdog
            await asyncio.sleep(2e-3)
        assert not answer.messages
        impatient(app, 600)
        for ticket in app.server.active.values():
            ticket._means = dataclasses.replace(ticket._means, answer_seconds=600)
        app.record.release.set()
        assert (await answer.done()).status == 200


# --- how work is carried to threads ---


def test_work_goes_to_threads_in_one_way_only() -> None:
    """Others never return where the work raises StopIteration, or hold up the end of the
    process."""
    source = Path(stepweave.__file__).parent
    found = {
        (str(path.relative_to(source)), node.attr if isinstance(node, ast.Attribute) else node.id)
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Attribute, ast.Name))
        and (node.attr if isinstance(node, ast.Attribute) else node.id)
        in ("to_thread", "run_in_executor", "wrap_future", "ThreadPoolExecutor", "set_exception")
    }
    assert found == {
        ("threads.py", "run_in_executor"),
        ("threads.py", "set_exception"),
        ("jobs/job.py", "wrap_future"),
    }


@pytest.mark.parametrize(
    "error", [StopIteration(), SystemExit(), OSError("disk"), TimeoutError("network")]
)
async def test_work_on_a_thread_raises_what_can_be_raised(error: BaseException) -> None:
    with pytest.raises(Exception) as caught:
        await asyncio.wait_for(on_thread(None, raising(error)), SECONDS)
    assert caught.value is error or (
        caught.value.__cause__ is error and not isinstance(error, OSError)
    )


def test_an_executor_does_its_work_in_order_and_ends() -> None:
    executor, order, gate = DaemonExecutor(1, "test"), [], threading.Event()
    first = executor.submit(gate.wait, SECONDS)
    rest = [executor.submit(order.append, i) for i in range(10)]
    cancelled = rest.pop()
    assert cancelled.cancel()
    assert not executor.end(0.0)
    with pytest.raises(RuntimeError):
        executor.submit(print)
    gate.set()
    assert first.result(SECONDS)
    for one in rest:
        one.result(SECONDS)
    executor.shutdown()
    assert order == list(range(9))


def test_an_executor_that_nobody_has_ends() -> None:
    executor = DaemonExecutor(2, "forgotten")
    threads = [executor.submit(threading.current_thread).result(SECONDS) for _ in range(2)]
    del executor
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


class Unspeakable(ValueError):
    """Cannot even say what it is."""

    raised: type[BaseException] = KeyError

    def __str__(self) -> str:
        raise self.raised("x")


@pytest.mark.parametrize("raised", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_error_that_cannot_be_told_is_one_all_the_same(
    in_process: Callable[..., InProcess], raised: type[BaseException]
) -> None:
    app = in_process(warmup=False)
    app.pipeline.record.error = type("Mute", (Unspeakable,), {"raised": raised})()
    for _ in range(2):
        answer = app.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
    app.until_metric(2, "stepweave_requests_total", outcome="failed")
    app.until_metric(0, "stepweave_requests_in_flight")
    assert not app.metric("stepweave_requests_total", outcome="succeeded")
    job = app.client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"Prefer": "respond-async"}
    ).json()
    wait_until(lambda: app.client.get(f"/v1/jobs/{job['id']}").json()["state"] == "failed")


def test_what_a_pipeline_returns_is_looked_at_apart_from_the_loop(
    in_process: Callable[..., InProcess],
) -> None:
    class Ends(list[Any]):
        def __len__(self) -> int:
            raise SystemExit

    class Odd(FakePipeline):
        @functools.wraps(FakePipeline.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            super().__call__(*args, **kwargs)
            return SimpleNamespace(images=Ends())

    app = in_process(Odd(), warmup=False)
    assert app.post().status_code == 500
    assert app.client.get("/livez").status_code == 200


def test_encoders_that_hang_are_told_by_the_probes(
    in_process: Callable[..., InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, gate = in_process(warmup=False, stuck_seconds=0.2), threading.Event()
    try:
        for _ in range(2):
            app.server._encoders.submit(gate.wait, SECONDS)
        wait_until(lambda: app.client.get("/livez").status_code == 503)
        assert "the image encoders have made no progress" in app.client.get("/readyz").text
    finally:
        gate.set()
    wait_until(lambda: app.client.get("/livez").status_code == 200)
