"""A device that fails for good: jobs end at once with what they can act on, nothing is tried any
more, and the server says so.

There is no GPU here: what torch and its libraries say of one is raised by modules, and by what else
of the engine asks a device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from stepweave import StepEngine
from stepweave.engine import Mode
from stepweave.engine.hooks import on_image_thread
from stepweave.errors import DeviceFailedError, OutOfMemoryError, StepweaveError
from stepweave.memory import device_health as health_of
from stepweave.memory.device_health import DeviceHealth
from stepweave.planning.clock import HostClock
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.toy import Outside, Toy, call, fresh, honest, module, others, submit_together
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("every_row_pays")

ILLEGAL = "CUDA error: an illegal memory access was encountered"
DETAILS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call.\nCompile with "
    "`TORCH_USE_CUDA_DSA`."
)
STICKY: list[tuple[type[Exception], str]] = [
    (torch.AcceleratorError, ILLEGAL + DETAILS),
    (torch.AcceleratorError, "CUDA error: device-side assert triggered"),
    (torch.AcceleratorError, "a device that nobody has heard of has failed"),
    (RuntimeError, "CUDA error: unspecified launch failure" + DETAILS),
    (
        RuntimeError,
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`",
    ),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    (RuntimeError, "cuFFT error: CUFFT_INTERNAL_ERROR"),
    (RuntimeError, "HIP error: an illegal memory access was encountered"),
    (RuntimeError, "Triton Error [CUDA]: an illegal memory access was encountered"),
]
PASSING: list[tuple[type[Exception], str]] = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    (torch.AcceleratorError, "CUDA error: out of memory"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (RuntimeError, "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    (
        RuntimeError,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
        "cpu!",
    ),
    (ValueError, ILLEGAL),
    (KeyError, "prompt"),
]


class Device:
    """A device that breaks at its `at`th operation, and stays broken; it counts what is asked of it
    then."""

    def __init__(
        self,
        at: int = 1,
        error: Callable[[], Exception] = lambda: torch.AcceleratorError(ILLEGAL + DETAILS),
    ) -> None:
        self.at = at
        self.error = error
        self.asked = 0  # altogether
        self.refused = 0

    def ask(self) -> None:
        self.asked += 1
        if self.asked >= self.at:
            self.refused += 1
            raise self.error()

    @property
    def forward(self) -> Callable[..., Tensor]:
        outside = Outside(device=self)

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            outside.device.ask()
            return honest(x)

        return forward


def outcomes(jobs: list[Any]) -> list[BaseException | None]:
    return [job.exception(SECONDS) for job in jobs]


def check_failed(engine: StepEngine, jobs: list[Any], *, errors: int = 0) -> None:
    """Every job, and any that is submitted, ends with what says to try another server."""
    for error in outcomes(jobs):
        assert isinstance(error, DeviceFailedError), repr(error)
        assert (error.status, error.code) == (503, "device_failed")
        assert "illegal memory access" in error.message
    assert engine.failure is not None and "illegal memory access" in engine.failure
    assert "\n" not in engine.failure
    with pytest.raises(DeviceFailedError):
        engine.submit(**fresh(call(9)))
    assert engine.stats().errors == errors


@pytest.mark.parametrize(("kind", "words"), STICKY, ids=lambda one: str(one)[:40])
def test_what_shows_that_a_device_has_failed(
    kind: type[Exception], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    health = DeviceHealth(torch.device("cpu"))
    health.check()
    failed = health.examine(kind(words))
    assert failed is not None and words.partition("\n")[0].partition(" /")[0][:60] in failed.message
    assert health.examine(ValueError("anything")) is not None, "it has failed for good"
    assert health.examine(kind("CUDA error: another one")) is not None
    with pytest.raises(DeviceFailedError):
        health.check()
    assert [one.levelname for one in caplog.records] == ["CRITICAL"], "it is told once"
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize(("kind", "words"), PASSING, ids=lambda one: str(one)[:40])
def test_what_does_not(kind: type[Exception], words: str) -> None:
    health = DeviceHealth(torch.device("cpu"))
    assert health.examine(kind(words)) is None
    health.check()


def test_what_an_error_was_raised_from_counts() -> None:
    """Pipelines and libraries wrap errors."""
    health = DeviceHealth(torch.device("cpu"))
    try:
        try:
            raise torch.AcceleratorError(ILLEGAL + DETAILS)
        except RuntimeError as error:
            raise ValueError("the pipeline failed") from error
    except ValueError as error:
        failed = health.examine(error)
    assert failed is not None and failed.reason == f"cpu: {ILLEGAL}"


def test_paths_of_the_server_are_not_told() -> None:
    health = DeviceHealth(torch.device("cpu"))
    failed = health.examine(
        RuntimeError("CUDA error (/tmp/build/flash/launch.cu:88): an illegal memory access")
    )
    assert (
        failed is not None
        and "/tmp" not in failed.message
        and "illegal memory access" in failed.message
    )


def test_an_error_is_held_against_the_device() -> None:
    """What a caller raises, and what a kernel refuses without harm, is no reason to end all
    jobs."""
    asked = []
    health = DeviceHealth(torch.device("cuda", 1), probe=lambda: asked.append(True))
    assert health.examine(RuntimeError(ILLEGAL)) is None
    assert (
        health.examine(torch.AcceleratorError("CUDA error: invalid configuration argument")) is None
    )
    assert health.examine(ValueError("anything else")) is None
    assert len(asked) == 2, "the device is asked where an error is of a device only"
    health.check()

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert DeviceHealth(torch.device("cuda", 1), probe=full).examine(RuntimeError(ILLEGAL)) is None

    def broken() -> None:
        raise torch.AcceleratorError(ILLEGAL)

    health = DeviceHealth(torch.device("cuda", 1), probe=broken)
    assert health.examine(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")) is not None
    assert "cuda:1" in str(health.failure)


def test_the_probe_computes() -> None:
    health_of.probe_of(torch.device("cpu"))


# Wherever it shows


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 9, 12, 17, 25, 40])
def test_no_forward_is_tried_after_one_that_shows_it(
    at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone, merged, in proofs, in audits: wherever the operation that fails happens to be."""
    device = Device(at)
    with StepEngine(Toy(module(device.forward)), audit_every=2) as engine:
        jobs = submit_together(
            engine, [fresh(one) for one in [*others(5), call(5, rows=3), call(6, rows=2, steps=30)]]
        )
        jobs += [engine.submit(**fresh(call(seed))) for seed in range(3) if engine.failure is None]
        check_failed(engine, [job for job in jobs if job.exception(SECONDS) is not None])
        assert any(job.exception(SECONDS) is not None for job in jobs)
    assert device.refused == 1
    told = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert [one.levelname for one in told] == ["CRITICAL"], [one.getMessage() for one in told]


