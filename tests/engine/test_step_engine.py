"""The step engine and its other modes: results, ends, errors, bounds; nothing lost, nothing left
behind."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from benchmarks.policies import keyed_fifo
from stepweave import Job, StepEngine
from stepweave.baselines.thread_pool import ThreadPool
from stepweave.batching import forward as running
from stepweave.batching.call import Call
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.layout import LayoutReader
from stepweave.certification.certificates import Certificates
from stepweave.engine import Mode, Progress
from stepweave.engine.fiber import Fiber
from stepweave.errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineMisuseError,
    RequestCancelledError,
    StepweaveError,
)
from stepweave.jobs.running import RunningJob
from stepweave.scope import RequestScopedPipeline
from tests.support import tiny
from tests.support.environment import ROOT, clean_environment
from tests.support.gated import Gate, Toy, Wave, held, seeded, toy

SECONDS = 60  # that nothing here takes, unless it hangs
TOLERANCE = 1e-4  # of pixels in [0, 1]
SD3, FLUX = tiny.FAMILIES["stable_diffusion_3"], tiny.FAMILIES["flux"]

every_mode = pytest.mark.parametrize("mode", get_args(Mode))


pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")


@pytest.fixture(scope="module")
def sd3() -> Any:
    return SD3.build()


@pytest.fixture(autouse=True, scope="module")
def built_before_any_engine_runs() -> None:
    """Building draws from torch's default generator."""
    for family in (SD3, FLUX):
        plain_pipeline(family)


@functools.cache
def plain(family: tiny.Family, prompt: str = "a red circle", **changes: Any) -> np.ndarray:
    """The images of a plain call, of a pipeline that no engine has ever touched."""
    return np.asarray(plain_pipeline(family)(**family.arguments(prompt, **changes))[0])


@functools.cache
def plain_pipeline(family: tiny.Family) -> Any:
    return family.build()


def difference(output: Any, expected: np.ndarray) -> float:
    images = np.asarray(output[0])
    assert images.shape == expected.shape
    return float(np.abs(images - expected).max())


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def count(engine: StepEngine, **jobs: int) -> None:
    """Check how many jobs ended how; they are counted just after they are told."""
    end = time.monotonic() + 5
    while engine.stats().jobs != jobs and time.monotonic() < end:
        time.sleep(0.005)
    assert engine.stats().jobs == jobs
    assert (engine.waiting, engine.running) == (0, 0)


# --- results ---


@every_mode
def test_a_job_returns_exactly_what_the_call_returns(sd3: Any, mode: Mode) -> None:
    with StepEngine(sd3, mode=mode) as engine:
        output = engine.submit(**SD3.arguments("a red circle", seed=3)).result(SECONDS)
        assert type(output) is type(sd3(**SD3.arguments("a red circle", steps=1)))
        assert np.array_equal(output.images, plain(SD3, seed=3))
        (images,) = engine.submit(
            **SD3.arguments("a red circle", seed=3, return_dict=False)
        ).result(SECONDS)
        assert np.array_equal(images, plain(SD3, seed=3))


@every_mode
def test_jobs_in_company_return_what_the_calls_return(sd3: Any, mode: Mode) -> None:
    requests = [
        {"prompt": f"a {'very ' * (i % 3)}red circle", "seed": i, "steps": 2 + i % 3}
        for i in range(12)
    ]
    with StepEngine(sd3, mode=mode) as engine:
        jobs = [engine.submit(**SD3.arguments(**request)) for request in requests]
        for job, request in zip(jobs, requests, strict=True):
            assert difference(job.result(SECONDS), plain(SD3, **request)) <= TOLERANCE
        count(engine, succeeded=12)
        assert (engine.waiting, engine.running) == (0, 0)


def test_arguments_may_be_positional_and_the_scheduler_the_jobs_own(sd3: Any) -> None:
    own = EulerDiscreteScheduler()
    family = tiny.FAMILIES["stable_diffusion_xl"]
    pipeline = family.build()
    arguments = family.arguments("a red circle")
    del arguments["prompt"]
    expected = plain(family)
    with StepEngine(pipeline) as engine:
        assert (
            difference(
                engine.submit("a red circle", **arguments | fresh()).result(SECONDS), expected
            )
            == 0
        )
        pipeline.scheduler, theirs = own, pipeline.scheduler
        other = np.asarray(pipeline("a red circle", **arguments | fresh())[0])
        pipeline.scheduler = theirs
        job = engine.submit("a red circle", scheduler=own, **arguments | fresh())
        assert difference(job.result(SECONDS), other) == 0
        assert difference((other,), expected) > TOLERANCE
        assert own.step_index is None or pipeline.scheduler is theirs


def fresh(seed: int = 0) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(seed)}


@every_mode
def test_a_generator_may_be_positional(mode: Mode) -> None:
    pipeline = toy()
    with StepEngine(pipeline, mode=mode) as engine:
        job = engine.submit(4, 3, torch.Generator().manual_seed(2))
        assert torch.equal(job.result(SECONDS)[0], pipeline(**seeded(2))[0])


@every_mode
def test_a_job_can_be_awaited(mode: Mode) -> None:
    pipeline = toy()

    async def main(engine: StepEngine) -> list[Any]:
        return await asyncio.gather(*(engine.submit(**seeded(i)) for i in range(5)))

    with StepEngine(pipeline, mode=mode) as engine:
        found = asyncio.run(main(engine))
    for i, (sample,) in enumerate(found):
        assert torch.allclose(sample, pipeline(**seeded(i))[0], atol=1e-5)


