"""Progress bars of a pipeline whose jobs run together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepweave import StepEngine
from stepweave.engine import Mode
from tests.support.waiting import SECONDS

STEPS = 3


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.register_modules(unet=unet)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with self.progress_bar(total=STEPS) as bar:
            for _ in range(STEPS):
                x = self.unet(x)
                bar.update()
        return x


@pytest.mark.parametrize("mode", ["step", "request", "threads", "off"])
@pytest.mark.parametrize(
    ("configuration", "shown"), [(None, False), ({"disable": False, "desc": "mine"}, True)]
)
def test_bars_are_shown_only_if_they_are_asked_for(
    mode: Mode,
    configuration: dict[str, Any] | None,
    shown: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline = Pipeline(Doubling())
    if configuration is not None:
        pipeline.set_progress_bar_config(**configuration)
    with StepEngine(pipeline, mode) as engine:
        jobs = [engine.submit(x=torch.ones(1, 2)) for _ in range(2)]
        for job in jobs:
            assert job.result(SECONDS)[0, 0] == 2**STEPS
            assert job.progress == (STEPS, STEPS)
    printed = capsys.readouterr().err
    assert "mine" in printed if shown else printed == ""
    assert getattr(pipeline, "_progress_bar_config", None) == configuration
