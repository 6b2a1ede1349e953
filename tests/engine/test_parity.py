"""Parity: an image is the same in any company, whoever joins and leaves at whatever step, as from
a plain call.

Hypothesis draws the company: which requests, who joins at which step of whom, who is cancelled
when. Arrivals are calls of `submit` on the engine's own thread, so that an example runs the same
way twice. When one fails, hypothesis prints it, and `@reproduce_failure(...)` to repeat it; `pytest
--hypothesis-seed=N` repeats a whole run.

Beside the images, each family's share of denoiser calls that shared a forward is held to a bound:
a family that silently runs alone fails. `pytest -s` shows the shares; `record_property` puts them
into a JUnit report.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepweave import StepEngine
from stepweave.engine.engine import EngineStats
from stepweave.errors import RequestCancelledError
from tests.support.comparing import saved, state_of
from tests.support.parity import (
    ALONE,
    JOBS,
    NEGATIVES,
    PROMPTS,
    STEPS,
    TOLERANCE,
    Company,
    Stage,
    built,
    every_family,
    expected,
    scheduler,
    takes,
)
from tests.support.tiny import FAMILIES, Family, networks
from tests.support.waiting import SECONDS

DENOISERS = {
    "stable_diffusion": ["unet"],
    "controlnet_sd": ["unet", "controlnet"],
    "stable_diffusion_xl": ["unet"],
    "stable_diffusion_3": ["transformer"],
    "stable_diffusion_3_dynamic": ["transformer"],
    "flux": ["transformer"],
    "stable_cascade": ["prior_prior", "decoder"],
    "hunyuan_image": ["transformer"],
    "qwen_image": ["transformer"],
}
# The least shares of a denoiser's calls that shared a forward with another job's. What is missing
# of the first are the proofs (4 of some 25 calls) and the last steps of the longest job. Schedulers
# part calls, too: some count time in whole numbers, and some do not, so that six jobs with six
# schedulers are two groups.
ONE_SCHEDULER = 0.6  # measured: 0.64 to 0.88
MANY_SCHEDULERS = 0.4  # measured: 0.53 to 0.88
FEW_DRAWN, MANY_DRAWN = (
    0.05,
    0.25,
)  # of companies in which jobs join late and leave early; measured, of many: 0.35 to 0.79


def families(names: Iterable[str], quick: tuple[str, ...]) -> Any:
    """A parameter `family`; of all but a few only in the full run."""
    marks = {name: () if name in quick else (pytest.mark.full,) for name in names}
    params = [pytest.param(FAMILIES[name], id=name, marks=full) for name, full in marks.items()]
    return pytest.mark.parametrize("family", params)


MAIN = (
    "stable_diffusion",
    "stable_diffusion_xl",
    "stable_diffusion_3",
    "flux",
    "qwen_image",
    "controlnet_sd",
)
main_family = families(MAIN, quick=("stable_diffusion", "flux"))


TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print(f"\n\n{'jobs':18}{'family':28}{'module':20}{'calls':>6}{'merged':>8}", *TABLE, sep="\n")  # noqa: T201


pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")


# Requests, and what plain calls make of them


# Companies


@st.composite
def companies(draw: Callable[..., Any], most_steps: int) -> Company:
    chosen = draw(st.permutations(range(len(PROMPTS))))[:JOBS]
    if not set(chosen) & set(ALONE):
        chosen[draw(st.integers(0, JOBS - 1))] = draw(st.sampled_from(ALONE))
    joins = [
        (draw(st.integers(0, i - 1)), draw(st.integers(0, most_steps))) for i in range(1, JOBS)
    ]
    leavers = draw(st.lists(st.integers(0, JOBS - 1), max_size=2, unique=True))
    leaves = [(i, draw(st.integers(0, min(STEPS) - 1))) for i in leavers]
    return Company(tuple(chosen), tuple(joins), tuple(leaves))


def together(*, swap: bool) -> Company:
    """All join when the first has encoded its prompt."""
    return Company(tuple(range(JOBS)), ((0, 0),) * (JOBS - 1), swap=swap)


def check(family: Family, company: Company) -> EngineStats:
    """Play, and compare every image with the plain call's."""
    with StepEngine(built(family, True)) as engine:
        jobs = Stage(engine, family, company).play()
    for i, job in enumerate(jobs):
        if i in dict(company.leaves):
            assert isinstance(job.exception(), RequestCancelledError)
            continue
        images, plain = job.result()[0], expected(family, company.requests[i], company.swap)
        assert images.shape == plain.shape
        worst = float(np.abs(images - plain).max())
        assert worst <= TOLERANCE, f"job {i} differs by {worst:.2g}"
    stats = engine.stats()
    assert stats.errors == 0
    states = {f"{one['call']} {one['sample']}": one["state"] for one in stats.certificates}
    assert "failed" not in states.values(), states
    return stats


