"""What a job held is gone with it: no tensor waits for the garbage collector, which runs when it
likes."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import nn

from stepweave import Job, StepEngine
from stepweave.engine import Latents, Mode
from stepweave.errors import DeadlineExceededError, RequestCancelledError
from tests.support import tiny
from tests.support.asgi import serving
from tests.support.fake_pipeline import FakePipeline
from tests.support.waiting import SECONDS, wait_until

every_mode = pytest.mark.parametrize("mode", get_args(Mode))
SD3 = tiny.FAMILIES["stable_diffusion_3"]


class Own(Exception):
    pass


@pytest.fixture(scope="module")
def sd3() -> StableDiffusion3Pipeline:
    pipeline: StableDiffusion3Pipeline = SD3.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> set[int]:
    # proxies warn
    return {id(one) for one in gc.get_objects() if issubclass(type(one), torch.Tensor)}


def left_by(work: Callable[[], Any]) -> int:
    """Tensors that are there after the work and were not before, a moment of the engine's threads
    granted. The first time it may fill tables that stay."""
    work()
    gc.collect()
    before = tensors()
    work()
    for _ in range(200):  # the engine's thread may still be about to let go of the job
        if not (left := tensors() - before):
            return 0
        threading.Event().wait(0.005)
    return len(left)


class Watching:
    """An observer that wants latents."""

    def __init__(self) -> None:
        self.seen = 0

    def progressed(self, job: Job) -> None:
        pass

    def wants(self, step: int, total: int) -> bool:
        return True

    def denoised(self, job: Job, latents: Latents) -> None:
        self.seen += len(latents.sample)


def fail(*_: Any) -> None:
    raise Own("in a callback")


def ends_well(engine: StepEngine) -> None:
    assert engine.submit(**SD3.arguments("a red circle")).result(SECONDS).images is not None


def is_watched(engine: StepEngine) -> None:
    watching = Watching()
    assert (
        engine.submit(**SD3.arguments("a red circle"), observer=watching).exception(SECONDS) is None
    )
    assert watching.seen


def is_awaited(engine: StepEngine) -> None:
    async def wait() -> None:
        await engine.submit(**SD3.arguments("a red circle"))
        with pytest.raises(Own):
            await engine.submit(**SD3.arguments("a red circle", callback_on_step_end=fail))

    asyncio.run(wait())


def fails_in_its_callback(engine: StepEngine) -> None:
    job = engine.submit(**SD3.arguments("a red circle", callback_on_step_end=fail))
    done: list[str] = []
    job.add_done_callback(lambda job: done.append(repr(job)))
    with pytest.raises(Own) as caught:
        job.result(SECONDS)
    assert [entry.name for entry in caught.traceback][-1] == "fail", "the traceback tells where"
    wait_until(lambda: done)
    del job, caught  # which the test's own frame would hold


def fails_in_a_module(engine: StepEngine) -> None:
    family = SD3.arguments("a red circle")
    wrong = {name: value for name, value in family.items() if name != "prompt"}
    job = engine.submit(
        prompt_embeds=torch.zeros(1, 7, 3), pooled_prompt_embeds=torch.zeros(1, 5), **wrong
    )
    assert isinstance(job.exception(SECONDS), (RuntimeError, ValueError))


def is_cancelled(engine: StepEngine) -> None:
    jobs: list[Job] = []
    submitted = threading.Event()

    def cancel(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        assert submitted.wait(SECONDS)
        jobs[0].cancel()
        return values

    jobs.append(engine.submit(**SD3.arguments("a red circle", callback_on_step_end=cancel)))
    submitted.set()
    assert isinstance(jobs[0].exception(SECONDS), RequestCancelledError)
    jobs.clear()


def is_late(engine: StepEngine) -> None:
    job: list[Job] = []
    submitted = threading.Event()

    def wait(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        assert submitted.wait(SECONDS)
        wait_until(lambda: job[0].late)
        return values

    job.append(
        engine.submit(**SD3.arguments("a red circle", callback_on_step_end=wait), deadline=0.5)
    )
    submitted.set()
    assert isinstance(job[0].exception(SECONDS), DeadlineExceededError)
    job.clear()


def makes_images(engine: StepEngine) -> None:
    assert engine.submit(**SD3.arguments("a red circle", output_type="pil")).result(SECONDS).images


def several_at_once(engine: StepEngine) -> None:
    jobs = [engine.submit(**SD3.arguments("a red circle", seed=i)) for i in range(3)]
    assert [job.exception(SECONDS) for job in jobs] == [None] * 3


ENDS = [
    ends_well,
    is_watched,
    is_awaited,
    fails_in_its_callback,
    fails_in_a_module,
    is_cancelled,
    is_late,
    makes_images,
    several_at_once,
]


@pytest.mark.parametrize("work", ENDS, ids=lambda work: work.__name__)
@every_mode
def test_no_tensor_is_left_of_a_job(
    sd3: Any, mode: Mode, work: Callable[[StepEngine], None], no_collector: None
) -> None:
    with StepEngine(sd3, mode=mode, cache_bytes=0, threads=2) as engine:
        for _ in range(3 if work is several_at_once else 1):  # certificates remember some values
            work(engine)
        assert left_by(lambda: work(engine)) == 0


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fails: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        if x.isnan().any():
            raise Own(f"of {y.shape}")
        return y


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_modules(network=network)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, start: float = 1.0, generator: Any = None) -> torch.Tensor:
        x = torch.full((1, 2), start)
        for _ in self.progress_bar(range(3)):
            inside = {"all": locals()}
            x = self.network(x)
            del inside
        return x


@every_mode
def test_no_tensor_is_left_of_a_job_that_fails_in_the_denoiser(
    mode: Mode, no_collector: None
) -> None:
    def work() -> None:
        jobs = [engine.submit(start) for start in (float("nan"), 1.0, float("nan"))]
        errors = [job.exception(SECONDS) for job in jobs]
        assert [type(error) for error in errors] == [Own, type(None), Own]

    with StepEngine(Pipeline(Fragile().eval()), mode=mode, cache_bytes=0) as engine:
        assert left_by(work) == 0


@every_mode
def test_an_error_that_is_kept_holds_no_tensors(mode: Mode, no_collector: None) -> None:
    """Somebody may keep it for long; its traceback tells where it was raised all the same."""
    kept: list[BaseException | None] = []

    def work() -> None:
        kept.append(engine.submit(float("nan")).exception(SECONDS))

    with StepEngine(Pipeline(Fragile().eval()), mode=mode, cache_bytes=0) as engine:
        assert left_by(work) == 0
    entry, names = kept[-1].__traceback__, []  # type: ignore[union-attr]
    while entry is not None:
        names.append(entry.tb_frame.f_code.co_name)
        entry = entry.tb_next
    assert names[-1] == "forward" and "__call__" in names


def test_no_tensor_is_left_of_a_job_that_starts_again(no_collector: None) -> None:
    class Stateful(Fragile):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # it keeps state, so jobs start again, one at a time
            self.calls = getattr(self, "calls", 0) + 1
            return 2 * x

    pipeline = Pipeline(Stateful().eval())

    def work() -> None:
        jobs = [engine.submit(1.0 + i) for i in range(3)]
        assert [job.exception(SECONDS) for job in jobs] == [None] * 3

    with StepEngine(pipeline, cache_bytes=0) as engine:
        assert left_by(work) == 0


class Making(FakePipeline):
    """A fake whose result holds a tensor beside its images."""

    @functools.wraps(FakePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.latents = torch.zeros(3)
        return made


class Previewing:
    """Makes previews of tensors."""

    def __init__(self) -> None:
        self.made = 0

    def image(self, latents: torch.Tensor, width: int, height: int, row: int) -> Image.Image:
        self.made += 1
        return Image.fromarray(latents.expand(height, width, 3).numpy())


@pytest.mark.parametrize("how", ["succeeds", "fails", "is kept", "streams", "leaves"])
async def test_no_tensor_is_left_of_a_request(how: str, no_collector: None) -> None:
    async with serving(Making()) as app:
        app.server.previewer = previewing = Previewing()  # type: ignore[assignment]

        async def ask() -> None:
            app.record.gated = how in ("leaves", "streams")
            app.record.release.clear()
            begun = app.record.steps_begun
            headers = {"Prefer": "respond-async"} if how == "is kept" else {}
            answer = app.post(
                headers=headers,
                **({"stream": True, "partial_images": 2} if how == "streams" else {}),
            )
            if app.record.gated:
                await app.until(lambda: app.record.steps_begun > begun)
            if how == "streams":
                [ticket] = app.server.active.values()
                assert any(ticket.wants(step, 4) for step in range(1, 5))
                ticket.denoised(ticket.job, torch.full((1, 1, 1), 7, dtype=torch.uint8))  # type: ignore[arg-type]
                await answer.until(lambda one: one.events)
                app.record.release.set()
                del ticket
            elif how == "leaves":
                await app.leave(answer)
            await answer.done()
            await app.until(lambda: not app.server.active and not app.server.jobs.keeping())  # type: ignore[union-attr]
            app.exchanges.clear()

        app.record.error = Own("made up") if how == "fails" else None
        await ask()
        await ask()
        app.record.calls.clear()
        before = tensors()
        await ask()
        app.record.calls.clear()
        await app.until(lambda: not tensors() - before)
        assert previewing.made == (3 if how == "streams" else 0)


pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick_garbage")]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
