"""Which numbers of steps run with which scheduler: what the rehearsals say is what the pipelines
do."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from stepweave import StepEngine
from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import InvalidRequestError, NonFiniteError
from stepweave.loading import rehearsal, schedulers
from stepweave.loading.rehearsal import Course, problem_of
from stepweave.loading.schedulers import Rehearsals, rehearse
from stepweave.parameters import Parameters, Sources
from stepweave.serving.model import ServedModel
from tests.support.in_process import InProcess
from tests.support.resolving import resolve
from tests.support.tiny import FAMILIES, NOISE_SCHEDULE
from tests.support.uploads import sources_of
from tests.support.waiting import SECONDS

COSINE = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
SOURCE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
MASK = Image.linear_gradient("L").resize((16, 16))

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings(
        "ignore"
    ),  # numpy's of tensors, torchsde's of times, of logarithms of 0 where schedulers break
]


def with_scheduler(family: str, scheduler: Any) -> Any:
    pipeline = FAMILIES[family].build()
    pipeline.register_modules(scheduler=scheduler)
    return pipeline


def cosine() -> Any:
    """A UNet with cosine betas and Karras sigmas, with which half of the schedulers break at some
    numbers of steps."""
    return with_scheduler("stable_diffusion", diffusers.EulerDiscreteScheduler(**COSINE))


def beta() -> Any:
    """Beta sigmas, of which some are equal at 34 steps and more."""
    return with_scheduler(
        "stable_diffusion_xl",
        diffusers.EulerDiscreteScheduler(**NOISE_SCHEDULE, use_beta_sigmas=True),
    )


def served(pipeline: Any, **settings: Any) -> ServedModel:
    return ServedModel(pipeline, Preset(), Settings(**settings))


def fails(engine: StepEngine, model: ServedModel, parameters: Parameters) -> bool:
    """Whether a call raises, or gives an image of one colour, as it does where latents are not
    finite."""
    try:
        images = engine.submit(**model.call(parameters)).result(SECONDS).images
    except (ValueError, IndexError, AssertionError, RuntimeError, TypeError, NonFiniteError):
        return True
    return any(np.ptp(np.asarray(image)) == 0 for image in images)


def differing(
    model: ServedModel, counts: tuple[int, ...], strengths: tuple[float | None, ...] = (None,)
) -> list[str]:
    """Where a call with a scheduler does not do what a rehearsal said, of all schedulers that are
    offered."""
    found = []
    asked: list[tuple[str, Sources | None, float | None]] = [
        (name, None if strength is None else sources_of(SOURCE), strength)
        for name in model.schedulers
        for strength in strengths
    ]
    with StepEngine(model.pipeline, "off") as engine:
        for name, sources, strength in asked:
            for steps in counts:
                arguments = {
                    "prompt": "x",
                    "seed": 1,
                    "size": "16x16",
                    "sources": sources,
                    "strength": strength,
                }
                try:
                    resolve(model, **arguments, scheduler=name, num_inference_steps=steps)  # type: ignore[arg-type]
                    runs = True
                except InvalidRequestError as error:
                    # not with this pipeline, or not a step of it
                    if error.param != "num_inference_steps":
                        continue
                    runs = False
                with mock.patch.object(Rehearsals, "runs", lambda *_: True):
                    parameters = resolve(
                        model, **arguments, scheduler=name, num_inference_steps=steps
                    )  # type: ignore[arg-type]
                if fails(engine, model, parameters) == runs and not (
                    strength is not None and ends_far(model, parameters)
                ):
                    found.append(
                        f"{name} with {steps} steps, strength {strength}: "
                        f"{'fails' if runs else 'runs'}"
                    )
    return found


def ends_far(model: ServedModel, parameters: Parameters) -> bool:
    """Whether an edit runs to something far from its image (PNDM from the middle), which random
    weights do not show."""
    scheduler = model.schedulers[parameters.scheduler or model.scheduler]
    problem = problem_of(
        scheduler, model.pipeline_for(parameters.sources), model._course(parameters)
    )
    return problem is not None and "from where they should" in problem


@pytest.mark.parametrize(
    "build",
    [pytest.param(cosine, marks=pytest.mark.full), FAMILIES["stable_diffusion_3_dynamic"].build],
)
@pytest.mark.parametrize(
    "counts", [(1, 2, 4, 11), pytest.param((3, 6), marks=pytest.mark.full)], ids=["some", "others"]
)
def test_what_is_refused_fails_and_nothing_else_does(
    build: Callable[[], Any], counts: tuple[int, ...]
) -> None:
    model = served(build())
    assert differing(model, counts) == []


@pytest.mark.full
@pytest.mark.parametrize(
    "build", [cosine, beta, *(FAMILIES[name].build for name in ("stable_diffusion", "flux"))]
)
def test_what_is_refused_fails_and_nothing_else_does_at_more_steps_and_in_edits(
    build: Callable[[], Any],
) -> None:
    model = served(build())
    assert (
        differing(model, (1, 2, 3, 4, 5, 6, 7, 8, 11, 20, 33, 34, 50), (None, 0.3, 0.5, 1.0)) == []
    )


@pytest.mark.full
def test_a_layout_where_schedulers_break_offers_them_with_the_steps_that_work() -> None:
    model = served(cosine())
    tried = model.scheduler_steps
    for name in ("DEISMultistepScheduler", "UniPCMultistepScheduler"):
        assert {11, 20, 50, 200} <= set(tried[name]["fails"]) and {1, 2, 3, 5} <= set(
            tried[name]["works"]
        )
        assert 6 in tried[name]["fails"]  # it was looked for where they begin to fail
    assert tried["PNDMScheduler"]["fails"] == [1, 2, 3] and 4 in tried["PNDMScheduler"]["works"]
    assert "EulerDiscreteScheduler" not in tried and "DDIMScheduler" not in tried
    for steps in (11, 20):
        with pytest.raises(
            InvalidRequestError, match=f"num_inference_steps is {steps}; DEISMultistep.* 1, 2, 3"
        ) as caught:
            resolve(
                model, prompt="x", scheduler="DEISMultistepScheduler", num_inference_steps=steps
            )
        assert caught.value.param == "num_inference_steps"
        assert resolve(model, prompt="x", scheduler="DDIMScheduler", num_inference_steps=steps)


@pytest.mark.full
def test_a_number_between_those_that_were_tried_is_tried_when_asked_for() -> None:
    """4 steps of this one are not finite, though 3 and 5 to 200 are."""
    pipeline = with_scheduler(
        "stable_diffusion", diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    )
    model = served(pipeline)
    name = "EulerAncestralDiscreteScheduler"
    assert name in model.schedulers and name not in model.scheduler_steps
    four = resolve(model, prompt="x", scheduler=name, num_inference_steps=4, rehearse=False)
    assert not model.knows_steps(four)
    for _ in range(2):
        with pytest.raises(
            InvalidRequestError, match=f"num_inference_steps is 4; {name} does not run"
        ):
            resolve(model, prompt="x", scheduler=name, num_inference_steps=4)
    assert model.knows_steps(four)
    assert (
        resolve(model, prompt="x", scheduler=name, num_inference_steps=5).num_inference_steps == 5
    )


# Schedulers that are well: nothing is refused


EPSILON = {"clip_sample": False, "set_alpha_to_one": False}
SANE: dict[str, Any] = {
    "leading": lambda: diffusers.DDIMScheduler(**NOISE_SCHEDULE, **EPSILON),
    "linspace": lambda: diffusers.DDIMScheduler(
        **NOISE_SCHEDULE, **EPSILON, timestep_spacing="linspace"
    ),
    "trailing": lambda: diffusers.DDIMScheduler(
        **NOISE_SCHEDULE, **EPSILON, timestep_spacing="trailing"
    ),
    "velocity": lambda: diffusers.DDIMScheduler(
        **NOISE_SCHEDULE,
        **EPSILON,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "sample": lambda: diffusers.DDIMScheduler(
        **NOISE_SCHEDULE, **EPSILON, prediction_type="sample"
    ),
    "karras": lambda: diffusers.EulerDiscreteScheduler(**NOISE_SCHEDULE, use_karras_sigmas=True),
    "plain": lambda: diffusers.DDPMScheduler(),
    "lcm": lambda: diffusers.LCMScheduler(**NOISE_SCHEDULE),
    "tcd": lambda: diffusers.TCDScheduler(**NOISE_SCHEDULE),
    "edm": lambda: diffusers.EDMEulerScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dynamic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True
    ),
}


def of_kind(name: str) -> Any:
    family = {"flow": "stable_diffusion_3", "dynamic": "flux"}.get(name, "stable_diffusion")
    return with_scheduler(family, SANE[name]())


@pytest.mark.parametrize("name", SANE)
@pytest.mark.parametrize(
    "counts",
    [(1, 2, 5, 28), pytest.param(range(1, 51), marks=pytest.mark.full)],
    ids=["few", "all"],
)
def test_schedulers_that_are_well_are_refused_at_no_steps(name: str, counts: Any) -> None:
    pipeline = of_kind(name)
    made = Rehearsals.of(pipeline, Course(50), 50).schedulers
    assert type(pipeline.scheduler).__name__ in made
    refused = {
        (kind, steps)
        for kind, one in made.items()
        for steps in counts
        if not rehearse(one, pipeline, steps)
    }
    assert refused <= {("PNDMScheduler", 1), ("PNDMScheduler", 2), ("PNDMScheduler", 3)}


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_they_run_in_half_precision_as_well(dtype: torch.dtype) -> None:
    for name in ("leading", "velocity", "flow"):
        pipeline = of_kind(name)
        made = Rehearsals.of(pipeline, Course(50), 50).schedulers
        (pipeline.unet if name != "flow" else pipeline.transformer).to(dtype)
        refused = {
            kind
            for kind, one in made.items()
            for steps in (4, 20)
            if not rehearse(one, pipeline, steps)
        }
        assert refused == set(), name


def test_a_scheduler_that_leads_elsewhere_is_found_though_it_is_finite() -> None:
    class Growing(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            sample, *others = super().step(*args, **kwargs)
            return (sample * 3, *others)

    pipeline = FAMILIES["stable_diffusion_xl"].build()
    own = Growing.from_config(pipeline.scheduler.config)
    problem = problem_of(own, pipeline, Course(20))
    assert problem is not None and "from where they should" in problem
    assert problem_of(pipeline.scheduler, pipeline, Course(20)) is None


# What is tried when


def test_the_own_scheduler_is_not_doubted_where_no_rehearsal_of_it_runs() -> None:
    # its pipelines set timesteps in ways of their own
    pipeline = FAMILIES["stable_cascade"].build()
    tried = Rehearsals.of(pipeline, Course(4), 50)
    assert (
        tried.tried(None)[0] == [] and tried.runs(None, Course(4)) and tried.knows(None, Course(4))
    )


def test_a_variance_that_the_denoiser_learned_is_rehearsed_with_its_channels() -> None:
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    pipeline = FAMILIES["stable_diffusion"].build()
    assert problem_of(learned, pipeline, Course(4)) is None


def test_one_with_noise_that_no_seed_decides_is_offered_for_no_steps() -> None:
    class Drawing(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        """Draws with more than one step."""

        def step(self, *args: Any, **kwargs: Any) -> Any:
            if len(self.timesteps) > 1:
                torch.randn(1)
            return super().step(*args, **kwargs)

    pipeline = FAMILIES["stable_diffusion_3"].build()
    one = Drawing.from_config(pipeline.scheduler.config)
    assert rehearse(one, pipeline, 1) and not rehearse(one, pipeline, 2)
    tried = Rehearsals(pipeline, [one], None, (1, 2), Course(1))
    assert tried.schedulers == {}


def test_one_that_changes_the_configuration_is_offered_for_no_steps_and_leaves_it() -> None:
    """Of all requests: another one's shift would be a call's own."""
    pipeline = FAMILIES["flux"].build()
    flow = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "use_dynamic_shifting": True,
    }
    one = diffusers.DPMSolverMultistepScheduler(**flow, time_shift_type="exponential")
    before = dict(one.config)
    assert not rehearse(one, pipeline, 1) and not rehearse(one, pipeline, 2)
    assert {name: getattr(one.config, name) for name in ("flow_shift",)} == {
        "flow_shift": before["flow_shift"]
    }
    assert "DPMSolverMultistepScheduler" not in Rehearsals.of(pipeline, Course(28), 50).schedulers


def test_what_requests_ask_for_is_rehearsed_once_without_the_global_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = served(FAMILIES["stable_diffusion"].build())
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        schedulers, "problem_of", lambda *args: calls.append(args) or problem_of(*args)
    )
    state = torch.get_rng_state()
    for _ in range(2):
        for name in model.schedulers:
            resolve(model, prompt="x", scheduler=name, num_inference_steps=9)
    assert len(calls) == len(model.schedulers)
    assert torch.equal(torch.get_rng_state(), state)
    found = model._rehearsals[model.kind.task]._found
    remembered = len(found)
    monkeypatch.setattr(schedulers, "REMEMBERED", remembered)
    for steps in range(30, 40):
        resolve(model, prompt="x", num_inference_steps=steps)
    assert len(calls) == len(model.schedulers) + 10
    assert len(found) == remembered


def test_an_edit_is_rehearsed_from_where_its_strength_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = served(FAMILIES["stable_diffusion"].build())
    begins: list[int] = []
    inner = rehearsal._begin
    monkeypatch.setattr(
        rehearsal, "_begin", lambda *args: begins.append(inner(*args)) or begins[-1]
    )
    for strength, begin in ((0.25, 15), (0.5, 10), (1.0, 0)):
        for _ in range(2):
            resolve(
                model,
                prompt="x",
                num_inference_steps=20,
                strength=strength,
                sources=sources_of(SOURCE),
            )
        assert begins == [begin]
        begins.clear()
    edit: dict[str, Any] = {
        "prompt": "x",
        "scheduler": "PNDMScheduler",
        "sources": sources_of(SOURCE, MASK),
    }
    with pytest.raises(
        InvalidRequestError, match=r"num_inference_steps is 3 and strength is 0\.5; PNDMScheduler"
    ) as caught:
        resolve(model, **edit, num_inference_steps=3, strength=0.5)
    assert caught.value.param == "num_inference_steps"


def test_how_far_dynamic_shifting_goes_is_told_from_the_size() -> None:
    """With many steps of a large image UniPC's first sigmas are one; Flux says that it begins at
    the first."""
    asked: dict[str, Any] = {
        "prompt": "x",
        "scheduler": "UniPCMultistepScheduler",
        "num_inference_steps": 60,
    }
    flux = served(FAMILIES["flux"].build())
    assert flux.limits.sizes.multiple == 4
    assert resolve(flux, **asked, size="512x512").num_inference_steps == 60
    model = served(FAMILIES["stable_diffusion_3_dynamic"].build())
    limits = model.limits
    model.keep_to(
        model.kind,
        dataclasses.replace(limits, sizes=dataclasses.replace(limits.sizes, max_side=None)),
    )
    assert resolve(model, **asked, size="256x256").num_inference_steps == 60
    with pytest.raises(
        InvalidRequestError,
        match="num_inference_steps is 60; UniPCMultistepScheduler .* at 512x512",
    ):
        resolve(model, **asked, size="512x512")


@pytest.mark.full
@pytest.mark.parametrize("steps", [34, 50])
def test_equal_timesteps_do_no_harm_where_the_pipeline_says_which_is_the_first(steps: int) -> None:
    model = served(beta())
    for name in model.schedulers:
        assert resolve(model, prompt="x", scheduler=name, num_inference_steps=steps)


@pytest.fixture
def sdxl(in_process: Callable[..., InProcess]) -> Iterator[InProcess]:
    yield in_process(FAMILIES["stable_diffusion_xl"].build(), batching="off", warmup=False)


def test_over_http_steps_that_do_not_run_are_refused_by_name(sdxl: InProcess) -> None:
    (model,) = sdxl.client.get("/v1/models").json()["data"]
    details = model["stepweave"]
    assert "PNDMScheduler" in details["schedulers"]
    assert details["scheduler_steps"]["PNDMScheduler"]["fails"] == [1, 2, 3]
    for steps in (1, 2, 3):
        answer = sdxl.post(scheduler="PNDMScheduler", num_inference_steps=steps, size="16x16")
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "num_inference_steps" and error["code"] == "invalid_value"
        assert f"num_inference_steps is {steps}; PNDMScheduler does not run" in error["message"]
        assert " 4, " in error["message"]
    assert (
        sdxl.post(scheduler="PNDMScheduler", num_inference_steps=4, size="16x16").status_code == 200
    )
    assert sdxl.post(num_inference_steps=1, size="16x16").status_code == 200


def test_a_rehearsal_does_not_hold_up_the_event_loop(
    sdxl: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []

    def noted(*args: Any) -> Any:
        try:
            asyncio.get_running_loop()
            threads.append(False)
        except RuntimeError:
            threads.append(threading.current_thread() is not threading.main_thread())
        return problem_of(*args)

    monkeypatch.setattr(schedulers, "problem_of", noted)
    assert sdxl.post(num_inference_steps=17, size="16x16").status_code == 200
    assert threads == [True]
    assert sdxl.post(num_inference_steps=17, size="16x16").status_code == 200
    assert threads == [True]


# What diffusers says of it


FOREIGN = {**NOISE_SCHEDULE, "of_another_kind": 1}


def test_rehearsals_log_nothing_and_other_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    [handler] = (
        one for one in logging.getLogger("diffusers").handlers if type(one) is logging.StreamHandler
    )
    monkeypatch.setattr(handler, "stream", io.StringIO())
    # of the model's own configuration it is told once, when that is read, and not again of each
    # scheduler that is made of it
    pipeline = with_scheduler("stable_diffusion", diffusers.PNDMScheduler.from_config(FOREIGN))
    assert (
        "{'of_another_kind': 1} were passed to PNDMScheduler, but are not expected"
        in handler.stream.getvalue()
    )
    monkeypatch.setattr(handler, "stream", io.StringIO())

    inside, told = threading.Event(), threading.Event()

    def hold(*args: Any) -> str | None:
        inside.set()
        assert told.wait(SECONDS)
        return problem_of(*args)

    def tell() -> None:
        assert inside.wait(SECONDS)
        logging.getLogger("diffusers.pipelines").warning("another thread's")
        told.set()

    other = threading.Thread(target=tell)
    other.start()
    with mock.patch.object(schedulers, "problem_of", hold):
        found = Rehearsals.of(pipeline, Course(4), 5)
        assert "DPMSolverSinglestepScheduler" in found.schedulers  # which changes its configuration
        for name in found.schedulers:
            found.runs(name, Course(7, 0.5))
    other.join(SECONDS)
    assert handler.stream.getvalue().splitlines() == ["another thread's"]
    logging.getLogger("diffusers.pipelines").warning("afterwards")
    assert handler.stream.getvalue().splitlines()[-1] == "afterwards"