class Tally:
    """Calls of each module, and how many shared a forward."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.merged: Counter[str] = Counter()

    def add(self, stats: EngineStats) -> None:
        for name, one in stats.forwards.items():
            self.calls[name] += one.calls
            self.merged[name] += one.merged_calls

    def shares(self) -> dict[str, float]:
        return {name: self.merged[name] / self.calls[name] for name in self.calls}

    def check(self, family: Family, least: float) -> None:
        shares = self.shares()
        assert {name: shares[name] for name in DENOISERS[family.name] if shares[name] < least} == {}

    def report(self, what: str, family: Family, record: Callable[[str, object], None]) -> None:
        shares = {name: round(share, 3) for name, share in self.shares().items()}
        record("merged_shares", {"jobs": what, "family": family.name, **shares})
        for name, share in shares.items():
            TABLE.append(f"{what:18}{family.name:28}{name:20}{self.calls[name]:6}{share:8.0%}")


# Parity in company


MIXED = (
    "stable_diffusion",
    "stable_diffusion_3",
    "flux",
)  # whose schedulers are mixed in the quick run
# Whose one scheduler is left to the full run: others, or their own mixed ones, stand for them
REPEATED = (
    "stable_diffusion",
    "flux",
    "stable_cascade",
    "controlnet_sd",
    "stable_diffusion_3_dynamic",
    "hunyuan_image",
)


@pytest.mark.parametrize(
    ("family", "swap", "least"),
    [
        *(
            pytest.param(
                family,
                False,
                ONE_SCHEDULER,
                id=f"{name}-one",
                marks=pytest.mark.full if name in REPEATED else (),
            )
            for name, family in FAMILIES.items()
        ),
        *(
            pytest.param(
                family,
                True,
                MANY_SCHEDULERS,
                id=f"{name}-many",
                marks=() if name in MIXED else pytest.mark.full,
            )
            for name, family in FAMILIES.items()
        ),
    ],
)
def test_six_different_jobs_together_get_their_plain_images_and_share_forwards(
    family: Family, swap: bool, least: float, record_property: Callable[[str, object], None]
) -> None:
    """With one scheduler, and with a scheduler for each."""
    tally = Tally()
    tally.add(check(family, together(swap=swap)))
    tally.report("many schedulers" if swap else "one scheduler", family, record_property)
    tally.check(family, least)


def check_companies(
    family: Family,
    record_property: Callable[[str, object], None],
    *,
    examples: int,
    most_steps: int,
    least: float,
) -> None:
    tally = Tally()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(company=companies(most_steps))
    def play(company: Company) -> None:
        tally.add(check(family, company))

    play()
    tally.report(f"{examples} x six", family, record_property)
    tally.check(family, least)


@families(FAMILIES, quick=())
def test_an_image_is_the_same_in_any_company(
    family: Family, record_property: Callable[[str, object], None]
) -> None:
    check_companies(family, record_property, examples=3, most_steps=2, least=FEW_DRAWN)


@pytest.mark.full
@every_family
def test_an_image_is_the_same_in_many_companies(
    family: Family, record_property: Callable[[str, object], None]
) -> None:
    check_companies(family, record_property, examples=40, most_steps=5, least=MANY_DRAWN)


# Parity of everything else that a call may ask for


def pixels(output: Any) -> np.ndarray:
    """What a call gave, whatever its type, as numbers."""
    images = output[0] if isinstance(output, tuple) else output.images
    if isinstance(images, torch.Tensor):
        return images.numpy()
    if isinstance(images, np.ndarray):
        return images
    return np.stack([np.asarray(image) for image in images])


def difference(one: Any, other: Any) -> float:
    """The largest difference, in pixels of [0, 1], or as a share of the largest latent."""
    a, b = pixels(one), pixels(other)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.dtype == np.uint8:
        levels = np.abs(a.astype(int) - b.astype(int))
        assert levels.max() <= 1
        # rounding may go the other way, in single pixels
        return TOLERANCE * float((levels > 0).mean() > 0.01) * 10
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def darken(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 0.9 * tensors["latents"]}


def darken_in_place(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"].mul_(0.8)
    return tensors


def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 1
    return tensors


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def wishes(family: Family) -> list[dict[str, Any]]:
    """Calls that ask for all sorts of things."""
    negative = (
        {"negative_prompt": NEGATIVES[2], "true_cfg_scale": 3.0}
        if takes(family, "true_cfg_scale")
        else {}
    )
    if takes(family, "negative_prompt"):
        negative.setdefault("negative_prompt", NEGATIVES[2])
    width = 2 * family.call["width"]
    wide: dict[str, Any] = {"width": width}
    several: dict[str, Any] = {"prompt": PROMPTS[:2], "generator": generators(20, 21)}
    if "image" in family.call:  # ControlNet's
        wide["image"] = family.call["image"].repeat(1, 1, 1, 2)
        several["image"] = family.call["image"].repeat(2, 1, 1, 1)
    if "negative_prompt" in family.call:
        several["negative_prompt"] = NEGATIVES[:2]
    changes: list[dict[str, Any]] = [
        {},
        {"num_images_per_prompt": 2},
        {"num_images_per_prompt": 2, "generator": generators(30, 31)},
        {"output_type": "pil"},
        {"output_type": "pt"},
        {"output_type": "latent"},
        {"return_dict": False},
        {"return_dict": False, "output_type": "latent", "num_images_per_prompt": 3},
        {"callback_on_step_end": darken},
        {"callback_on_step_end": darken_in_place},
        {"callback_on_step_end": interrupt},
        negative,
        negative | {"num_images_per_prompt": 2},
        wide,
        wide | {"prompt": PROMPTS[3]},
        several,
    ]
    return [
        family.arguments(PROMPTS[i % 4], seed=i, steps=3 + i % 2) | one
        for i, one in enumerate(changes)
    ]


@families(MAIN, quick=("flux",))
def test_whatever_a_call_asks_for_it_gets_next_to_all_others(family: Family) -> None:
    plain = [built(family, False)(**call) for call in wishes(family)]
    gate = threading.Event()

    def wait(*_: Any) -> dict[str, Any]:
        assert gate.wait(SECONDS)
        return {}

    with StepEngine(built(family, True)) as engine:
        first = engine.submit(**family.arguments("", steps=1, callback_on_step_end=wait))
        jobs = [engine.submit(**call) for call in wishes(family)]
        gate.set()
        results = [job.result(SECONDS) for job in jobs]
        first.result(SECONDS)
    for i, (result, other) in enumerate(zip(results, plain, strict=True)):
        assert type(result) is type(other)
        assert difference(result, other) <= TOLERANCE, f"call {i}: {wishes(family)[i]}"
    stats = engine.stats()
    assert stats.errors == 0
    assert all(stats.forwards[name].merged_share > 0.5 for name in DENOISERS[family.name])


@main_family
def test_the_callers_pipeline_is_left_as_a_plain_call_leaves_it(
    family: Family, tmp_path: Path
) -> None:
    pipeline = family.build()
    calls = [family.arguments(prompt, seed=i) for i, prompt in enumerate(PROMPTS[:4])]
    plain = pipeline(**family.arguments(PROMPTS[0]))
    own = pipeline.scheduler
    files = saved(pipeline, tmp_path / "before")
    before = fingerprint(pipeline)
    with StepEngine(pipeline) as engine:
        jobs = [
            engine.submit(scheduler=scheduler(family, pipeline, i), **call)
            for i, call in enumerate(calls)
        ]
        cancelled = engine.submit(**family.arguments("", steps=100))
        failing = engine.submit(**family.arguments("", height=-1))
        for job in jobs:
            job.result(SECONDS)
        cancelled.cancel()
        assert isinstance(cancelled.exception(SECONDS), RequestCancelledError)
        assert isinstance(failing.exception(SECONDS), Exception)
        past_the_engine = pipeline(**family.arguments(PROMPTS[0]))
        assert np.array_equal(past_the_engine[0], plain[0])
        assert pipeline.scheduler is own
        assert {p.dtype for network in networks(pipeline) for p in network.parameters()} == {
            torch.float32
        }
    after = fingerprint(pipeline)
    assert [name for name in before | after if before.get(name) != after.get(name)] == []
    assert pipeline.scheduler is own
    assert saved(pipeline, tmp_path / "after") == files
    assert np.array_equal(pipeline(**family.arguments(PROMPTS[0]))[0], plain[0])


def fingerprint(pipeline: Any) -> dict[str, Any]:
    """Everything that a request could leave its mark on: attributes, config, weights, hooks,
    methods put over the class's own."""
    marks: dict[str, Any] = dict(state_of(pipeline))
    for network in networks(pipeline):
        for name, part in network.named_modules():
            own = vars(part).copy()
            registry, forward = own.pop("_diffusers_hook", None), own.get("forward")
            marks[f"{type(network).__name__}.{name}"] = {
                "attributes": sorted(own),
                "forward": getattr(forward, "__qualname__", repr(forward)),
                # diffusers leaves empty registries behind
                "hooks": sorted(registry.hooks) if registry else [],
                "torch hooks": (len(part._forward_hooks), len(part._forward_pre_hooks)),
                "training": part.training,
            }
    return marks