@every_mode
def test_cancelling_the_task_that_awaits_a_job_cancels_the_job(mode: Mode) -> None:
    gate = Gate()

    async def main(engine: StepEngine) -> Job:
        job = engine.submit(**seeded(num_inference_steps=1000, callback_on_step_end=gate))

        async def wait() -> Any:
            return await job

        task = asyncio.create_task(wait())
        await asyncio.to_thread(gate.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        return job

    with StepEngine(toy(), mode=mode) as engine:
        job = asyncio.run(main(engine))
        assert isinstance(job.exception(SECONDS), RequestCancelledError)
        assert gate.steps == 1
        count(engine, cancelled=1)


def test_what_a_job_tells_of_itself() -> None:
    done: list[Job] = []
    with StepEngine(toy()) as engine:
        gate = Gate()
        job = engine.submit(**seeded(callback_on_step_end=gate))
        gate.wait()
        assert not job.done()
        assert "running" in repr(job)
        with pytest.raises(TimeoutError):
            job.result(0.01)
        job.add_done_callback(done.append)
        gate.open()
        assert job.exception(SECONDS) is None
        wait_until(lambda: done == [job])
        job.add_done_callback(done.append)
        assert done == [job, job]
        assert job.done()
        assert job.accepted <= job.started <= job.opened <= job.stepped <= job.finished  # type: ignore[operator]
        job.cancel()
        assert job.exception() is None, "too late to cancel"
        count(engine, succeeded=1)


# --- progress ---


@every_mode
def test_progress_tells_steps_and_total(sd3: Any, mode: Mode) -> None:
    seen: list[Progress] = []

    def note(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(job.progress)
        return values

    with StepEngine(sd3, mode=mode, threads=1, max_jobs=1) as engine:
        with held(engine, **SD3.arguments("x")):
            job = engine.submit(**SD3.arguments("a red circle", callback_on_step_end=note))
            assert job.progress == (0, 0)
        assert job.result(SECONDS)
    assert seen == [(step, 4) for step in range(4)]
    assert job.progress == (4, 4)


@every_mode
def test_progress_spans_the_parts_of_a_combined_pipeline(mode: Mode) -> None:
    family = tiny.FAMILIES["stable_cascade"]
    seen: list[Progress] = []

    def note(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(job.progress)
        return values

    callbacks = {"prior_callback_on_step_end": note, "callback_on_step_end": note}
    arguments = family.arguments("x", steps=3, prior_num_inference_steps=5, **callbacks)
    with StepEngine(family.build(), mode=mode) as engine:
        gate = Gate()
        blocker = engine.submit(**family.arguments("x", callback_on_step_end=gate))
        gate.wait()
        if mode == "threads":
            gate.open()
        job = engine.submit(**arguments)
        gate.open()
        assert job.result(SECONDS)
        assert blocker.result(SECONDS)
    assert seen == [*((step, 5) for step in range(5)), *((5 + step, 8) for step in range(3))]
    assert job.progress == (8, 8)


# --- ends: cancellation, deadlines, errors ---


@every_mode
def test_a_waiting_job_is_cancelled_at_once(mode: Mode) -> None:
    pipeline, never = toy(), Gate(closed=False)
    with StepEngine(pipeline, mode=mode, threads=1, max_jobs=1) as engine:
        with held(engine, **seeded()) as running:
            waiting = engine.submit(**seeded(callback_on_step_end=never))
            last = engine.submit(**seeded(5))
            assert engine.waiting == 2
            waiting.cancel()
            assert isinstance(waiting.exception(SECONDS), RequestCancelledError)
            assert engine.waiting == 1
            assert not running.done()
        assert torch.equal(last.result(SECONDS)[0], pipeline(**seeded(5))[0])
        assert running.exception(SECONDS) is None
        assert never.steps == 0
        assert waiting.started is None
        count(engine, succeeded=2, cancelled=1)


@every_mode
def test_a_running_job_is_cancelled_at_its_next_step(mode: Mode) -> None:
    pipeline, gate = toy(), Gate()
    with StepEngine(pipeline, mode=mode) as engine:
        job = engine.submit(**seeded(num_inference_steps=1000, callback_on_step_end=gate))
        gate.wait()
        other = engine.submit(**seeded(5, num_inference_steps=5))
        job.cancel()
        gate.open()
        assert isinstance(job.exception(SECONDS), RequestCancelledError)
        assert gate.steps == 1
        assert torch.equal(
            other.result(SECONDS)[0], pipeline(**seeded(5, num_inference_steps=5))[0]
        )


@every_mode
def test_a_running_job_past_its_deadline_ends_at_its_next_step(mode: Mode) -> None:
    steps = []

    def callback(*_: Any) -> None:
        steps.append(1)
        job.deadline = time.monotonic() - 1

    with StepEngine(toy(), mode=mode, threads=1) as engine:
        with held(engine, **seeded()):
            job = engine.submit(
                **seeded(num_inference_steps=1000, callback_on_step_end=callback), deadline=1000.0
            )
        with pytest.raises(DeadlineExceededError, match="1000 s"):
            job.result(SECONDS)
        assert len(steps) == 1
        assert engine.submit(**seeded(), deadline=1000).result(SECONDS)
        count(engine, succeeded=2, failed=1)


@every_mode
def test_a_waiting_job_past_its_deadline_never_runs(mode: Mode) -> None:
    never = Gate(closed=False)
    with StepEngine(toy(), mode=mode, threads=1, max_jobs=1) as engine:
        with held(engine, **seeded()):
            job = engine.submit(**seeded(callback_on_step_end=never), deadline=0.01)
            wait_until(lambda: time.monotonic() > job.deadline)  # type: ignore[operator]
        with pytest.raises(DeadlineExceededError, match=r"0\.01 s"):
            job.result(SECONDS)
        assert never.steps == 0
        assert engine.submit(**seeded()).result(SECONDS)


def test_a_waiting_job_past_its_deadline_ends_before_its_turn() -> None:
    with StepEngine(toy(), max_jobs=1) as engine:
        gate = Gate()
        running = engine.submit(**seeded(num_inference_steps=10_000_000, callback_on_step_end=gate))
        gate.wait()
        job = engine.submit(**seeded(), deadline=0.01)
        gate.open()
        assert isinstance(job.exception(SECONDS), DeadlineExceededError)
        assert not running.done()
        running.cancel()
        assert isinstance(running.exception(SECONDS), RequestCancelledError)


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan")])
def test_a_deadline_is_ahead(deadline: float) -> None:
    with StepEngine(toy(), mode="off") as engine, pytest.raises(ValueError, match="deadline"):
        engine.submit(deadline=deadline)


class Own(Exception):
    """Of a user's callback."""


@every_mode
def test_an_error_of_a_callback_fails_its_own_job_with_its_own_type(sd3: Any, mode: Mode) -> None:
    def fail(*_: Any) -> None:
        raise Own("nonsense")

    with StepEngine(sd3, mode=mode) as engine:
        with held(engine, **SD3.arguments("x")):
            callbacks = [None, fail, None, None, fail, None]
            jobs = [
                engine.submit(
                    **SD3.arguments("a red circle", seed=i, callback_on_step_end=callback)
                )
                for i, callback in enumerate(callbacks)
            ]
        for i, (job, callback) in enumerate(zip(jobs, callbacks, strict=True)):
            if callback is None:
                assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
            else:
                with pytest.raises(Own, match="nonsense") as caught:
                    job.result(SECONDS)
                assert caught.traceback[-1].name == "fail"
                assert job.progress.step == 0
        count(engine, succeeded=5, failed=2)
        assert engine.stats().errors == 0


@every_mode
def test_arguments_that_the_pipeline_refuses_fail_their_own_job(sd3: Any, mode: Mode) -> None:
    with StepEngine(sd3, mode=mode) as engine:
        jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(2)]
        unknown = engine.submit(**SD3.arguments("x", nonsense=1))
        odd = engine.submit(**SD3.arguments("x", height=17))
        assert isinstance(unknown.exception(SECONDS), TypeError)
        assert isinstance(odd.exception(SECONDS), ValueError)
        for i, job in enumerate(jobs):
            assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE


@every_mode
def test_a_number_of_images_that_is_none_fails_its_own_job(sd3: Any, mode: Mode) -> None:
    with StepEngine(sd3, mode=mode, threads=1) as engine:
        job = engine.submit(**SD3.arguments("x", num_images_per_prompt="two"))
        after = engine.submit(**SD3.arguments("a red circle"))
        assert isinstance(job.exception(SECONDS), (TypeError, ValueError))
        assert difference(after.result(SECONDS), plain(SD3)) == 0


class Deaf(Toy):
    """Catches whatever goes wrong in a step, and goes on."""

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        try:
            return super().denoise(sample, timestep)
        except Exception:
            return sample


class DeafLoop(Toy):
    """The same around its whole step, the bar's update included."""

    @torch.no_grad()
    def __call__(
        self, num_inference_steps: int, callback_on_step_end: Callable[..., Any], **_: Any
    ) -> tuple[torch.Tensor]:
        sample = torch.zeros(1, 4)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step in range(num_inference_steps):
                try:
                    sample = self.denoise(sample, torch.tensor(float(step)))
                    callback_on_step_end(self, step, step, {})
                    bar.update()
                except Exception:
                    sample = torch.zeros(1, 4)
        return (sample,)


@every_mode
@pytest.mark.parametrize("kind", [Deaf, DeafLoop])
def test_no_pipeline_that_catches_exceptions_swallows_a_cancellation(
    mode: Mode, kind: type[Toy]
) -> None:
    gate = Gate()
    with StepEngine(toy(kind), mode=mode) as engine:
        job = engine.submit(**seeded(num_inference_steps=1000, callback_on_step_end=gate))
        gate.wait()
        job.cancel()
        gate.open()
        assert isinstance(job.exception(SECONDS), RequestCancelledError)
        assert gate.steps <= 2


def test_no_callback_that_catches_exceptions_swallows_a_cancellation(sd3: Any) -> None:
    steps: list[str] = []

    def preview(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        job.cancel()
        steps.append("cancelled")
        try:
            pipeline.vae.decode(values["latents"])
        except Exception:
            steps.append("swallowed")
        steps.append("went on")
        return values

    with StepEngine(sd3) as engine:
        with held(engine, **SD3.arguments("x")):
            job = engine.submit(**SD3.arguments("x", callback_on_step_end=preview))
        assert isinstance(job.exception(SECONDS), RequestCancelledError)
    assert steps == ["cancelled"]


class Stubborn(Toy):
    """Catches even what ends a thread."""

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        while True:
            try:
                return super().denoise(sample, timestep)
            except BaseException:
                if self.give_up.is_set():
                    raise

    give_up = threading.Event()


def test_a_pipeline_that_does_not_end_is_left_behind() -> None:
    gate = Gate()
    try:
        with StepEngine(toy(Stubborn)) as engine:
            job = engine.submit(**seeded(num_inference_steps=1000, callback_on_step_end=gate))
            gate.wait()
            other = engine.submit(**seeded(5))
            job.cancel()
            gate.open()
            error = job.exception(SECONDS)
            assert isinstance(error, (RequestCancelledError, StepweaveError))
            assert torch.equal(other.result(SECONDS)[0], toy()(**seeded(5))[0])
            assert engine.running == 0
    finally:
        Stubborn.give_up.set()
        gc.collect()


@every_mode
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_would_end_a_thread_ends_the_job_only(mode: Mode, kind: type[BaseException]) -> None:
    def leave(*_: Any) -> None:
        raise kind

    pipeline = toy()
    with StepEngine(pipeline, mode=mode) as engine:
        with held(engine, **seeded()):
            jobs = [engine.submit(**seeded(i)) for i in range(3)]
            leaving = engine.submit(**seeded(callback_on_step_end=leave))
        error = leaving.exception(SECONDS)
        assert isinstance(error, StepweaveError), (
            "or result() would end the thread that waits for it"
        )
        assert kind.__name__ in error.message
        assert isinstance(error.__cause__, kind)
        for i, job in enumerate([*jobs, engine.submit(**seeded(3))]):
            assert torch.allclose(job.result(SECONDS)[0], pipeline(**seeded(i))[0], atol=1e-5)


@pytest.mark.parametrize("mode", ["off", "request", "step"])
def test_a_callback_that_waits_for_a_job_of_its_own_engine_is_told(mode: Mode) -> None:
    errors: list[BaseException] = []

    def wait(*_: Any) -> None:
        for ask in (other.result, other.exception):
            try:
                ask(SECONDS / 10)
            except BaseException as error:
                errors.append(error)

    with StepEngine(toy(), mode=mode) as engine:
        with held(engine, **seeded()):
            job = engine.submit(**seeded(num_inference_steps=1, callback_on_step_end=wait))
            other = engine.submit(**seeded(1, num_inference_steps=5))
        assert job.exception(SECONDS) is None
        assert other.exception(SECONDS) is None
    assert [type(error) for error in errors] == [EngineMisuseError] * 2


@pytest.mark.parametrize("mode", ["off", "request", "step"])
def test_a_done_callback_that_waits_for_a_job_of_its_own_engine_is_told(mode: Mode) -> None:
    errors: list[BaseException] = []

    def wait(_: Job) -> None:
        try:
            other.result(SECONDS / 10)
        except BaseException as error:
            errors.append(error)

    with StepEngine(toy(), mode=mode) as engine:
        with held(engine, **seeded()) as job:
            other = engine.submit(**seeded(1, num_inference_steps=5))
            job.add_done_callback(wait)
        assert job.exception(SECONDS) is None
        assert other.exception(SECONDS) is None
        wait_until(lambda: errors)
    assert [type(error) for error in errors] == [EngineMisuseError]


@pytest.mark.parametrize("mode", ["off", "step"])
@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_done_callback_that_raises_harms_nobody(mode: Mode, kind: type[BaseException]) -> None:
    called: list[Job] = []

    def fail(_: Job) -> None:
        raise kind

    with StepEngine(toy(), mode=mode, max_jobs=1) as engine:
        with held(engine, **seeded()) as job:
            job.add_done_callback(fail)
            job.add_done_callback(called.append)
            waiting = engine.submit(**seeded())
            waiting.add_done_callback(fail)
        assert waiting.exception(SECONDS) is None
        wait_until(lambda: called == [job])
        count(engine, succeeded=2)
        assert engine.submit(**seeded()).result(SECONDS)


@every_mode
def test_a_callback_may_submit_another_job(mode: Mode) -> None:
    pipeline, more = toy(), []

    def submit(*_: Any) -> None:
        more.append(engine.submit(**seeded(len(more))))

    with StepEngine(pipeline, mode=mode, threads=1, max_jobs=1) as engine:
        assert engine.submit(**seeded(callback_on_step_end=submit)).exception(SECONDS) is None
        assert len(more) == 3
        for i, job in enumerate(more):
            assert torch.allclose(job.result(SECONDS)[0], pipeline(**seeded(i))[0], atol=1e-5)


class Knot:
    """Refers to itself, as controllers of attention do that know their pipeline."""

    def __init__(self) -> None:
        self.knot = self
        self.scale = torch.tensor(2.0)


class Guided(Toy):
    """Passes an object on to its network, the same in every call."""

    guide: Any

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.network(sample, timestep, guide=self.guide)


class GuidedWave(Wave):
    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, guide: Any = None
    ) -> torch.Tensor:
        knot = guide["knot"] if isinstance(guide, dict) else guide
        return super().forward(sample * knot.scale, timestep)


@pytest.mark.parametrize("guide", [Knot(), {"knot": Knot()}], ids=["bare", "in a dictionary"])
def test_arguments_of_any_kind_are_passed_on_and_may_be_shared(
    guide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guided, "guide", guide, raising=False)
    pipeline = Guided(GuidedWave().eval())
    expected = [pipeline(**seeded(i))[0] for i in range(4)]
    with StepEngine(pipeline) as engine:
        with held(engine, **seeded()):
            jobs = [engine.submit(**seeded(i)) for i in range(4)]
        for job, sample in zip(jobs, expected, strict=True):
            assert torch.allclose(job.result(SECONDS)[0], sample, atol=1e-5)
        assert engine.stats().errors == 0


def test_a_callback_may_call_the_pipeline() -> None:
    """The view that it is given, and the one that the engine was made from."""
    pipeline = toy()
    expected = [pipeline(**seeded(seed))[0] for seed in (7, 8, 9)]
    found: list[torch.Tensor] = []

    def call(view: Any, step: int, *_: Any) -> None:
        if step == 0:
            found.extend((view(**seeded(7))[0], pipeline(**seeded(8))[0]))

    with StepEngine(pipeline) as engine:
        with held(engine, **seeded()):
            job = engine.submit(**seeded(9, callback_on_step_end=call))
            others = [engine.submit(**seeded(i)) for i in range(3)]
        found.append(job.result(SECONDS)[0])
        assert all(other.exception(SECONDS) is None for other in others)
    assert all(
        torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True)
    )


# --- many jobs ---


@every_mode
def test_two_hundred_jobs_start_in_order_of_arrival_and_all_are_right(mode: Mode) -> None:
    pipeline, running, most = toy(), set(), 0

    def note(i: int) -> Callable[..., None]:
        def callback(_: Any, step: int, *__: Any) -> None:
            nonlocal most
            running.add(i)
            most = max(most, len(running))
            if step == i % 3:
                running.discard(i)

        return callback

    def arguments(i: int) -> dict[str, Any]:
        return seeded(i, num_inference_steps=1 + i % 3)

    with StepEngine(pipeline, mode=mode, max_jobs=4, threads=4, policy=keyed_fifo) as engine:
        with held(engine, **seeded()):
            jobs = [engine.submit(**arguments(i), callback_on_step_end=note(i)) for i in range(200)]
        for i, job in enumerate(jobs):
            assert torch.allclose(job.result(SECONDS)[0], pipeline(**arguments(i))[0], atol=1e-5)
        count(engine, succeeded=201)
        stats = engine.stats()
    started = [job.started for job in jobs]
    if mode != "threads":  # which take them in order, but note the time side by side
        assert started == sorted(started)  # type: ignore[type-var]
    if mode in ("off", "request"):
        finished = [job.finished for job in jobs]
        assert finished == sorted(finished)  # type: ignore[type-var]
    assert most <= (4 if mode in ("threads", "step") else 1)
    assert stats.errors == 0
    if mode == "step":
        assert most > 1
        assert stats.forwards["network"].merged_share > 0.5


class Counted(Toy):
    """Of which there is one, and its views."""


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, marks=() if mode == "step" else pytest.mark.full)
        for mode in get_args(Mode)
    ],
)
def test_nothing_grows_with_the_number_of_jobs(mode: Mode) -> None:
    def left() -> list[int]:
        gc.collect()
        found = [type(one) for one in gc.get_objects()]
        return [found.count(kind) for kind in (Job, Fiber, RunningJob, Call, Counted)]

    def fail(*_: Any) -> None:
        raise Own

    def run_many() -> None:
        with held(engine, **seeded()):
            jobs = [engine.submit(**seeded(i, width=4 + i % 2)) for i in range(180)]
            jobs += [engine.submit(**seeded(i, callback_on_step_end=fail)) for i in range(10)]
            endless = [
                engine.submit(**seeded(i, num_inference_steps=10_000_000)) for i in range(10)
            ]
        wait_until(lambda: endless[0].progress.step)
        for job in endless:
            job.cancel()
        for job in [*jobs, *endless]:
            job.exception(SECONDS)

    with StepEngine(toy(Counted), mode=mode, max_jobs=256) as engine:
        for _ in range(2):
            run_many()
            wait_until(lambda: left() == [0, 0, 0, 0, 1])
        assert len(engine.stats().certificates) == (2 if mode == "step" else 0)
        count(engine, succeeded=362, failed=20, cancelled=20)


