"""What an engine does on a GPU that can be told without one: on which device things are, who waits
for values, which threads make the device their own.
`tests/support/fake_device.py` has the GPU; what it cannot tell stands in docs/engine.md."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BatchEncoding

from stepweave import StepEngine
from stepweave.batching.fingerprints import Fingerprints, followed
from stepweave.batching.merge import merge, split
from stepweave.compat import torch_state as ambient
from stepweave.compat.host_times import READERS, keep_times_on_the_host
from stepweave.engine.fiber import Fiber
from stepweave.views.image_threads import ImageThreads, ImageWork
from tests.pipelines.catalog import entries
from tests.support import tiny
from tests.support.fake_device import CUDA, FakeDevice, OnDevice, Read, fake_device
from tests.support.in_process import InProcess
from tests.support.read_at_steps import call_of, reads, run_settled
from tests.support.toy import Toy, call, fresh, honest, module
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")

CLOSE = 1e-4  # of pixels in [0, 1]
NAMES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "qwen_image")


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with fake_device() as device:
        yield device


# The GPU that is not there


def test_the_fake_refuses_tensors_of_two_devices_and_notes_what_is_read(device: FakeDevice) -> None:
    one, other = torch.ones(3, device=CUDA), torch.ones(3)
    assert one.device == CUDA and isinstance(one, OnDevice)
    with pytest.raises(RuntimeError, match="same device"):
        one + other
    assert (one + torch.tensor(1.0)).device == CUDA, "a number on the CPU goes with any"
    assert not device.reads
    one.add_(1)
    assert one._version == 1
    reading: list[Callable[[], Any]] = [
        one.cpu,
        one.sum().item,
        lambda: bool(one[0] > 0),
        lambda: torch.equal(one, one),
        one.nonzero,
        one.tolist,
        lambda: other.copy_(one),
        lambda: torch.arange(9)[one[0].long()],
        lambda: one[one > 0],
        lambda: one.to("cpu", torch.int64),
    ]
    for i, read in enumerate(reading):
        before = len(device.reads)
        read()
        assert len(device.reads) > before, i
    with pytest.raises((RuntimeError, TypeError)):
        one.numpy()


# Times on the sample's device


@pytest.mark.parametrize(
    "times",
    [
        lambda i: 900 + i,
        lambda i: 0.5 + i,
        lambda i: torch.tensor(900 + i),
        lambda i: torch.tensor(0.5 + i, dtype=torch.float64),
        lambda i: torch.tensor(900 + i, device=CUDA),
        lambda i: torch.tensor(900 + i, device=CUDA if i else "cpu"),
    ],
    ids=["int", "float", "on the CPU", "double", "on the device", "on either"],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_times_are_merged_onto_the_samples_device(times: Callable[[int], Any], rows: int) -> None:
    """torch's fake tensors raise where a value is read."""
    with FakeTensorMode(), patch.object(torch.cuda, "_lazy_init", lambda: None):
        calls = [
            call_of(torch.ones(rows, 4, 8, 8, device=CUDA), timestep=times(i)) for i in range(3)
        ]
        assert len({one.kind for one in calls}) == len({one.key for one in calls}) == 1, (
            "they may meet"
        )
        merged = merge(calls)
        assert merged["sample"].device == merged["timestep"].device == CUDA
        assert merged["timestep"].shape == (3 * rows,)
        parts = split(merged["sample"], [rows] * 3)
        assert [part.device for part in parts] == [CUDA] * 3


def test_times_keep_their_values_and_numbers_of_other_arguments_go_along(
    device: FakeDevice,
) -> None:
    calls = [
        call_of(torch.ones(2, 4, device=CUDA), timestep=7 + i, scale=torch.tensor(0.5 + i))
        for i in range(2)
    ]
    device.reads.clear()
    merged = merge(calls)
    assert not device.reads, "nothing is waited for"
    assert merged["timestep"].device == merged["scale"].device == CUDA
    assert merged["timestep"].tolist() == [7, 7, 8, 8]
    assert merged["scale"].tolist() == [0.5, 0.5, 1.5, 1.5]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full) for name in ("ddim", "ddpm", "ldm", "ldm_text")],
)
def test_pipelines_that_give_times_as_numbers_or_on_the_cpu_share_forwards(
    name: str, device: FakeDevice
) -> None:
    entry = entries()[name]
    pipeline = entry.build().to(CUDA)
    pipeline.set_progress_bar_config(disable=True)
    plain = [pipeline(**entry.arguments(i)).images for i in range(3)]
    with device.engine(pipeline, knee=False) as engine:
        for _ in range(2):  # the first while certificates are granted
            jobs = [engine.submit(**entry.arguments(i)) for i in range(3)]
            made = [job.result(SECONDS).images for job in jobs]
        stats = engine.stats()
    assert stats.forwards["unet"].merged_share > 0.5, stats.unshared
    assert (stats.errors, stats.retried) == (0, 0)
    assert max(np.abs(one - other).max() for one, other in zip(made, plain, strict=True)) < CLOSE


# Threads