def test_no_part_of_a_call_is_tried_either() -> None:
    device = Device(at=10**9)
    outside = Outside(device=device)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 2:
            outside.device.at = outside.device.asked + 2  # the second part of it
            raise torch.OutOfMemoryError
        outside.device.ask()
        return honest(x)

    with StepEngine(Toy(module(forward))) as engine:
        check_failed(engine, submit_together(engine, [fresh(call(0, rows=8))]))
    assert device.refused == 1


def test_a_pipeline_that_goes_on_regardless_runs_no_more() -> None:
    device = Device(3)

    class Stubborn(Toy):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            for _ in range(5):
                try:
                    return super().__call__(*args, **kwargs)
                except Exception:
                    continue

    with StepEngine(Stubborn(module(device.forward))) as engine:
        check_failed(engine, [engine.submit(**fresh(call(0)))])
    assert device.refused == 1


@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_mode_ends_its_jobs(mode: Mode) -> None:
    device, gate = Device(4), threading.Event()
    outside = Outside(device=device)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        assert gate.wait(SECONDS)
        outside.device.ask()
        return honest(x)

    with StepEngine(Toy(module(forward)), mode, threads=2) as engine:
        jobs = [engine.submit(**fresh(one)) for one in others(6)]
        gate.set()
        check_failed(engine, jobs)
    assert device.refused <= (2 if mode == "threads" else 1)


@pytest.mark.parametrize(
    "where",
    [lambda method: method, lambda method: lambda x: on_image_thread(partial(method, x), True)],
    ids=["own code", "another thread"],
)
def test_it_may_show_in_a_pipelines_own_code_or_where_images_are_made(
    where: Callable[..., Any],
) -> None:
    device = Device(1)
    make = where(lambda x: device.ask())

    class Making(Toy):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            x = super().__call__(*args, **kwargs)
            return x if x is None else make(x)

    with StepEngine(Making(module(lambda self, x: honest(x)))) as engine:
        check_failed(engine, [engine.submit(**fresh(call(0)))])


