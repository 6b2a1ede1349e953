"""Jobs that ask to be reproducible get the plain call's image to the last bit, in any company;
their company keeps its own."""

from __future__ import annotations

import base64
import io
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stepweave import StepEngine
from stepweave.engine.engine import Mode
from stepweave.errors import RequestCancelledError
from tests.support.in_process import InProcess
from tests.support.parity import (
    PROMPTS,
    STEPS,
    TOLERANCE,
    Company,
    Stage,
    built,
    every_family,
    expected,
    scheduler,
)
from tests.support.tiny import FAMILIES, Family
from tests.support.waiting import SECONDS

JOBS = 7
# requests to choose from, so that some are made twice: with and without the wish, and both with it
DIFFERENT = 4

some_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(FAMILIES["stable_diffusion"], id="stable_diffusion"),
        *(
            pytest.param(FAMILIES[name], id=name, marks=pytest.mark.full)
            for name in ("stable_diffusion_3", "flux")
        ),
    ],
)
other_mode = pytest.mark.parametrize("mode", ["request", "threads", "off"])


pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")


@dataclass(frozen=True)
class Mixed(Company):
    """A company of which some ask to be reproducible."""

    reproducible: tuple[bool, ...] = ()


@st.composite
def companies(draw: Callable[..., Any], swap: bool) -> Mixed:
    requests = draw(st.lists(st.integers(0, DIFFERENT - 1), min_size=JOBS, max_size=JOBS))
    wishes = draw(st.permutations([True, True, True, False, False, False, draw(st.booleans())]))
    joins = [(draw(st.integers(0, i - 1)), draw(st.integers(0, 2))) for i in range(1, JOBS)]
    leavers = draw(st.lists(st.integers(0, JOBS - 1), max_size=2, unique=True))
    leaves = [(i, draw(st.integers(0, min(STEPS) - 1))) for i in leavers]
    return Mixed(
        tuple(requests), tuple(joins), tuple(leaves), swap and draw(st.booleans()), tuple(wishes)
    )


class MixedStage(Stage):
    def _submit(self, i: int) -> None:
        company = self._company
        assert isinstance(company, Mixed)
        own = (
            scheduler(self._family, self._engine.pipeline, company.requests[i])
            if company.swap
            else None
        )
        job = self._engine.submit(
            scheduler=own, reproducible=company.reproducible[i], **self._calls[i]
        )
        self._submitted.put((i, job))
        job.add_done_callback(lambda _: self._release(i, None))


def check(family: Family, company: Mixed, mode: Mode = "step") -> Counter[str]:
    """Play, and compare every image with the plain call's. How many calls of modules there were,
    and how many merged."""
    with StepEngine(built(family, True), mode) as engine:
        jobs = MixedStage(engine, family, company).play()
        stats = engine.stats()
    for i, job in enumerate(jobs):
        if i in dict(company.leaves):
            assert isinstance(job.exception(), RequestCancelledError)
            continue
        images, plain = job.result()[0], expected(family, company.requests[i], company.swap)
        if company.reproducible[i]:
            assert np.array_equal(images, plain), (
                f"job {i} differs by {np.abs(images - plain).max():.2g}"
            )
        else:
            assert float(np.abs(images - plain).max()) <= TOLERANCE
    assert stats.errors == 0
    forwards = stats.forwards.values()
    return Counter(
        calls=sum(one.calls for one in forwards), merged=sum(one.merged_calls for one in forwards)
    )


def check_companies(family: Family, mode: Mode, examples: int) -> None:
    tally: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(company=companies(swap=mode != "request"))
    def play(company: Mixed) -> None:
        tally.update(check(family, company, mode))

    play()
    # that the others are in company, or nothing would be shown
    assert mode != "step" or tally["merged"] > 0.05 * tally["calls"]


@pytest.mark.full
@some_family
def test_reproducible_jobs_are_bitwise_those_of_plain_calls(family: Family) -> None:
    check_companies(family, "step", 8)


