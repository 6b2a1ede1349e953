"""All schedulers in one mixed batch: whatever diffusers calls compatible, each job with one of its
own, next to all others.

`pytest -s` shows each scheduler's largest error and what share of the UNet's calls shared a
forward.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.import_utils import DummyObject

from stepweave import StepEngine
from tests.support.tiny import FAMILIES, Family
from tests.support.waiting import SECONDS

TOLERANCE = 1e-4  # of pixels in [0, 1]; measured: 3e-6
MERGED = 0.5  # the least share of the UNet's calls; measured: 0.65 to 0.86

PROMPTS = ["a red circle", "two small dogs on a road", "x", "", "three yellow triangles"]
GUIDANCE = [5.0, 1.0, 3.0]
# Where the pipeline gives a scheduler no generator, its noise is the global generator's, unless it
# is given a seed of its own
SEEDED: dict[str, dict[str, Any]] = {"DPMSolverSDEScheduler": {"noise_sampler_seed": 11}}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "every_row_pays"),
    # DEIS, of tensors
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    # torchsde, of times that it rounds itself
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),
]


def compatible(family: Family) -> list[type]:
    """Every class that the pipeline's own scheduler calls compatible, by name."""
    found: list[type] = sorted(family.build().scheduler.compatibles, key=lambda kind: kind.__name__)
    assert len(found) >= 15
    # for want of scipy or torchsde
    assert [kind.__name__ for kind in found if isinstance(kind, DummyObject)] == []
    return found


def takes(kind: type, name: str) -> bool:
    return name in inspect.signature(kind).parameters


def call(family: Family, number: int) -> dict[str, Any]:
    """The arguments of a job: none is like another."""
    return family.arguments(
        PROMPTS[number % len(PROMPTS)],
        seed=number,
        steps=4 + number % 3,
        guidance_scale=GUIDANCE[number % len(GUIDANCE)],
    )


def check(family: Family, schedulers: list[tuple[type, dict[str, Any]]]) -> None:
    """Run a job with each scheduler, all at once, and compare each with the plain call of a
    pipeline that has it."""
    plain = family.build()
    own = plain.scheduler.config
    expected = []
    state = torch.get_rng_state()
    for number, (kind, changes) in enumerate(schedulers):
        plain.scheduler = kind.from_config(own, **SEEDED.get(kind.__name__, {}), **changes)  # type: ignore[attr-defined]
        expected.append(plain(**call(family, number))[0])
        assert torch.equal(torch.get_rng_state(), state), (
            f"{kind.__name__} draws from the global generator"
        )

    gate = threading.Event()

    def wait(*_: Any) -> dict[str, Any]:
        assert gate.wait(SECONDS)
        return {}

    pipeline = family.build()
    with StepEngine(pipeline) as engine:
        first = engine.submit(
            **family.arguments("", steps=1, callback_on_step_end=wait)
        )  # so that all others start at once
        jobs = [
            engine.submit(
                **call(family, number),
                scheduler=kind.from_config(own, **SEEDED.get(kind.__name__, {}), **changes),  # type: ignore[attr-defined]
            )
            for number, (kind, changes) in enumerate(schedulers)
        ]
        gate.set()
        results = [job.result(SECONDS)[0] for job in jobs]
        first.result(SECONDS)
    stats = engine.stats()
    errors: dict[str, float] = {}
    for (kind, changes), one, other in zip(schedulers, results, expected, strict=True):
        assert np.isfinite(other).all()
        errors[f"{kind.__name__} {changes or ''}"] = float(np.abs(one - other).max())
    share = stats.forwards["unet"].merged_share
    lines = [f"{error:8.1e}  {name}" for name, error in errors.items()]
    title = f"\n{family.name}: {len(jobs)} schedulers, {share:.0%} of the UNet's calls shared"
    print(title, *lines, sep="\n")  # noqa: T201
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    assert stats.errors == 0
    assert share >= MERGED
    # none is like another: a job that got another's result would differ by far more than the
    # tolerance
    apart = min(
        float(np.abs(one - other).max()) for i, one in enumerate(expected) for other in expected[:i]
    )
    assert apart > 100 * TOLERANCE


@pytest.mark.full
def test_every_compatible_scheduler_in_one_batch() -> None:
    family = FAMILIES["stable_diffusion"]
    check(family, [(kind, {}) for kind in compatible(family)])


@pytest.mark.full
def test_two_prediction_types_in_one_batch() -> None:
    family, types = FAMILIES["stable_diffusion_xl"], ("epsilon", "v_prediction")
    kinds = compatible(family)
    assert all(takes(kind, "prediction_type") for kind in kinds)
    check(
        family,
        [
            (kind, {"prediction_type": types[(i + j) % 2]})
            for i, kind in enumerate(kinds)
            for j in range(2)
        ],
    )


@pytest.mark.full
def test_karras_exponential_and_beta_sigmas_in_one_batch() -> None:
    family = FAMILIES["stable_diffusion"]
    variants = [
        (kind, {name: True}) for kind in compatible(family) for name in SIGMAS if takes(kind, name)
    ]
    assert {name for _, changes in variants for name in changes} == set(SIGMAS)
    assert len(variants) >= 20
    check(family, variants)


@pytest.mark.parametrize("name", SEEDED)
def test_what_is_seeded_here_draws_from_the_global_generator_without(name: str) -> None:
    family = FAMILIES["stable_diffusion"]
    pipeline = family.build()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    first, second = (pipeline(**call(family, 0))[0] for _ in range(2))
    assert np.abs(first - second).max() > 100 * TOLERANCE