@every_mode
def test_in_a_storm_every_job_ends_as_it_should(mode: Mode) -> None:
    """Submissions, cancellations, deadlines and errors from many threads, and a close in the midst
    of it."""
    pipeline = toy()
    expected = [
        [pipeline(**seeded(i, width=w, num_inference_steps=5))[0] for i in range(10)]
        for w in (4, 6)
    ]
    ended: list[tuple[Job, int, int, str]] = []

    def fail(*_: Any) -> None:
        raise Own

    def submit(thread: int) -> None:
        chance = random.Random(thread)
        while True:
            seed, width = chance.randrange(10), chance.randrange(2)
            fate = chance.choice(["ends", "ends", "ends", "fails", "is cancelled", "is late"])
            changes: dict[str, Any] = {"callback_on_step_end": fail} if fate == "fails" else {}
            deadline = chance.choice([1e-6, 1e-3, 1e-2]) if fate == "is late" else None
            arguments = seeded(seed, width=4 + 2 * width, num_inference_steps=5, **changes)
            try:
                job = engine.submit(**arguments, deadline=deadline)
            except EngineClosedError:
                return
            ended.append((job, seed, width, fate))
            if fate == "is cancelled":
                time.sleep(chance.random() / 500)
                job.cancel()
            if chance.random() < 0.3:
                job.exception(SECONDS)

    with (
        StepEngine(pipeline, mode=mode, max_jobs=8, max_rows=8) as engine,
        ThreadPoolExecutor(4) as pool,
    ):
        threads = [pool.submit(submit, i) for i in range(4)]
        wait_until(lambda: len(ended) > 400)
        engine.close()
        assert [thread.result(SECONDS) for thread in threads] == [None] * 4
    fates = {
        "ends": set(),
        "fails": {Own},
        "is cancelled": {RequestCancelledError},
        "is late": {DeadlineExceededError},
    }
    for job, seed, width, fate in ended:
        error = job.exception(0)
        if error is None:
            assert fate != "fails"
            assert torch.allclose(job.result()[0], expected[width][seed], atol=1e-5)
        else:
            assert type(error) in fates[fate] | {RequestCancelledError}
    assert sum(job.exception(0) is None for job, *_ in ended) > 20
    assert sum(engine.stats().jobs.values()) == len(ended)
    assert engine.stats().errors == 0