@pytest.mark.parametrize("place", ["clock", "digest", "describe", "memory"])
def test_it_may_show_where_the_engine_itself_asks_the_device(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error shows at whatever operation comes next, not where it was made: here at the engine's
    own."""
    outside = Outside(device=Device(10**9))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        outside.device.ask()
        return honest(x)

    def broken(*args: Any, **kwargs: Any) -> Any:
        outside.device.at = 0
        raise torch.AcceleratorError(ILLEGAL + DETAILS)

    with StepEngine(Toy(module(forward))) as engine:
        loop = engine._loop
        assert loop is not None
        if place == "clock":
            monkeypatch.setattr(HostClock, "stop", broken)
        elif place == "digest":
            monkeypatch.setattr("stepweave.batching.fingerprints._digest", broken)
        elif place == "describe":
            monkeypatch.setattr(loop._lookup._reader, "_read", broken)
        else:
            monkeypatch.setattr(loop._runner._limits, "measured", broken)
        jobs = submit_together(engine, [fresh(one) for one in others(3)])
        check_failed(engine, jobs, errors=1 if place == "digest" else 0)
    assert outside.device.refused <= 1


def test_jobs_that_wait_and_those_in_the_middle_end_alike() -> None:
    device, gate = Device(10**9), threading.Event()
    outside = Outside(device=device)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        assert gate.wait(SECONDS)
        outside.device.ask()
        return honest(x)

    with StepEngine(Toy(module(forward)), max_jobs=2) as engine:
        jobs = [engine.submit(**fresh(one)) for one in others(6)]
        wait_until(lambda: engine.running and engine.running + engine.waiting == 6)
        cancelled = engine.submit(**fresh(call(7)))
        cancelled.cancel()
        device.at = 0
        gate.set()
        check_failed(engine, jobs)
        assert type(cancelled.exception(SECONDS)).__name__ == "RequestCancelledError"
        assert engine.running == engine.waiting == 0
    assert device.refused == 1


def test_what_passes_ends_no_other_job() -> None:
    outside = Outside(error=None)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if outside.error is not None:
            raise outside.error
        return honest(x)

    with StepEngine(Toy(module(forward))) as engine:
        for kind, words in PASSING:
            outside.error = kind(words)
            failed = engine.submit(**fresh(call(0))).exception(SECONDS)
            assert failed is not None and not isinstance(failed, DeviceFailedError)
            assert engine.failure is None
        outside.error = None
        assert engine.submit(**fresh(call(1))).result(SECONDS) is not None


# The server


class BrokenPipeline(FakePipeline):
    """A fake whose steps fail once `record.error` is set."""


@pytest.fixture
def app(in_process: Callable[..., InProcess]) -> Iterator[InProcess]:
    yield in_process(BrokenPipeline(), batching="off", warmup=False)


def test_a_server_whose_device_has_failed_asks_to_be_restarted(app: InProcess) -> None:
    assert app.post().status_code == 200
    assert app.client.get("/livez").status_code == app.client.get("/readyz").status_code == 200
    assert app.metric("stepweave_ready") == 1
    app.pipeline.record.error = torch.AcceleratorError(ILLEGAL + DETAILS)
    answer = app.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_failed")
    assert "retry-after" in answer.headers
    ran = len(app.pipeline.record.calls)
    app.pipeline.record.error = None
    for path in ("/livez", "/readyz", "/healthz"):
        probe = app.client.get(path)
        assert (probe.status_code, probe.json()["error"]["code"]) == (503, "device_failed"), path
        assert probe.json()["stage"] == "failed"
        assert "illegal memory access" in probe.json()["message"]
    for live in ("/v2/health/live", "/v2/health/ready"):
        assert app.client.get(live).status_code == 503
    assert app.metric("stepweave_ready") == 0
    answer = app.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_failed")
    assert len(app.pipeline.record.calls) == ran, "nothing is tried any more"
    assert app.metric("stepweave_requests_total", outcome="unavailable") == 2


def _begun(app: InProcess) -> str:
    """The id of a job that nobody waits for."""
    body = {"prompt": "a red circle"}
    job = app.client.post(
        "/v1/images/generations", json=body, headers={"Prefer": "respond-async"}
    ).json()
    return str(job["id"])


def test_jobs_that_are_kept_say_why_and_what_was_made_stays(app: InProcess) -> None:
    done = _begun(app)
    wait_until(lambda: app.client.get(f"/v1/jobs/{done}").json()["state"] == "succeeded")
    app.pipeline.record.error = RuntimeError(ILLEGAL)
    lost = _begun(app)
    wait_until(lambda: app.client.get(f"/v1/jobs/{lost}").json()["state"] == "failed")
    assert app.client.get(f"/v1/jobs/{lost}").json()["error"]["code"] == "device_failed"
    assert app.client.get(f"/v1/jobs/{done}").json()["state"] == "succeeded"


def test_one_that_fails_while_it_warms_up_never_turns_ready(
    in_process: Callable[..., InProcess],
) -> None:
    pipeline = FakePipeline()
    pipeline.record.error = torch.AcceleratorError(ILLEGAL)
    app = in_process(pipeline, ready=False, batching="off", warmup=True)
    app.server.start()
    wait_until(lambda: app.server.status.stage in ("ready", "failed"))
    assert app.server.status.stage == "failed"
    assert "illegal memory access" in app.server.status.message
    assert app.client.get("/livez").status_code == 503


def test_running_out_of_memory_leaves_it_alive(app: InProcess) -> None:
    app.pipeline.record.error = torch.OutOfMemoryError("CUDA out of memory.")
    answer = app.post()
    assert answer.json()["error"]["code"] == "out_of_memory"
    assert app.client.get("/livez").status_code == 200
    app.pipeline.record.error = None
    assert app.post().status_code == 200
    assert issubclass(DeviceFailedError, StepweaveError) and not issubclass(
        DeviceFailedError, OutOfMemoryError
    )
