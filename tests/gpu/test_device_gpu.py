"""What `tests/support/fake_device.py` cannot tell: what waits for a real GPU, what its errors
look like, and what is left afterwards.

On a machine without a GPU most of it is skipped: there is nothing that could be waited for.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepweave import StepEngine
from stepweave.batching.merge import merge
from stepweave.compat.host_times import READERS, keep_times_on_the_host
from stepweave.errors import DeviceFailedError
from tests.gpu.company import DEVICE, TOLERANCE
from tests.pipelines.catalog import entries
from tests.support.environment import ROOT
from tests.support.read_at_steps import call_of, run_settled, steps_of
from tests.support.tiny import FAMILIES, Family
from tests.support.toy import Toy, call, fresh, honest, module
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.gpu

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU: nothing is waited for")
FIVE = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "qwen_image")
Say = Callable[[str], None]


class Waits:
    """Operations that waited for the GPU, as CUDA's own debug mode reports them, by package and
    line."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def note(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [one for one in traceback.extract_stack()[:-1] if "/torch/" not in one.filename]
        known = [one for one in frames if any(f"/{name}/" in one.filename for name in PACKAGES)]
        last = known[-1] if known else frames[-1]
        package = next((name for name in PACKAGES if f"/{name}/" in last.filename), "other")
        with self._lock:
            self.found.append((package, f"{Path(last.filename).name}:{last.lineno} {last.line}"))

    def of(self, package: str) -> Counter[str]:
        return Counter(place for name, place in self.found if name == package)


PACKAGES = ("stepweave", "diffusers", "transformers")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits = Waits()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", waits.note)
        torch.cuda.set_sync_debug_mode("warn")
        yield waits
        torch.cuda.set_sync_debug_mode("default")


def _waits_of(
    engine: StepEngine, waits: Waits, family: Family, steps: int, number: int, jobs: int = 3
) -> Waits:
    """What waits while jobs of so many steps run; audits aside, which wait."""
    waits.found.clear()
    run_settled(engine, family, steps, number, jobs)
    found = Waits()
    found.found = list(waits.found)
    return found


@needs_gpu
@pytest.mark.parametrize("name", FIVE)
def test_a_step_waits_for_nothing(name: str, waits: Waits, say: Say) -> None:
    family, jobs = FAMILIES[name], 3
    with StepEngine(family.build().to(DEVICE), knee=False) as engine:
        for number, steps in enumerate((8, 16, 8, 16)):  # while certificates are granted
            _waits_of(engine, waits, family, steps, number)
        few = _waits_of(engine, waits, family, 8, 4)
        many = _waits_of(engine, waits, family, 16, 5)
        stats = engine.stats()
    denoiser = stats.forwards.get("unet") or stats.forwards["transformer"]
    more = many.of("stepweave") - few.of("stepweave")
    caches = [line for line in many.of("stepweave") if line.startswith("merge.py")]
    own, theirs = sum(few.of("stepweave").values()), sum(many.of("diffusers").values())
    say(
        f"{name}: {own} waits of ours for {jobs} jobs of 8 steps, diffusers' {theirs} for 16; "
        f"shared {denoiser.merged_share:.0%}"
    )
    for line, count in few.of("stepweave").most_common(6):
        say(f"    {count} {line}")
    for line, count in (many.of("diffusers") - few.of("diffusers")).most_common(3):
        say(f"    diffusers, eight steps more: {count} {line}")
    assert denoiser.merged_share > 0.8 and stats.errors == 0, stats
    assert not caches, "results are taken apart where they are"
    assert sum(more.values()) <= 3, more  # a step that two jobs did not share


@needs_gpu
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ldm", "ldm_text"])
@pytest.mark.usefixtures("full_float32")
def test_times_as_numbers_or_on_the_cpu_share_forwards(name: str, say: Say) -> None:
    entry = entries()[name]
    pipeline = entry.build().to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    plain = [pipeline(**entry.arguments(i)).images for i in range(3)]
    with StepEngine(pipeline, knee=False) as engine:
        for _ in range(3):
            jobs = [engine.submit(**entry.arguments(i)) for i in range(3)]
            made = [job.result(SECONDS).images for job in jobs]
        stats = engine.stats()
    worst = max(float(np.abs(one - other).max()) for one, other in zip(made, plain, strict=True))
    say(
        f"{name}: {stats.forwards['unet'].merged_share:.0%} of calls shared, the largest "
        f"difference of a pixel is {worst:.2e}"
    )
    assert stats.forwards["unet"].merged_share > 0.5, stats.unshared
    assert (stats.errors, stats.retried) == (0, 0)
    assert worst < TOLERANCE