def test_calls_that_cannot_be_described_do_not_pile_up() -> None:
    pipeline = toy()
    pipeline.network.train()  # what may draw random numbers is never merged
    with StepEngine(pipeline) as engine:
        jobs = [engine.submit(**seeded(i, num_inference_steps=10)) for i in range(5)]
        for i, job in enumerate(jobs):
            assert torch.equal(
                job.result(SECONDS)[0], pipeline(**seeded(i, num_inference_steps=10))[0]
            )
        assert engine.stats().forwards["network"].merged_calls == 0
        assert len(engine.stats().certificates) <= 1


# --- close ---


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("stepweave")}


def attributes(pipeline: Any) -> list[dict[str, int]]:
    """Those of every module, by the identity of what they are."""
    return [
        {name: id(value) for name, value in vars(module).items()}
        for part in tiny.networks(pipeline)
        for module in part.modules()
    ]


@every_mode
def test_close_ends_every_job_and_leaves_no_trace(mode: Mode) -> None:
    pipeline = SD3.build()
    # transformers and diffusers note things at a first call
    pipeline(**SD3.arguments("x", steps=1))
    before, others = attributes(pipeline), threads()
    engine = StepEngine(pipeline, mode=mode, threads=2, max_jobs=2)
    assert (attributes(pipeline) != before) == (mode == "step")
    gate = Gate()
    jobs = [
        engine.submit(**SD3.arguments("x", steps=1000, callback_on_step_end=gate)) for _ in range(6)
    ]
    gate.wait()
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: engine._closed)
    with pytest.raises(EngineClosedError):
        engine.submit(**SD3.arguments("x"))
    gate.open()
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert [type(job.exception(0)) for job in jobs] == [RequestCancelledError] * 6
    assert gate.steps <= 2
    assert threads() == others
    assert attributes(pipeline) == before
    assert (engine.waiting, engine.running) == (0, 0)
    assert np.array_equal(
        pipeline(**SD3.arguments("a red circle", seed=2)).images, plain(SD3, seed=2)
    )
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit(**SD3.arguments("x"))


def test_an_engine_that_did_nothing_closes() -> None:
    for mode in get_args(Mode):
        StepEngine(toy(), mode=mode).close()


def test_an_error_in_the_with_block_closes_the_engine() -> None:
    pipeline = toy()
    with pytest.raises(Own), StepEngine(pipeline) as engine:
        job = engine.submit(**seeded(num_inference_steps=10_000_000))
        raise Own
    assert isinstance(job.exception(0), RequestCancelledError)
    assert not hasattr(pipeline.network, "_diffusers_hook")


@every_mode
def test_closing_from_a_callback_is_refused_or_works_but_leaves_no_trace(mode: Mode) -> None:
    """It cannot wait for the thread that it runs on."""
    pipeline, errors = toy(), []

    def close(*_: Any) -> None:
        try:
            engine.close()
        except BaseException as error:
            errors.append(error)

    engine = StepEngine(pipeline, mode=mode)
    others = threads()
    job = engine.submit(**seeded(num_inference_steps=1, callback_on_step_end=close))
    job.exception(SECONDS)
    engine.close()
    wait_until(lambda: not threads() & others)
    assert not hasattr(pipeline.network, "_diffusers_hook")
    assert [type(error) for error in errors] == [EngineMisuseError]


class Doubling(ModelHook):  # type: ignore[misc]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_others_stay_when_the_engine_closes(before: bool) -> None:
    pipeline, expected = toy(), toy()
    HookRegistry.check_if_exists_or_initialize(expected.network).register_hook(
        Doubling(), "doubling"
    )
    registry = HookRegistry.check_if_exists_or_initialize(pipeline.network)
    if before:
        registry.register_hook(Doubling(), "doubling")
    with StepEngine(pipeline) as engine:
        if not before:
            registry.register_hook(Doubling(), "doubling")
        assert torch.equal(engine.submit(**seeded(1)).result(SECONDS)[0], expected(**seeded(1))[0])
    assert torch.equal(pipeline(**seeded(1))[0], expected(**seeded(1))[0])
    assert list(registry.hooks) == ["doubling"]
    registry.remove_hook("doubling")
    assert torch.equal(pipeline(**seeded(1))[0], toy()(**seeded(1))[0])


def test_closing_while_images_are_made_delivers_or_cancels(sd3: Any) -> None:
    for _ in range(3):
        engine = StepEngine(sd3)
        jobs = [
            engine.submit(**SD3.arguments("a red circle", steps=1, output_type="pil"))
            for _ in range(4)
        ]
        jobs[0].exception(SECONDS)
        engine.close()
        assert all(job.done() for job in jobs)
        assert all(isinstance(job.exception(), (RequestCancelledError, type(None))) for job in jobs)


LEAVING = """
import threading, time, torch
from diffusers import DiffusionPipeline
from benchmarks.policies import keyed_fifo
from stepweave import StepEngine

class Autoencoder(torch.nn.Module):
    def encode(self, image):
        return image
    def decode(self, latents):
        decoding.set()
        time.sleep(1)
        return latents

class Processor:
    def postprocess(self, image):
        return image

class Pipeline(DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
        self.register_modules(vae=vae)
        self.image_processor = Processor()
    @torch.no_grad()
    def __call__(self):
        return self.image_processor.postprocess(self.vae.decode(torch.ones(1, 4)))

decoding = threading.Event()
engine = StepEngine(Pipeline(Autoencoder()))
job = engine.submit()
job.add_done_callback(lambda job: print(job.exception()))
assert decoding.wait(30)
"""


