"""Jobs in company and plain calls, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stepweave import StepEngine
from tests.support.tiny import FAMILIES, Family, networks
from tests.support.waiting import SECONDS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# Of pixels in [0, 1]. Without TF32 a product in float32 is good to some 1e-6 of its largest result,
# whatever kernel cuBLAS or cuDNN choose for the number of rows (Winograd's among them); five steps
# with guidance 5 amplify that tenfold and more. What a mixed-up row changes is 1e-2 and more
# (tests/project/test_tiny.py).
TOLERANCE = 5e-4 if DEVICE.type == "cuda" else 1e-4
PROMPTS = (
    "a red circle",
    "a small blue square on a white background",
    "a large green star",
    "ring",
    "a yellow cross on a black background, top left",
    "a tiny black ring on an orange background",
    "a purple triangle",
    "a big white square on a blue background, bottom",
)
NAMES = (
    "stable_diffusion",
    "stable_diffusion_xl",
    "stable_diffusion_3",
    "flux",
    "qwen_image",
    "controlnet_sd",
)
every_family = pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=NAMES)


def build(family: Family, dtype: torch.dtype) -> Any:
    pipeline = family.build().to(DEVICE)
    for network in networks(pipeline):
        network.to(dtype)
    if hasattr(pipeline.vae.config, "force_upcast"):
        pipeline.vae.register_to_config(force_upcast=False)  # bfloat16 decodes as it is
    return pipeline


def calls(family: Family) -> list[dict[str, Any]]:
    """Eight that differ in prompt, seed, steps and, where the family has it, guidance."""
    name = next(name for name in ("guidance_scale", "true_cfg_scale") if name in family.call)
    return [
        family.arguments(prompt, seed=i, steps=3 + i % 3, **{name: 2.0 + i / 2})
        for i, prompt in enumerate(PROMPTS)
    ]


def alone(pipeline: Any, family: Family) -> list[np.ndarray]:
    return [pipeline(**call).images for call in calls(family)]


def in_company(engine: StepEngine, family: Family) -> list[np.ndarray]:
    jobs = [engine.submit(**call) for call in calls(family)]
    return [job.result(SECONDS).images for job in jobs]


def rms(images: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The root of the mean square of all pixels' differences."""
    squares = [np.square(image - other).mean() for image, other in zip(images, others, strict=True)]
    return float(np.sqrt(np.mean(squares)))


def assert_merged(engine: StepEngine) -> None:
    stats = engine.stats()
    assert (stats.errors, stats.retried) == (0, 0), stats
    denoiser = stats.forwards.get("unet") or stats.forwards["transformer"]
    assert denoiser.merged_share > 0.8, stats