def test_every_thread_of_an_engine_makes_the_device_its_own() -> None:
    used: dict[str, torch.device] = {}
    second = torch.device("cuda", 1)

    def use(device: torch.device) -> None:
        used[threading.current_thread().name] = device

    class OnSecond(Toy):
        _execution_device = second

    with patch.object(torch.cuda, "set_device", use):
        for mode, threads in (("threads", 3), ("off", 1), ("request", 1)):
            used.clear()
            with StepEngine(OnSecond(module(lambda self, x: honest(x))), mode, threads=3) as engine:  # type: ignore[arg-type]
                assert engine.submit(**fresh(call(0))).result(SECONDS) is not None
                assert used == {one.name: second for one in engine._runner.threads}
                assert len(used) == threads
        used.clear()
        done = threading.Event()
        threads_of_images = ImageThreads(lambda job, answer: done.set(), second)
        job: Any = SimpleNamespace(fiber=Fiber(lambda: None, ambient.current(("cpu",))))
        threads_of_images.run(job, ImageWork(lambda: None))
        assert done.wait(SECONDS)
        assert threads_of_images.end(SECONDS)
        assert list(used.values()) == [second] and "images" in next(iter(used))


@pytest.mark.full
def test_the_step_engines_threads_do_and_close_does_for_as_long_as_it_takes(
    device: FakeDevice,
) -> None:
    family = tiny.FAMILIES["stable_diffusion"]
    with device.engine(family.build().to(CUDA)) as engine:
        engine.submit(**family.arguments("a red circle", seed=1)).result(SECONDS)
        assert device.used["stepweave-engine"] == CUDA
        assert {
            one for name, one in device.used.items() if name.startswith("stepweave-images")
        } == {CUDA}
        here = threading.current_thread().name
        device.used.pop(here, None)
        engine.close()
        assert device.used[here] == CUDA


def test_so_do_the_servers(
    in_process: Callable[..., InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, torch.device] = {}

    def use(device: torch.device) -> None:
        used[threading.current_thread().name] = device

    monkeypatch.setattr(ambient, "use_device", use)
    app = in_process(batching="off", warmup=False)
    assert used["stepweave-load"] == torch.device("cpu")
    app.server._drawers.submit(lambda: None).result(SECONDS)
    app.server._drawers.submit(lambda: None).result(SECONDS)
    assert [one for name, one in used.items() if name.startswith("stepweave-preview")] == [
        torch.device("cpu")
    ]


# What is read


def _reads_of(
    engine: StepEngine,
    device: FakeDevice,
    family: tiny.Family,
    steps: int,
    number: int,
    jobs: int = 3,
) -> list[Read]:
    """What is read while jobs of so many steps run, once all certificates are there; audits aside,
    which read."""
    device.reads.clear()
    run_settled(engine, family, steps, number, jobs)
    return list(device.reads)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in NAMES])
def test_a_step_reads_nothing_and_a_joining_job_its_token_ids_at_most_once(
    name: str, device: FakeDevice
) -> None:
    family, jobs = tiny.FAMILIES[name], 3
    with device.engine(family.build().to(CUDA), knee=False) as engine:
        for number, steps in enumerate((8, 16, 8, 16)):  # while certificates are granted
            _reads_of(engine, device, family, steps, number)
        few = _reads_of(engine, device, family, 8, 4)
        many = _reads_of(engine, device, family, 16, 5)
        stats = engine.stats()
    denoiser = stats.forwards.get("unet") or stats.forwards["transformer"]
    assert denoiser.merged_share > 0.8 and stats.errors == 0, stats
    ours = [
        Counter((one.operation, one.place) for one in reads if one.package == "stepweave")
        for reads in (few, many)
    ]
    assert ours[0] == ours[1], "twice as many steps read as much"
    tokens = [
        one
        for one in many
        if one.package == "stepweave" and one.dtype == torch.int64 and "digest" in one.place
    ]
    assert len(tokens) <= jobs, tokens
    everything = [sum(one.package != "tests" for one in reads) for reads in (few, many)]
    assert everything[0] == everything[1], "nor do the pipelines' own schedulers"


@pytest.mark.full
def test_the_same_prompt_is_known_again_without_being_read(device: FakeDevice) -> None:
    family = tiny.FAMILIES["stable_diffusion"]
    with device.engine(family.build().to(CUDA)) as engine:
        for _ in range(2):
            engine.submit(**family.arguments("a red circle", seed=1)).result(SECONDS)
        hits = engine.stats().cache_hits
        device.reads.clear()
        engine.submit(**family.arguments("a red circle", seed=1)).result(SECONDS)
        assert engine.stats().cache_hits == hits + 2, "with guidance there are two"
        assert not [one for one in device.own_reads() if "digest" in one.place]
        engine.submit(**family.arguments("a blue circle", seed=1)).result(SECONDS)
        assert engine.stats().cache_hits == hits + 3, "another prompt is another"


# Token ids