@pytest.mark.full
def test_a_script_that_ends_while_an_image_is_decoded_does_not_hang() -> None:
    """By then executors of the standard library take no more work."""
    environment = clean_environment(PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT))))
    ended = subprocess.run(
        [sys.executable, "-c", LEAVING],
        cwd=ROOT,
        env=environment,
        timeout=SECONDS,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode().split() == ["None"], "the image is delivered"


def test_a_second_engine_on_the_same_modules_is_refused_by_name(sd3: Any) -> None:
    with StepEngine(sd3) as engine:
        others = threads()
        for pipeline in (sd3, type(sd3)(**sd3.components)):
            with pytest.raises(
                EngineMisuseError, match=r"StableDiffusion3Pipeline\.\w+ belongs to another engine"
            ):
                StepEngine(pipeline)
        assert threads() == others
        assert (
            difference(engine.submit(**SD3.arguments("a red circle")).result(SECONDS), plain(SD3))
            == 0
        )
    with StepEngine(sd3) as engine:
        assert (
            difference(engine.submit(**SD3.arguments("a red circle")).result(SECONDS), plain(SD3))
            == 0
        )


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "nonsense"},
        {"max_rows": 0},
        {"max_decode_rows": 0},
        {"max_jobs": 0},
        {"threads": 0},
        {"audit_every": 0},
        {"cache_bytes": -1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any]) -> None:
    pipeline = toy()
    with pytest.raises(ValueError, match=next(iter(options))):
        StepEngine(pipeline, **options)
    assert not hasattr(pipeline.network, "_diffusers_hook")


# --- beside the engine ---


def test_calls_of_the_pipeline_on_other_threads_pass_straight_through(sd3: Any) -> None:
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    embeds = dict(
        zip(names, sd3.encode_prompt("blue", None, None, max_sequence_length=16), strict=True)
    )
    with StepEngine(sd3) as engine:
        jobs = [engine.submit(**SD3.arguments("a red circle", seed=i, steps=8)) for i in range(8)]
        for i in range(10):
            images = sd3(**SD3.arguments("", seed=i, steps=2) | {"prompt": None} | embeds).images
            assert np.array_equal(images, plain(SD3, "blue", seed=i, steps=2))
        for i, job in enumerate(jobs):
            assert difference(job.result(SECONDS), plain(SD3, seed=i, steps=8)) <= TOLERANCE
        assert engine.stats().forwards["transformer"].calls == 8 * 8


class Tokenizing(Toy):
    """Tokenizes to different lengths."""

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(network=network, tokenizer=tokenizer)
        self.set_progress_bar_config(disable=True)

    def __call__(self, length: int, times: int) -> list[int]:  # type: ignore[override]
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        return [len(self.tokenizer("a red circle", **options).input_ids) for _ in range(times)]


@pytest.mark.parametrize("mode", ["threads", "step"])
def test_calls_on_other_threads_may_tokenize_meanwhile(mode: Mode) -> None:
    """A fast tokenizer keeps its padding in an object of its own."""
    pipeline = Tokenizing(Wave().eval(), tiny.clip()["tokenizer"])
    with StepEngine(pipeline, mode=mode) as engine:
        jobs = [engine.submit(9, 500) for _ in range(2)]
        lengths = pipeline(14, 1000)
        assert {length for job in jobs for length in job.result(SECONDS)} == {9}
    assert set(lengths) == {14}


@every_mode
def test_tokens_that_are_added_while_the_engine_is_open_are_known_to_jobs(mode: Mode) -> None:
    """As `load_textual_inversion` adds them."""

    class Ids(Tokenizing):
        def __call__(self, text: str) -> list[int]:  # type: ignore[override]
            ids: list[int] = self.tokenizer(text).input_ids
            return ids

    pipeline = Ids(Wave().eval(), tiny.clip()["tokenizer"])
    with StepEngine(pipeline, mode=mode) as engine:
        before = engine.submit("a <mine> circle").result(SECONDS)
        assert before == pipeline("a <mine> circle")
        pipeline.tokenizer.add_tokens("<mine>")
        assert before != pipeline("a <mine> circle")
        assert engine.submit("a <mine> circle").result(SECONDS) == pipeline("a <mine> circle")


def test_a_plain_call_does_not_wait_for_the_engine() -> None:
    pipeline = toy()
    with StepEngine(pipeline) as engine, held(engine, **seeded()) as job:
        assert torch.equal(pipeline(**seeded(3))[0], toy()(**seeded(3))[0])
        assert not job.done()


def test_an_idle_engine_costs_nothing(sd3: Any) -> None:
    with StepEngine(sd3) as engine:
        assert engine.submit(**SD3.arguments("x", steps=1)).result(SECONDS)
        gc.collect()
        seconds, cost = 2.0, time.process_time()
        time.sleep(seconds)
        assert time.process_time() - cost < 0.01 * seconds


# --- errors of the engine itself ---


def failing(real: Callable[..., Any], times: float) -> Callable[..., Any]:
    """`real`, once it has raised so many times."""
    left = times

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left > 0:
            left -= 1
            raise ZeroDivisionError("a defect of the engine")
        return real(*args, **kwargs)

    return function


PARTS = {
    "decide": (Certificates, "decide"),
    "judge": (Certificates, "judge"),
    "describe": (LayoutReader, "read"),
    "key": (EncoderCache, "key"),
    "get": (EncoderCache, "get"),
    "put": (EncoderCache, "put"),
    "merge": (running, "merge"),
    "split": (running, "split"),
}


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(1, id="once", marks=pytest.mark.full),
        pytest.param(float("inf"), id="always"),
    ],
)
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=() if part in ("decide", "merge", "put") else pytest.mark.full)
        for part in PARTS
    ],
)
def test_a_defect_of_the_engine_is_contained_and_loses_no_job(
    part: str, times: float, sd3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StepEngine(sd3) as engine:
        with monkeypatch.context() as patched:
            with held(engine, **SD3.arguments("x", steps=1)):
                jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(4)]
                patched.setattr(*PARTS[part], failing(getattr(*PARTS[part]), times))
            for i, job in enumerate(jobs):
                assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
        assert (engine.stats().errors > 0) == (part not in ("merge", "split"))
        wait_until(lambda: engine.running == 0)
        assert (
            difference(engine.submit(**SD3.arguments("a red circle")).result(SECONDS), plain(SD3))
            <= TOLERANCE
        )
        count(engine, succeeded=6)


@pytest.mark.parametrize("mode", ["off", "request"])
def test_a_defect_of_the_pool_ends_the_job_and_not_the_thread(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StepEngine(toy(), mode=mode) as engine:
        with held(engine, **seeded()):
            monkeypatch.setattr(ThreadPool, "_run", failing(ThreadPool._run, 1))
            jobs = [engine.submit(**seeded(i)) for i in range(3)]
        assert isinstance(jobs[0].exception(SECONDS), (StepweaveError, ZeroDivisionError))
        assert [job.exception(SECONDS) for job in jobs[1:]] == [None] * 2
        assert engine.stats().errors == 1


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_module_that_fails_merged_is_retried_alone(most: int) -> None:
    """At once, in a proof of more rows than were proven, or long after."""
    pipeline = toy()
    expected = [pipeline(**seeded(i, num_inference_steps=6))[0] for i in range(6)]

    def refuse(rows: int) -> None:
        if rows > most:
            raise ValueError("too many rows")

    pipeline.network.outside.watch = refuse
    with StepEngine(pipeline) as engine:
        with held(engine, **seeded(num_inference_steps=1)):
            jobs = [engine.submit(**seeded(i, num_inference_steps=6)) for i in range(6)]
        for job, sample in zip(jobs, expected, strict=True):
            assert torch.allclose(job.result(SECONDS)[0], sample, atol=1e-5)
        assert engine.stats().errors == 0
        (certificate,) = engine.stats().certificates
        assert certificate["state"] == "failed"
        assert "too many rows" in certificate["reason"]


@pytest.mark.parametrize("most", [1, 3])
def test_what_does_not_fit_into_memory_is_halved(most: int) -> None:
    pipeline, rows_run = toy(), []
    expected = [pipeline(**seeded(i, num_inference_steps=10))[0] for i in range(6)]

    def refuse(rows: int) -> None:
        if rows > most:
            raise torch.OutOfMemoryError
        rows_run.append(rows)

    with StepEngine(pipeline) as engine:
        for watch in (rows_run.append, refuse):
            with held(engine, **seeded(num_inference_steps=1)):
                jobs = [engine.submit(**seeded(i, num_inference_steps=10)) for i in range(6)]
                rows_run.clear()
                pipeline.network.outside.watch = watch
            for job, sample in zip(jobs, expected, strict=True):
                assert torch.allclose(job.result(SECONDS)[0], sample, atol=1e-5)
            assert max(rows_run) == (most if watch is refuse else 6)
        stats = engine.stats()
    assert stats.out_of_memory > 0
    assert stats.errors == 0
    assert [one["state"] for one in stats.certificates] == ["certified"]


# --- pipelines that keep a call's state in their modules ---


def is_alone(engine: StepEngine) -> bool:
    return all(one.merged_calls == 0 for one in engine.stats().forwards.values())


@pytest.mark.parametrize("mode", ["threads", "step"])
def test_with_cpu_offload_jobs_are_right_and_share_forwards_but_not_threads(mode: Mode) -> None:
    pipeline = SD3.build()
    hooks = []
    for part in tiny.networks(pipeline):
        _, hook = accelerate.cpu_offload_with_hook(part, "cpu", hooks[-1] if hooks else None)
        hooks.append(hook)
    pipeline._all_hooks = hooks
    pipeline.maybe_free_model_hooks = lambda: None  # diffusers' own asks for an accelerator
    assert RequestScopedPipeline(pipeline).takes_turns()
    forward = pipeline.transformer.forward
    with StepEngine(pipeline, mode=mode) as engine:
        jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(6)]
        for i, job in enumerate(jobs):
            assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
        assert is_alone(engine) is (mode == "threads")
    assert pipeline.transformer.forward is forward
    assert (
        pipeline.transformer._hf_hook
        is hooks[tiny.networks(pipeline).index(pipeline.transformer)].hook
    )
    assert np.array_equal(pipeline(**SD3.arguments("a red circle")).images, plain(SD3))


