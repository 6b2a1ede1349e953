"""Counts how often each of diffusers' schedulers reads from the device at a step: `python -m
tests.support.read_at_steps`."""

from __future__ import annotations

import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn

from stepweave import StepEngine
from stepweave.batching.call import Call, Target
from stepweave.batching.fingerprints import Fingerprints
from stepweave.batching.layout import LayoutReader
from stepweave.compat import torch_state as ambient
from stepweave.compat.host_times import keep_times_on_the_host
from tests.support.fake_device import CUDA, FakeDevice, fake_device
from tests.support.tiny import Family
from tests.support.together import submit_together
from tests.support.waiting import SECONDS

STEPS = 8


def kinds() -> Iterator[Any]:
    """All scheduler classes of diffusers with timesteps."""
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if inspect.isclass(kind) and name.endswith("Scheduler") and hasattr(kind, "set_timesteps"):
            yield kind


def steps_of(
    scheduler: Any, steps: int, device: torch.device, around: Callable[[], Any] = lambda: None
) -> torch.Tensor:
    """Run a scheduler with invented outputs; returns the last sample. `around` is called before
    each
    step and after the last."""
    scheduler.set_timesteps(steps, device=device)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    given = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(0)} if "generator" in given else {}
    torch.default_generator.manual_seed(0)  # of those that draw without one
    for time in scheduler.timesteps:
        around()
        sample = (
            scheduler.scale_model_input(sample, time)
            if hasattr(scheduler, "scale_model_input")
            else sample
        )
        output = torch.tanh(sample) / 10
        arguments = (
            (output, None, time, None, sample)
            if "timestep_back" in given
            else (output, time, sample)
        )
        sample = scheduler.step(*arguments, **extra)[0]
    around()
    return sample


def reads(scheduler: Any, device: FakeDevice, steps: int = STEPS) -> tuple[torch.Tensor, list[int]]:
    """The last sample, and the number of reads from the device in each step."""
    found: list[int] = []
    sample = steps_of(scheduler, steps, CUDA, lambda: found.append(len(device.reads)))
    return sample, [after - before for before, after in itertools.pairwise(found)]


TARGET = Target("denoiser", nn.Identity().eval(), lambda sample, timestep=None, scale=None: sample)


def call_of(sample: torch.Tensor, **arguments: Any) -> Call:
    described = Call(TARGET, (sample,), arguments, ambient.quiet(("cpu",)))
    return LayoutReader(Fingerprints()).read(described)


def run_settled(engine: StepEngine, family: Family, steps: int, number: int, jobs: int) -> None:
    """Run jobs of this many steps, certified and without audits, which read from the device."""
    assert engine._loop is not None
    for certificate in engine._loop.certificates.all():
        certificate.next_audit = 10**9
    # of equal length: a new length would need a proof
    prompts = [f"{number} {i} red circle" for i in range(jobs)]
    requests = [partial(family.arguments, prompts[i], seed=i, steps=steps) for i in range(jobs)]
    # together: otherwise a busy machine would share other steps each time, and make new proofs
    for job in submit_together(engine, requests):
        job.result(SECONDS)


def main() -> None:
    warnings.simplefilter("ignore")
    for kind in kinds():
        try:
            with fake_device() as device:
                plain, ours = kind(), kind()
                keep_times_on_the_host(ours)
                line = (
                    f"{kind.__name__}: {reads(plain, device)[1]}, in an engine "
                    f"{reads(ours, device)[1]}"
                )
        except Exception as error:
            line = (
                f"{kind.__name__}: not measured: {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0][:80]}"
            )
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