def test_token_ids_are_known_once_they_are_on_the_device(device: FakeDevice) -> None:
    digests = Fingerprints()
    plain = torch.tensor([[1, 2, 3], [4, 5, 6]])
    output = followed(
        BatchEncoding(
            {"input_ids": plain.clone(), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
        ),
        digests,
    )
    there = output.input_ids.to(CUDA)
    assert type(there) is OnDevice
    device.reads.clear()
    assert digests.of(there) == Fingerprints().of(plain)
    assert not device.reads
    assert digests.of(output.to(CUDA)["attention_mask"]) == Fingerprints().of(
        torch.ones(2, 3, dtype=torch.int64)
    )
    assert not device.reads
    half = followed(plain.clone(), digests).to(device=CUDA, dtype=torch.float16)
    assert digests.of(half) == Fingerprints().of(plain.half()) and not device.reads
    there.add_(1)
    assert digests.of(there) == Fingerprints().of(plain + 1), "what is written to there is read"
    assert device.reads


def test_token_ids_are_ordinary_in_every_other_way() -> None:
    digests = Fingerprints()
    ids = followed(torch.tensor([[1, 2, 3]]), digests)
    for made in (
        ids[:, :2],
        ids + 1,
        ids.clone(),
        torch.cat([ids, ids]),
        ids.to(torch.float32),
        ids.to("cpu"),
        ids.bool(),
    ):
        assert type(made) is torch.Tensor
    for twin in (copy.copy(ids), copy.deepcopy(ids), pickle.loads(pickle.dumps(ids))):
        assert type(twin) is torch.Tensor and torch.equal(twin, torch.tensor([[1, 2, 3]]))
    assert (ids.tolist(), ids.numpy().tolist(), ids.shape) == ([[1, 2, 3]], [[1, 2, 3]], (1, 3))
    assert followed("text", digests) == "text" and followed({"a": [1]}, digests) == {"a": [1]}


def test_ids_changed_before_they_go_are_digested_as_they_went(device: FakeDevice) -> None:
    digests = Fingerprints()
    ids = followed(torch.tensor([[1, 2, 3]]), digests)
    ids[0, 0] = 9
    there = ids.to(CUDA)
    ids[0, 0] = 5
    assert digests.of(there) == Fingerprints().of(torch.tensor([[9, 2, 3]]))


# Schedulers that read their times


def _stepped(scheduler: Any, device: FakeDevice, steps: int) -> tuple[torch.Tensor, int]:
    sample, found = reads(scheduler, device, steps)
    return sample, sum(found)


@pytest.mark.parametrize(
    "kind", sorted(READERS, key=lambda one: one.__name__), ids=lambda one: one.__name__
)
@pytest.mark.parametrize("steps", [4, 11])
def test_a_view_steps_with_times_on_the_host(kind: Any, steps: int, device: FakeDevice) -> None:
    expected, more = _stepped(kind(), device, steps)
    scheduler = kind()
    keep_times_on_the_host(scheduler)
    assert isinstance(scheduler, kind) and type(scheduler).__name__ == kind.__name__
    assert inspect.signature(scheduler.step) == inspect.signature(kind().step)
    found, fewer = _stepped(scheduler, device, steps)
    assert torch.equal(found, expected), "to the last bit"
    assert fewer == 1, "the timesteps, once a job"
    assert more >= 2 * steps - 1
    assert scheduler.timesteps.device == CUDA, "where the pipeline wants them"
    assert torch.equal(
        _stepped(scheduler, device, steps + 1)[0], _stepped(kind(), device, steps + 1)[0]
    ), "used again"
    assert torch.equal(_stepped(copy.deepcopy(scheduler), device, steps)[0], expected), (
        "a copy steps itself"
    )


def test_times_from_elsewhere_are_used_as_they_are(device: FakeDevice) -> None:
    """A time that is none of the scheduler's timesteps, or a part of them, as in image to image."""
    plain, ours = DDIMScheduler(), DDIMScheduler()
    keep_times_on_the_host(ours)
    sample = torch.ones(1, 4, device=CUDA)
    for scheduler in (plain, ours):
        scheduler.set_timesteps(10, device=CUDA)
    cases: list[Callable[[Any], Any]] = [
        lambda one: one.timesteps[4:][1],
        lambda one: one.timesteps[-1],
        lambda one: one.timesteps[3].clone(),
        lambda one: 500,
        lambda one: torch.tensor(500),
        lambda one: torch.tensor(500, device=CUDA),
        lambda one: one.timesteps[::2][2],
        lambda one: (one.timesteps + 1)[3],
    ]
    for i, time in enumerate(cases):
        results = [one.step(sample / 2, time(one), sample)[0] for one in (plain, ours)]
        assert torch.equal(*results), i
    ours.timesteps[0] = 950  # written to in place: what was copied is out of date
    plain.timesteps[0] = 950
    results = [one.step(sample / 2, one.timesteps[0], sample)[0] for one in (plain, ours)]
    assert torch.equal(*results)


def test_schedulers_of_the_callers_own_are_left_alone() -> None:
    class Own(DDIMScheduler):
        pass

    for scheduler in (Own(), DPMSolverMultistepScheduler()):
        kind = type(scheduler)
        keep_times_on_the_host(scheduler)
        assert type(scheduler) is kind
    assert all(issubclass(kind, diffusers.SchedulerMixin) for kind in READERS)
