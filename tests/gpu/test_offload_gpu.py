"""Jobs in company with model CPU offload, where there is a GPU that models are moved to and
from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stepweave import StepEngine
from tests.gpu.company import (
    DEVICE,
    TOLERANCE,
    alone,
    assert_merged,
    build,
    every_family,
    in_company,
)
from tests.support.tiny import Family, networks

pytestmark = pytest.mark.gpu


@every_family
def test_jobs_in_company_are_the_plain_calls_with_model_offload(
    family: Family,
    say: Callable[[str], None],
) -> None:
    pipeline = build(family, torch.float32)
    expected = alone(pipeline, family)
    pipeline.enable_model_cpu_offload(device=torch.device(DEVICE.type, 0))
    chain = [getattr(pipeline, name, None) for name in pipeline.model_cpu_offload_seq.split("->")]
    worst = 0.0
    with StepEngine(pipeline, knee=False) as engine:
        for _ in range(3):  # the first while certificates are granted
            for image, plain in zip(in_company(engine, family), expected, strict=True):
                worst = max(worst, float(np.abs(image - plain).max()))
        assert_merged(engine)
        if DEVICE.type == "cuda":
            there = [
                one
                for one in chain
                if one is not None and next(one.parameters()).device.type == "cuda"
            ]
            assert len(there) == 1  # the last one used
    assert all(
        parameter.device.type == "cpu"
        for network in networks(pipeline)
        for parameter in network.parameters()
    )
    say(
        f"{family.name}, offloaded from {DEVICE.type}: the largest difference of a pixel is "
        f"{worst:.2e}"
    )
    assert worst < TOLERANCE
