"""Adapters of rows in modules of few lines, whose layers get their rows in all sorts of ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepweave import StepEngine
from stepweave.compat.row_adapters import Chosen
from tests.support.together import (
    SECONDS,
    TOLERANCE,
    WIDTH,
    Loop,
    difference,
    numbers,
    request,
    submit_together,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")

_numbers = itertools.count(10**6)  # that no other adapters have


class Part:
    """What an adapter adds to a layer: a matrix of its own."""

    by_row = True

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(WIDTH, WIDTH, generator=generator)

    def apply(self, x: Tensor, result: Tensor, scale: Any) -> Tensor:
        return result + (x @ self._weight) * scale


@dataclass(frozen=True, eq=False)
class Made:
    number: int
    layers: dict[nn.Module, Part]
    modules: list[nn.Module]


class Source:
    """Adapters of the layers of one module, by the layers' names."""

    def __init__(self, module: nn.Module) -> None:
        self._made = {
            name: Made(next(_numbers), {layer: Part(seed)}, [module])
            for seed, (name, layer) in enumerate(module.named_children())
        }

    def choose_later(
        self, lora: Sequence[tuple[str, float]], given_up: Callable[[], bool]
    ) -> Future[Chosen]:
        chosen: Future[Chosen] = Future()
        chosen.set_result(Chosen([(self._made[name], scale) for name, scale in lora]))
        return chosen


class Denoiser(nn.Module):
    """With a layer for `honest` rows, and one for rows in another order."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.honest, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def streams(module: Any, x: Tensor) -> Tensor:
    """Two streams, one after the other: all rows of the first, then all of the second."""
    x = torch.tanh(module.honest(x))
    first, second = module.other(torch.cat([x, x.flip(-1)])).chunk(2)
    return torch.tanh(first + 0.5 * second)


def tokens_first(module: Any, x: Tensor) -> Tensor:
    """Four tokens of each row, and the rows along the second dimension."""
    x = torch.tanh(module.honest(x))
    tokens = torch.stack([x, x.flip(-1), 0.5 * x, -x])
    return torch.tanh(module.other(tokens).mean(0))


@torch.no_grad()
def run(forward: Any, *rounds: Sequence[Sequence[tuple[str, float]]]) -> Any:
    """Assert that jobs that start together get what they get in mode `off`. Returns statistics."""
    stats = []
    results: dict[str, list[Tensor]] = {}
    for mode in ("off", "step"):
        pipeline = Loop(Denoiser(forward).eval().requires_grad_(False))
        with StepEngine(pipeline, mode, loras=Source(pipeline.denoiser)) as engine:  # type: ignore[arg-type]
            for jobs in rounds:
                requests = [
                    lambda seed=seed, lora=lora: {**request(seed)(), "lora": lora}  # type: ignore[misc]
                    for seed, lora in enumerate(jobs)
                ]
                done = submit_together(engine, requests)
                results.setdefault(mode, []).extend(numbers(job.result(SECONDS)) for job in done)
            stats.append(engine.stats())
    assert stats[1].errors == 0
    for one, other in zip(results["off"], results["step"], strict=True):
        assert difference(one, other) <= TOLERANCE
    return stats[1]


HONEST: list[list[tuple[str, float]]] = [[("honest", 0.8)], [], [("honest", -0.5)]]
OTHER: list[list[tuple[str, float]]] = [[("honest", 0.8)], [("other", 0.5)], []]


def test_honest_layers_share_forwards() -> None:
    stats = run(streams, HONEST, HONEST)
    assert stats.forwards["denoiser"].merged_share > 0.8


@pytest.mark.parametrize(
    ("forward", "late"),
    [
        (streams, True),
        pytest.param(streams, False, marks=pytest.mark.full),
        pytest.param(tokens_first, True, marks=pytest.mark.full),
        pytest.param(tokens_first, False, marks=pytest.mark.full),
    ],
)
def test_rows_in_another_order_are_never_taken_for_others(forward: Any, late: bool) -> None:
    """That adapters of one layer can be told by rows says nothing about those of another."""
    stats = run(forward, *([HONEST] * 8 if late else []), *[OTHER] * 4)
    assert [item["reason"] for item in stats.unshared] == ["failed"]
    if late:
        assert stats.forwards["denoiser"].merged_share > 0.4