@needs_gpu
@pytest.mark.parametrize(
    "kind", sorted(READERS, key=lambda one: one.__name__), ids=lambda one: one.__name__
)
def test_a_view_of_a_scheduler_waits_once_a_job(kind: Any, waits: Waits, say: Say) -> None:
    def waited(scheduler: Any) -> tuple[torch.Tensor, int]:
        waits.found.clear()
        sample = steps_of(scheduler, 11, DEVICE)
        return sample, len(waits.found)

    waited(kind())  # what is waited for once in a process
    expected, more = waited(kind())
    view = kind()
    keep_times_on_the_host(view)
    found, fewer = waited(view)
    say(f"{kind.__name__}: {more} waits in 11 steps, as a view {fewer}")
    assert torch.equal(found, expected), "to the last bit"
    assert fewer < more


@needs_gpu
def test_times_are_merged_without_waiting(waits: Waits) -> None:
    for times in (
        lambda i: 900 + i,
        lambda i: torch.tensor(900 + i),
        lambda i: torch.tensor(0.5 + i),
    ):
        calls = [
            call_of(torch.ones(2, 4, 8, 8, device=DEVICE), timestep=times(i)) for i in range(3)
        ]
        waits.found.clear()
        merged = merge(calls)
        assert not waits.found, waits.found
        assert merged["timestep"].device == DEVICE


# Errors of the device


FAILS = """
import time, torch
from stepweave import StepEngine
from stepweave.errors import DeviceFailedError
from tests.support.read_at_steps import call_of, run_settled, steps_of
from tests.support.tiny import FAMILIES

family = FAMILIES["stable_diffusion"]

def breaks(pipeline, step, time, kwargs):
    if step == 2:
        torch.zeros(4, device="cuda")[torch.tensor([10**6], device="cuda")]
    return kwargs

engine = StepEngine(family.build().to("cuda"), knee=False)
engine.submit(**family.arguments("ring", steps=8)).result(60)
start = time.monotonic()
jobs = [engine.submit(**family.arguments("ring", seed=seed, steps=8)) for seed in range(3)]
jobs.append(engine.submit(**family.arguments("ring", steps=8), callback_on_step_end=breaks))
for job in jobs:
    try:
        job.result(60)
        print("a result")
    except Exception as error:
        print("ended by", type(error).__name__, error)
print(f"after {time.monotonic() - start:.2f} s: {engine.failure}")
try:
    engine.submit(**family.arguments("ring")).result(60)
except DeviceFailedError:
    print("the next is refused")
start = time.monotonic()
engine.close(timeout=20)
print(f"closed after {time.monotonic() - start:.2f} s")
"""


@needs_gpu
def test_an_assertion_in_a_kernel_ends_all_jobs_and_is_told(say: Say) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FAILS], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    say(ran.stdout)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("ended by DeviceFailedError") == 4, ran.stdout
    assert "device-side assert" in ran.stdout
    assert "the next is refused" in ran.stdout and "closed after" in ran.stdout


@needs_gpu
def test_an_error_after_which_the_device_works_ends_one_job(say: Say) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_device(99)
        return honest(x)

    class OnGpu(Toy):
        _execution_device = DEVICE

    with StepEngine(OnGpu(module(forward)), knee=False) as engine:
        with pytest.raises(Exception) as raised:
            engine.submit(**fresh(call(0))).result(SECONDS)
        assert engine.failure is None
        say(f"{type(raised.value).__name__}: {str(raised.value).partition(chr(10))[0]}")
    assert not isinstance(raised.value, DeviceFailedError)
    assert (torch.ones(2, device=DEVICE) + 1).tolist() == [2, 2]