@pytest.mark.parametrize("mode", ["threads", "step"])
def test_with_a_feature_cache_jobs_take_turns_and_are_right(mode: Mode) -> None:
    expected_pipeline, pipeline = FLUX.build(), FLUX.build()
    for one in (expected_pipeline, pipeline):
        one.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    expected = [
        np.asarray(expected_pipeline(**FLUX.arguments("blue ring", seed=i, steps=6))[0])
        for i in range(5)
    ]
    assert difference((expected[0],), plain(FLUX, "blue ring", steps=6)) > TOLERANCE, (
        "the cache does something"
    )
    with StepEngine(pipeline, mode=mode) as engine:
        jobs = [engine.submit(**FLUX.arguments("blue ring", seed=i, steps=6)) for i in range(5)]
        for job, images in zip(jobs, expected, strict=True):
            assert difference(job.result(SECONDS), images) <= TOLERANCE
        assert is_alone(engine)
    again = pipeline(**FLUX.arguments("blue ring", seed=3, steps=6))
    assert difference(again, expected[3]) == 0


# diffusers' own call of it
@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["threads", "step"])
def test_with_an_autoencoder_that_calls_cast_jobs_are_right(mode: Mode) -> None:
    """While one decodes, the autoencoder is in float32, as if there were no need for turns."""
    family = tiny.FAMILIES["stable_diffusion_xl"]
    pipeline = family.build()
    pipeline.vae.to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    requests = [{"seed": i, "steps": 1 + i % 3} for i in range(9)]
    expected = [np.asarray(pipeline(**family.arguments("x", **request))[0]) for request in requests]
    with StepEngine(pipeline, mode=mode) as engine:
        jobs = [engine.submit(**family.arguments("x", **request)) for request in requests]
        errors = [job.exception(SECONDS) for job in jobs]
        assert errors == [None] * len(jobs)
        for job, images in zip(jobs, expected, strict=True):
            assert difference(job.result(), images) <= TOLERANCE
    assert pipeline.vae.dtype == torch.float16


def test_while_an_autoencoder_is_cast_the_next_job_waits_for_its_turn() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion_xl"].build()
    pipeline.vae.to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    scoped = RequestScopedPipeline(pipeline)
    with scoped.lease():
        pipeline.vae.to(torch.float32)
        assert scoped.takes_turns()
    assert pipeline.vae.dtype == torch.float16


def test_a_pipeline_in_inference_mode_is_right_and_does_not_infect_the_engine() -> None:
    class Inferring(type(SD3.build())):  # type: ignore[misc]
        @torch.inference_mode()
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    pipeline = Inferring(**SD3.build().components)
    pipeline.set_progress_bar_config(disable=True)
    modes: list[bool] = []
    with StepEngine(pipeline) as engine:
        jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(3)]
        for i, job in enumerate(jobs):
            job.add_done_callback(lambda _: modes.append(torch.is_inference_mode_enabled()))
            assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
        with held(engine, **SD3.arguments("x")) as last:
            last.add_done_callback(lambda _: modes.append(torch.is_inference_mode_enabled()))
        assert last.exception(SECONDS) is None
    assert not any(modes)


def test_embeddings_made_in_inference_mode_are_served() -> None:
    pipeline = FLUX.build()
    with torch.inference_mode():
        embeddings = [
            pipeline.encode_prompt(word, None, max_sequence_length=16)
            for word in ("red", "blue ring")
        ]

    def arguments(i: int) -> dict[str, Any]:
        prompt_embeds, pooled_prompt_embeds, _ = embeddings[i % 2]
        made = FLUX.arguments(
            "", seed=i, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds
        )
        return made | {"prompt": None}

    with StepEngine(pipeline) as engine:
        with held(engine, **FLUX.arguments("x")):
            jobs = [engine.submit(**arguments(i)) for i in range(4)]
        for i, job in enumerate(jobs):
            expected = plain(FLUX, ("red", "blue ring")[i % 2], seed=i)
            assert difference(job.result(SECONDS), expected) <= TOLERANCE
        assert engine.stats().errors == 0
        assert engine.stats().forwards["transformer"].merged_calls > 0


def test_what_a_callback_is_given_can_be_copied(sd3: Any) -> None:
    copies: list[Any] = []

    def copying(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        copies.extend(
            (
                copy.deepcopy(pipeline.vae),
                copy.copy(pipeline.vae),
                copy.deepcopy(pipeline.tokenizer),
            )
        )
        return values

    with StepEngine(sd3) as engine:
        job = engine.submit(**SD3.arguments("x", steps=1, callback_on_step_end=copying))
        assert job.exception(SECONDS) is None
    assert [type(one) for one in copies] == [type(sd3.vae), type(sd3.vae), type(sd3.tokenizer)]
    assert copies[0] is not sd3.vae


# --- random numbers that no generator is given for ---


def unseeded(**changes: Any) -> dict[str, Any]:
    return SD3.arguments("a red circle", **changes) | {"generator": None}


@every_mode
def test_jobs_without_a_generator_differ_and_can_be_reproduced(sd3: Any, mode: Mode) -> None:
    def draw() -> list[np.ndarray]:
        torch.manual_seed(5)
        return [engine.submit(**unseeded()).result(SECONDS).images for _ in range(2)]

    with StepEngine(sd3, mode=mode) as engine:
        first, again = draw(), draw()
    assert np.abs(first[0] - first[1]).max() > TOLERANCE
    assert all(
        np.abs(one - other).max() <= TOLERANCE for one, other in zip(first, again, strict=True)
    )


@every_mode
def test_jobs_without_a_generator_side_by_side_can_be_reproduced(sd3: Any, mode: Mode) -> None:
    """Whenever they are submitted: while the engine is idle, or while it runs such jobs."""

    def draw(held_back: bool) -> list[np.ndarray]:
        gate = Gate(closed=held_back)
        torch.manual_seed(5)
        jobs = [engine.submit(**unseeded(steps=2, callback_on_step_end=gate))]
        if held_back:
            gate.wait()
        jobs += [engine.submit(**unseeded(steps=2)) for _ in range(4)]
        gate.open()
        return [job.result(SECONDS).images for job in jobs]

    with StepEngine(sd3, mode=mode) as engine:
        first, again = draw(True), draw(False)
    for i, (one, other) in enumerate(zip(first, again, strict=True)):
        assert np.abs(one - other).max() <= TOLERANCE, i
    assert all(np.abs(first[i] - first[j]).max() > TOLERANCE for i in range(5) for j in range(i))


@every_mode
def test_the_default_generator_is_as_before_but_for_the_seeds_of_jobs(sd3: Any, mode: Mode) -> None:
    def state_after(width: int) -> torch.Tensor:
        torch.manual_seed(5)
        jobs = [engine.submit(**unseeded(steps=1, width=width)) for _ in range(3)]
        for job in jobs:
            assert job.exception(SECONDS) is None
        wait_until(lambda: engine.running == 0)
        return torch.get_rng_state()

    with StepEngine(sd3, mode=mode) as engine:
        before = torch.get_rng_state()
        jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(3)]
        assert [job.exception(SECONDS) for job in jobs] == [None] * 3
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(state_after(16), state_after(32)), "it does not depend on what they drew"