@other_mode
def test_reproducible_jobs_in_other_modes(mode: Mode) -> None:
    check_companies(FAMILIES["stable_diffusion_3"], mode, 3)


@pytest.mark.full
@every_family
def test_reproducible_jobs_in_many_companies(family: Family) -> None:
    check_companies(family, "step", 40)


@pytest.mark.full
@other_mode
@some_family
def test_reproducible_jobs_in_many_companies_of_other_modes(family: Family, mode: Mode) -> None:
    check_companies(family, mode, 15)


@pytest.mark.full
@some_family
def test_encodings_of_merged_forwards_never_reach_a_reproducible_job(family: Family) -> None:
    """They are remembered for others with the prompt; a reproducible job runs its encoder, and the
    next such job has that."""
    prompts = [prompt for prompt in PROMPTS if prompt][:10]
    # not every merged forward differs in its last bits from single ones: so forwards are counted,
    # too
    with StepEngine(built(family, True)) as engine:

        def run(before: str = "", **options: Any) -> list[np.ndarray]:
            calls = [
                family.arguments(before + prompt, seed=i, steps=1)
                for i, prompt in enumerate(prompts)
            ]
            gate = threading.Event()  # holds the engine up until all of them wait
            hold = {"callback_on_step_end": lambda *_: (gate.wait(SECONDS), {})[1]}
            engine.submit(**family.arguments("", steps=1, **hold), reproducible=True)
            jobs = [engine.submit(**call, **options) for call in calls]
            gate.set()
            return [job.result(SECONDS)[0] for job in jobs]

        def encoded() -> dict[str, tuple[int, int]]:
            forwards = engine.stats().forwards.items()
            return {
                name: (one.calls, one.merged_calls)
                for name, one in forwards
                if "text_encoder" in name
            }

        run("y ")  # proofs, and proofs of more rows
        run("z ")
        run()
        first = encoded()
        assert all(merged >= len(prompts) for _, merged in first.values()), first
        run()
        assert encoded() == first, "what was merged is remembered"
        images = run(reproducible=True)
        second = encoded()
        for name, (calls, merged) in second.items():
            assert calls - first[name][0] >= len(prompts)
            assert merged == first[name][1]
        assert all(map(np.array_equal, images, run(reproducible=True)))
        assert encoded() == second, "what they computed is remembered for them"
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        assert np.array_equal(
            image, built(family, False)(**family.arguments(prompt, seed=i, steps=1))[0]
        )


def test_a_reproducible_request_gets_the_plain_calls_pixels(
    in_process: Callable[..., InProcess],
) -> None:
    """Through the server, amid requests that share their steps."""
    family = FAMILIES["stable_diffusion_3"]
    app = in_process(pipeline=family.build(), batching="step", max_rows=16)
    body = {
        "prompt": "a red circle",
        "seed": 5,
        "num_inference_steps": 12,
        "guidance_scale": 3.0,
        "reproducible": True,
    }
    others = [
        {"prompt": prompt, "seed": seed, "num_inference_steps": 10 + seed}
        for seed, prompt in enumerate(prompt for prompt in PROMPTS if prompt)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda fields: app.post(**fields), [*others[:5], body, *others[5:], body])
        )
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    plain = family.build()(
        prompt=body["prompt"],
        num_inference_steps=12,
        guidance_scale=3.0,
        width=16,
        height=16,
        generator=torch.Generator().manual_seed(5),
        output_type="pil",
    )
    for answer in (answers[5].json(), answers[-1].json()):
        image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
        assert image.tobytes() == plain.images[0].tobytes()
        assert answer["parameters"]["reproducible"] is True
    assert app.server.engine is not None
    forwards = app.server.engine.stats().forwards["transformer"]
    assert forwards.merged_share > 0.3
    assert forwards.calls - forwards.merged_calls >= 2 * 12
