"""A short pipeline around any denoiser, whose jobs are compared with plain calls.

served = serve(forward, [call(seed, arguments) for seed in range(4)])
served.check()
assert served.certificate["state"] == "certified"
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepweave import StepEngine
from stepweave.engine.engine import EngineStats

WIDTH, STEPS = 3, 6
SECONDS = 60
CLOSE = 1e-5  # of merged results, which are around 1; what ran alone must be equal to the last bit

Forward = Callable[..., Any]
Arguments = Callable[[int], dict[str, Any]]  # those of one step, besides the sample
Call = dict[str, Any]


class Outside(types.ModuleType):
    """A place for notes about forwards: a Python module, which the engine does not inspect. A
    module with changing attributes would count as one that keeps state."""

    def __init__(self, **noted: Any) -> None:
        super().__init__("outside")
        self.__dict__.update(noted)


def honest(x: torch.Tensor) -> torch.Tensor:
    """Every row by itself, exactly."""
    return torch.tanh(1.7 * x.flip(1) + 0.2)


def module(forward: Forward) -> nn.Module:
    """A module with this function for its forward."""
    made: nn.Module = type("Denoiser", (nn.Module,), {"forward": forward})().eval()
    return made


def tensor_of(output: Any) -> torch.Tensor:
    """The prediction in whatever a denoiser returns."""
    if isinstance(output, dict):
        output = next(iter(output.values()))
    if isinstance(output, (list, tuple)):
        output = torch.stack(tuple(output)) if all(one.ndim == 1 for one in output) else output[0]
    return output if isinstance(output, torch.Tensor) else output.sample


class Toy(DiffusionPipeline):
    """A loop around a denoiser, and before each of its calls a control, if there is one, whose
    result the denoiser takes.

    `gate` makes a call that only waits: a job that holds up the engine until others are there.
    """

    def __init__(self, denoiser: nn.Module, control: nn.Module | None = None) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)
        self.control = control
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        arguments: Arguments = lambda step: {},
        *,
        rows: int = 1,
        steps: int = STEPS,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        gate: threading.Event | None = None,
    ) -> torch.Tensor | None:
        if gate is not None:
            assert gate.wait(SECONDS)
            return None
        x = torch.randn(rows, WIDTH, generator=generator).to(dtype)
        with self.progress_bar(total=steps) as bar:
            for step in range(steps):
                extra = {} if self.control is None else {"residual": self.control(x)}
                prediction = tensor_of(self.denoiser(x, **arguments(step), **extra))
                x = 0.9 * x + 0.3 * prediction
                bar.update()
        return x


class Unseeded(Toy):
    """Takes no generator."""

    def __call__(  # type: ignore[override]
        self, arguments: Arguments = lambda step: {}, *, gate: threading.Event | None = None
    ) -> torch.Tensor | None:
        return super().__call__(arguments, gate=gate)


def call(seed: int, arguments: Arguments = lambda step: {}, **changes: Any) -> Call:
    return {"generator": seed, "arguments": arguments, **changes}


def others(count: int = 4, **changes: Any) -> list[Call]:
    """Calls that differ in their seeds."""
    return [call(seed, **changes) for seed in range(count)]


def fresh(call: Call) -> Call:
    """The keyword arguments of one call of the pipeline, its generator new."""
    return call | {"generator": torch.Generator().manual_seed(call["generator"])}


def submit_together(engine: StepEngine, calls: Sequence[Call]) -> list[Any]:
    """Submit jobs that start in the same step."""
    gate = threading.Event()
    own = {} if isinstance(engine.pipeline, Unseeded) else {"generator": torch.Generator()}
    engine.submit(gate=gate, **own)
    jobs = [engine.submit(**call) for call in calls]
    gate.set()
    return jobs


@dataclass
class Served:
    """Results of jobs, and those of plain calls."""

    results: list[Any]
    expected: list[Any]
    stats: EngineStats

    @property
    def certificate(self) -> dict[str, Any]:
        [found] = [one for one in self.stats.certificates if one["call"] == "denoiser"]
        return found

    @property
    def state(self) -> str:
        state: str = self.certificate["state"]
        return state

    @property
    def merged_share(self) -> float:
        return self.stats.forwards["denoiser"].merged_share

    @property
    def by_rows(self) -> dict[int, int]:
        return self.stats.forwards["denoiser"].by_rows

    def wrong(self) -> list[int]:
        """The jobs whose results differ from those of plain calls."""
        pairs = enumerate(zip(self.results, self.expected, strict=True))
        return [i for i, (a, b) in pairs if a.shape != b.shape or not (a - b).abs().max() <= CLOSE]

    def check(self, *, exact: bool = False) -> None:
        """Assert that all jobs got the results of plain calls (`exact`: bitwise), and that the
        engine had no errors."""
        assert not self.wrong(), f"jobs {self.wrong()} did not get what plain calls give"
        if exact:
            unequal = [
                i
                for i, (a, b) in enumerate(zip(self.results, self.expected, strict=True))
                if not torch.equal(a, b)
            ]
            assert not unequal, f"jobs {unequal} did not get what plain calls give to the last bit"
        assert self.stats.errors == 0, f"the engine made {self.stats.errors} errors"

    def check_alone(self, state: str = "failed") -> None:
        """Assert that all ran alone, with this certificate, with bitwise equal results."""
        self.check(exact=True)
        assert self.state == state, f"{self.state}: {self.certificate['reason']}"
        assert self.merged_share == 0, f"{self.merged_share:.0%} of calls were merged"


Rounds = Callable[[], Sequence[Sequence[Call]]]


def serve(
    forward: Forward, *rounds: Sequence[Call], anew: Rounds | None = None, **options: Any
) -> Served:
    """Serve the calls of each round together, one round after the other; and run them plainly, one
    by one.

    `anew` makes the rounds, each time, where what the calls are given is written to.
    """
    results, expected = [], []
    plain = Toy(module(forward))
    for calls in anew() if anew else rounds:
        expected += [plain(**fresh(one)) for one in calls]
    with StepEngine(Toy(module(forward)), knee=False, **options) as engine:
        for calls in anew() if anew else rounds:
            results += [
                job.result(SECONDS)
                for job in submit_together(engine, [fresh(one) for one in calls])
            ]
    return Served(results, expected, engine.stats())