def test_the_default_generator_stays_the_other_threads_while_a_job_without_one_runs(
    sd3: Any,
) -> None:
    def draw(disturbed: bool) -> np.ndarray:
        torch.manual_seed(5)
        gate = Gate()
        job = engine.submit(**unseeded(steps=2, callback_on_step_end=gate))
        gate.wait()
        if disturbed:
            torch.manual_seed(11)
            assert torch.rand(1).item() == expected[0]
        gate.open()
        images: np.ndarray = job.result(SECONDS).images
        if disturbed:
            assert torch.rand(1).item() == expected[1]
        return images

    expected = torch.rand(2, generator=torch.Generator().manual_seed(11)).tolist()
    with StepEngine(sd3) as engine:
        undisturbed, disturbed = draw(False), draw(True)
    assert np.abs(undisturbed - disturbed).max() <= TOLERANCE


@pytest.mark.parametrize("what", ["a seed", "numbers"])
def test_what_other_threads_draw_during_a_proof_is_drawn_once_and_does_not_fail_it(
    what: str,
) -> None:
    pipeline, drawn = toy(), []

    def draw() -> torch.Tensor:
        return torch.rand(4) if what == "numbers" else engine.submit().result(SECONDS)[0]

    def draw_elsewhere(rows: int) -> None:
        """While a shared forward runs; only the first is a proof."""
        if rows > 1 and not drawn:
            drawn.append(
                pool.submit(torch.rand, 4).result(SECONDS)
                if what == "numbers"
                else pool.submit(engine.submit).result(SECONDS)
            )

    with ThreadPoolExecutor(1) as pool, StepEngine(pipeline) as engine:
        with held(engine, **seeded(num_inference_steps=1)):
            jobs = [engine.submit(**seeded(i, num_inference_steps=10)) for i in range(3)]
            pipeline.network.outside.watch = draw_elsewhere
        assert [job.exception(SECONDS) for job in jobs] == [None] * 3
        first = drawn[0] if what == "numbers" else drawn[0].result(SECONDS)[0]
        assert not torch.equal(draw(), first)
        assert [one["state"] for one in engine.stats().certificates] == ["certified"]


# --- the encoder cache ---


class Encoding(Toy):
    """Edits in place what its encoder gave it."""

    def __init__(self, network: nn.Module, text_encoder: nn.Module) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(network=network, text_encoder=text_encoder)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self, ids: list[int], scale: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor]:
        found = self.encode(ids, scale)
        with self.progress_bar(total=1) as bar:
            sample = self.network(found[0], torch.tensor(1.0))
            bar.update()
        return (sample,)

    def encode(self, ids: list[int], scale: float) -> torch.Tensor:
        output = self.text_encoder(torch.tensor([ids]), output_hidden_states=True)
        found: torch.Tensor = output.last_hidden_state.clone()
        output.last_hidden_state.zero_()
        for hidden in output.hidden_states:
            found += hidden
            hidden.zero_()
        return found


def encoding() -> Encoding:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Encoding(Wave().eval(), tiny.clip()["text_encoder"].eval())


IDS = [[1, 5, 2], [1, 6, 2], [1, 5, 6, 2], [1, 6, 5, 2], [1, 7, 2], [1, 8, 2]]


