"""Jobs in company against plain calls, on a GPU where there is one: in float32 and, for drift, in
bfloat16.

On a machine without a GPU the very same tests run on the CPU, so that they are kept working.
"""

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
    rms,
)
from tests.support.tiny import Family

pytestmark = pytest.mark.gpu


@every_family
def test_jobs_in_company_are_the_plain_calls(family: Family, say: Callable[[str], None]) -> None:
    pipeline = build(family, torch.float32)
    expected = alone(pipeline, family)
    worst = 0.0
    with StepEngine(pipeline, knee=False) as engine:
        for _ in range(3):  # the first while certificates are granted
            for image, plain in zip(in_company(engine, family), expected, strict=True):
                worst = max(worst, float(np.abs(image - plain).max()))
        assert_merged(engine)
    say(
        f"{family.name}, float32 on {DEVICE.type}: the largest difference of a pixel is {worst:.2e}"
    )
    assert worst < TOLERANCE


@every_family
def test_company_changes_less_than_bfloat16_does(
    family: Family, say: Callable[[str], None]
) -> None:
    """Merged against alone, both in bfloat16, is held against what bfloat16 itself does to the
    plain call."""
    exact = alone(build(family, torch.float32), family)
    pipeline = build(family, torch.bfloat16)
    expected = alone(pipeline, family)
    with StepEngine(pipeline, knee=False) as engine:
        in_company(engine, family)  # while certificates are granted
        merged = in_company(engine, family)
        assert_merged(engine)
    drift, rounding = rms(merged, expected), rms(expected, exact)
    say(
        f"{family.name}, bfloat16 on {DEVICE.type}: company changes a pixel by {drift:.2e} (rms), "
        f"bfloat16 by {rounding:.2e}, "
        f"ratio {drift / rounding:.2f}"
    )
    assert drift < rounding
