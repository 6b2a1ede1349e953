"""The smallest pipeline that denoises, and a callback that holds its jobs until a test opens it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepweave import Job, StepEngine
from tests.support.toy import Outside
from tests.support.waiting import SECONDS


class Gate:
    """A callback that blocks its job after the first step until it is opened, and counts steps."""

    def __init__(self, closed: bool = True) -> None:
        self.steps = 0
        self.reached = threading.Event()
        self._open = threading.Event()
        if not closed:
            self._open.set()

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        self.steps += 1
        self.reached.set()
        assert self._open.wait(SECONDS)
        return values

    def wait(self) -> None:
        assert self.reached.wait(SECONDS)

    def open(self) -> None:
        self._open.set()


class Wave(nn.Module):
    """The cheapest network, of any width. `watch` is called with the rows of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))
        self.outside = Outside(watch=lambda rows: None)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.outside.watch(sample.shape[0])
        return torch.sin(self.weight * sample + timestep.reshape(-1, 1))


class Toy(DiffusionPipeline):  # type: ignore[misc]
    """The smallest pipeline that denoises."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_modules(network=network)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        width: int = 4,
        num_inference_steps: int = 3,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> tuple[torch.Tensor]:
        sample = torch.randn(1, width, generator=generator)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step in range(num_inference_steps):
                sample = self.denoise(sample, torch.tensor(float(step)))
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {})
                bar.update()
        return (sample,)

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample + self.network(sample, timestep)


def toy(kind: type[Toy] = Toy) -> Toy:
    return kind(Wave().eval())


def seeded(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The arguments of a toy's call."""
    return {"generator": torch.Generator().manual_seed(seed), **changes}


@contextlib.contextmanager
def held(engine: StepEngine, **arguments: Any) -> Iterator[Job]:
    """Block the engine's thread with a job, so that jobs submitted within the block start together
    at its end."""
    gate = Gate()
    job = engine.submit(**arguments, callback_on_step_end=gate)
    gate.wait()
    try:
        yield job
    finally:
        gate.open()