def test_a_prompt_seen_before_is_not_encoded_again_and_the_result_is_right(sd3: Any) -> None:
    with StepEngine(sd3) as engine:
        assert (
            difference(engine.submit(**SD3.arguments("a red circle")).result(SECONDS), plain(SD3))
            == 0
        )
        misses, forwards = (
            engine.stats().cache_misses,
            dict(engine.stats().forwards["text_encoder"].by_rows),
        )
        assert engine.stats().cache_hits == 0
        jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(3)]
        for i, job in enumerate(jobs):
            assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
        assert engine.stats().cache_misses == misses
        assert engine.stats().cache_hits == 3 * misses
        assert engine.stats().forwards["text_encoder"].by_rows == forwards
        assert (
            difference(engine.submit(**SD3.arguments("blue")).result(SECONDS), plain(SD3, "blue"))
            == 0
        )
        assert engine.stats().cache_misses > misses


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_result_that_a_pipeline_edits_is_not_poisoned(cache_bytes: int) -> None:
    pipeline = encoding()
    expected = [pipeline(ids)[0] for ids in IDS]
    with StepEngine(pipeline, cache_bytes=cache_bytes) as engine:
        for _ in range(3):
            jobs = [engine.submit(ids) for ids in IDS for _ in range(2)]
            for i, job in enumerate(jobs):
                assert torch.allclose(job.result(SECONDS)[0], expected[i // 2], atol=1e-5)
        stats = engine.stats()
        assert (stats.cache_hits >= 2 * 2 * len(IDS)) if cache_bytes else stats.cache_hits == 0
        assert (stats.cache_bytes > 0) == (stats.cache_misses > 0) == (cache_bytes > 0)


def test_the_cache_is_bounded_in_bytes_and_keeps_what_was_used_last() -> None:
    pipeline = encoding()
    short = IDS[:2] + IDS[4:]
    with StepEngine(pipeline) as engine:
        assert engine.submit(short[0]).result(SECONDS)
        size = engine.stats().cache_bytes
    assert size >= 3 * tiny.WIDTH * 4
    with StepEngine(pipeline, cache_bytes=2 * size) as engine:
        for ids, hits in ((0, 0), (1, 0), (0, 1), (2, 1), (0, 2), (1, 2), (3, 2), (1, 3)):
            expected = pipeline(short[ids])[0]
            assert torch.equal(engine.submit(short[ids]).result(SECONDS)[0], expected)
            assert engine.stats().cache_bytes <= 2 * size
            assert engine.stats().cache_hits == hits
    with StepEngine(pipeline, cache_bytes=size - 1) as engine:
        for _ in range(2):
            assert torch.equal(engine.submit(short[0]).result(SECONDS)[0], pipeline(short[0])[0])
        assert (engine.stats().cache_hits, engine.stats().cache_bytes) == (0, 0)


class Scaling(Encoding):
    """Scales its encoder's adapters around the call of it, as diffusers does with `lora_scale`."""

    def encode(self, ids: list[int], scale: float) -> torch.Tensor:
        adapted = self.text_encoder.get_input_embeddings().weight
        adapted.mul_(scale)
        try:
            return super().encode(ids, scale)
        finally:
            adapted.div_(scale)


def test_an_encoder_whose_adapters_calls_scale_is_run_at_the_jobs_own_scale() -> None:
    pipeline = Scaling(**encoding().components)
    pipeline.text_encoder.peft_config = {"default": {}}  # what tells a module with adapters
    pipeline.text_encoder._hf_peft_config_loaded = True
    scales = (1.0, 4.0, 0.25)
    expected = [pipeline(IDS[0], scale)[0] for scale in scales]
    assert all((expected[i] - expected[i - 1]).abs().max() > TOLERANCE for i in range(3))
    with StepEngine(pipeline) as engine:
        for _ in range(2):
            jobs = [engine.submit(IDS[0], scale) for scale in scales]
            for job, sample in zip(jobs, expected, strict=True):
                assert torch.allclose(job.result(SECONDS)[0], sample, atol=1e-5)


# --- images ---


def test_images_are_made_on_another_thread_and_hold_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, making, made = SD3.build(), threading.Event(), threading.Event()
    expected = [plain(SD3, seed=seed) for seed in (0, 1)]
    makers: list[str] = []
    real = type(pipeline.image_processor).postprocess

    def postprocess(*args: Any, **kwargs: Any) -> Any:
        makers.append(threading.current_thread().name)
        if not making.is_set():
            making.set()
            assert made.wait(SECONDS)
        return real(*args, **kwargs)

    monkeypatch.setattr(type(pipeline.image_processor), "postprocess", postprocess)
    with StepEngine(pipeline) as engine:
        slow = engine.submit(**SD3.arguments("a red circle"))
        assert making.wait(SECONDS)
        quick = engine.submit(**SD3.arguments("a red circle", seed=1))
        assert difference(quick.result(SECONDS), expected[1]) == 0
        assert not slow.done()
        made.set()
        assert difference(slow.result(SECONDS), expected[0]) == 0
    assert len(makers) == 2
    assert all(name.startswith("stepweave-images") for name in makers)


def test_an_image_that_cannot_be_made_fails_its_own_job(
    sd3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(sd3.image_processor).postprocess

    def postprocess(self: Any, image: torch.Tensor, output_type: str) -> Any:
        if output_type == "pil":
            raise Own("no colours")
        return real(self, image, output_type=output_type)

    monkeypatch.setattr(type(sd3.image_processor), "postprocess", postprocess)
    with StepEngine(sd3) as engine:
        with held(engine, **SD3.arguments("x")):
            job = engine.submit(**SD3.arguments("a red circle", output_type="pil"))
            other = engine.submit(**SD3.arguments("a red circle", seed=1))
        with pytest.raises(Own, match="no colours") as caught:
            job.result(SECONDS)
        assert "postprocess" in [entry.name for entry in caught.traceback], "where it was raised"
        assert difference(other.result(SECONDS), plain(SD3, seed=1)) <= TOLERANCE


# --- bounds of a forward, and turns ---


@pytest.mark.parametrize(
    ("max_rows", "max_decode_rows"),
    [
        (6, 2),
        pytest.param(4, 8, marks=pytest.mark.full),
        pytest.param(None, 3, marks=pytest.mark.full),
    ],
)
def test_forwards_have_no_more_rows_than_allowed(
    sd3: Any, max_rows: int | None, max_decode_rows: int
) -> None:
    with StepEngine(sd3, max_rows=max_rows, max_decode_rows=max_decode_rows) as engine:
        for _ in range(3):  # at first proofs reach only a few times as far each
            with held(engine, **SD3.arguments("x", steps=1)):
                jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(8)]
            for i, job in enumerate(jobs):
                assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
        forwards = engine.stats().forwards
        assert max(forwards["transformer"].by_rows) == (max_rows or 16)
        allowed = min(max_decode_rows, max_rows or 16)
        assert 2 <= max(forwards["vae.decode"].by_rows) <= allowed


def test_a_call_of_more_rows_than_allowed_runs_alone() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion_3"].build()
    with StepEngine(pipeline, max_rows=1, max_decode_rows=1) as engine:
        job = engine.submit(**SD3.arguments("a red circle", num_images_per_prompt=3))
        assert len(job.result(SECONDS).images) == 3
        assert dict(engine.stats().forwards["transformer"].by_rows) == {6: 4}


def test_a_job_of_another_size_is_served_before_the_first_queue_is_empty() -> None:
    found: list[list[int]] = []
    pipeline = toy()
    with StepEngine(pipeline, max_rows=1) as engine:
        with held(engine, **seeded()):
            many = [engine.submit(**seeded(i, num_inference_steps=50)) for i in range(6)]
            other = engine.submit(**seeded(9, width=8, num_inference_steps=5))
            other.add_done_callback(lambda _: found.append([job.progress.step for job in many]))
        assert torch.equal(
            other.result(SECONDS)[0], pipeline(**seeded(9, width=8, num_inference_steps=5))[0]
        )
        for i, job in enumerate(many):
            assert torch.equal(
                job.result(SECONDS)[0], pipeline(**seeded(i, num_inference_steps=50))[0]
            )
    assert sum(found[0]) <= 5 + 1, "every other forward was the other size's"


def test_among_equals_the_oldest_goes_first_and_none_starves() -> None:
    with StepEngine(toy(), max_rows=2) as engine:
        with held(engine, **seeded()):
            jobs = [engine.submit(**seeded(i, num_inference_steps=20)) for i in range(9)]
        ends = []
        for job in jobs:
            assert job.exception(SECONDS) is None
            ends.append(job.finished)
    order = sorted(range(9), key=lambda i: ends[i])  # type: ignore[arg-type, return-value]
    assert all(abs(place - i) <= 2 for place, i in enumerate(order)), str(order)


# --- mode `request` ---


def calls_of(pipeline: Any) -> list[int]:
    """The rows of every forward of the denoiser from now on."""
    rows: list[int] = []
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append((args or list(kwargs.values()))[0].shape[0]),
        with_kwargs=True,
    )
    return rows


@pytest.mark.parametrize(
    "name", ["stable_diffusion_3", "stable_diffusion", "flux", "stable_cascade"]
)
def test_equal_jobs_share_one_call(name: str) -> None:
    family = tiny.FAMILIES[name]
    pipeline = family.build()
    prompts = ["a red circle", "blue", "a small blue square", "x"]
    with StepEngine(pipeline, mode="request") as engine:
        with held(engine, **family.arguments("x")):
            jobs = [
                engine.submit(**family.arguments(prompt, seed=i))
                for i, prompt in enumerate(prompts)
            ]
            other = engine.submit(**family.arguments("x", steps=3))
            last = engine.submit(**family.arguments("a red circle", seed=9))
        for i, (job, prompt) in enumerate(zip(jobs, prompts, strict=True)):
            output = job.result(SECONDS)
            assert type(output) is type(other.result(SECONDS))
            assert difference(output, plain(family, prompt, seed=i)) <= TOLERANCE
            assert job.progress == (jobs[0].progress.total,) * 2
        assert difference(last.result(SECONDS), plain(family, seed=9)) <= TOLERANCE
        assert difference(other.result(SECONDS), plain(family, "x", steps=3)) == 0
        assert len({job.started for job in [*jobs, last]}) == 1
        assert other.started != last.started
        assert engine.stats().retried == 0


def test_a_shared_call_has_no_more_images_than_allowed() -> None:
    pipeline = SD3.build()
    with StepEngine(pipeline, mode="request", max_rows=3) as engine:
        with held(engine, **SD3.arguments("x", steps=1)):
            rows = calls_of(pipeline)
            jobs = [
                engine.submit(**SD3.arguments("a red circle", seed=i, steps=1)) for i in range(7)
            ]
        for i, job in enumerate(jobs):
            assert difference(job.result(SECONDS), plain(SD3, seed=i, steps=1)) <= TOLERANCE
    assert rows == [6, 6, 2]


def test_a_cancelled_member_of_a_shared_call_ends_and_the_others_go_on() -> None:
    pipeline, gate = SD3.build(), Gate()
    with StepEngine(pipeline, mode="request") as engine:
        with held(engine, **SD3.arguments("x")):
            jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(3)]
            late = engine.submit(**SD3.arguments("a red circle", seed=3), deadline=1000)
            pipeline.transformer.register_forward_pre_hook(
                lambda *_: gate(None, 0, None, {}) or None
            )
        gate.wait()
        jobs[1].cancel()
        late.deadline = 0.0
        gate.open()
        for i in (0, 2):
            assert difference(jobs[i].result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
        assert isinstance(jobs[1].exception(SECONDS), RequestCancelledError)
        assert isinstance(late.exception(SECONDS), DeadlineExceededError)
        assert engine.stats().retried == 0
        count(engine, succeeded=3, cancelled=1, failed=1)


def test_a_shared_call_ends_when_all_of_its_members_must() -> None:
    pipeline, gate = SD3.build(), Gate()
    with StepEngine(pipeline, mode="request") as engine:
        with held(engine, **SD3.arguments("x", steps=1)):
            jobs = [
                engine.submit(**SD3.arguments("a red circle", seed=i, steps=1000)) for i in range(3)
            ]
            pipeline.transformer.register_forward_pre_hook(
                lambda *_: gate(None, 0, None, {}) or None
            )
        gate.wait()
        for job in jobs:
            job.cancel()
        gate.open()
        assert [type(job.exception(SECONDS)) for job in jobs] == [RequestCancelledError] * 3
        assert gate.steps == 1


def test_a_shared_call_that_fails_is_retried_alone() -> None:
    """From the random numbers that it would have drawn had it been alone from the start."""
    pipeline = SD3.build()

    def refuse(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs["hidden_states"].shape[0] > 2:
            raise ValueError("too many rows")

    pipeline.transformer.register_forward_pre_hook(refuse, with_kwargs=True)
    with StepEngine(pipeline, mode="request") as engine:
        with held(engine, **SD3.arguments("x")):
            jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(3)]
        for i, job in enumerate(jobs):
            assert difference(job.result(SECONDS), plain(SD3, seed=i)) <= TOLERANCE
            assert job.progress == (4, 4)
        assert engine.stats().retried == 1
        count(engine, succeeded=4)
