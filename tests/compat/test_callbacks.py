"""What a job's own code writes to the shared modules is the job's: callbacks, and pipelines whose
calls do so themselves.

The job with the callback gets what a plain call with it gives, all others, before, beside and after
it, what plain calls without it give; and when the engine is closed, the caller's modules are as
they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.callbacks import IPAdapterScaleCutoffCallback, PipelineCallback
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from stepweave import StepEngine
from stepweave.compat import module_state, values
from stepweave.errors import StepweaveError
from tests.pipelines.adapters import hint, stable_diffusion_ip_adapter_text
from tests.support.comparing import state_of
from tests.support.tiny import FAMILIES
from tests.support.together import (
    SECONDS,
    TOLERANCE,
    Request,
    difference,
    numbers,
    plain,
    submit_together,
)

SD3 = FAMILIES["stable_diffusion_3"]
STEPS = 6

pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def state(pipeline: Any) -> Any:
    """The pipeline's, and what its modules have besides weights. Not of text encoders, to which
    transformers adds hooks of its own at their first call.
    """
    kept = {
        name: one for name, one in vars(pipeline).items() if not isinstance(one, PreTrainedModel)
    }
    own = {
        f"{component}.{name}": {
            key: _shown(value) for key, value in vars(module).items() if key not in APART
        }
        for component, network in kept.items()
        if isinstance(network, torch.nn.Module)
        for name, module in network.named_modules()
    }
    return {name: state_of(one) for name, one in kept.items()}, own


APART = ("_modules", "_parameters")


def _shown(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if callable(value) and not hasattr(value, "__dict__"):
        return type(value).__name__
    plain_ones = {
        k: v
        for k, v in getattr(value, "__dict__", {}).items()
        if isinstance(v, (bool, int, float, list))
    }
    return type(value).__name__, plain_ones


@dataclass
class Case:
    """A pipeline, a call of it, and a callback that writes to its modules; `special` are the
    arguments of jobs with it."""

    build: Callable[[], Any]
    ask: Callable[..., dict[str, Any]]
    special: Callable[[], dict[str, Any]]
    effect: float = 1e-3  # that it has at the least
    kept: bool = True  # whether the job with it gets what a plain call gives

    def plainly(self, seed: int) -> Request:
        return lambda: self.ask(seed)

    def specially(self, seed: int) -> Request:
        return lambda: self.ask(seed) | self.special()

    def check(self, *rounds: str) -> None:
        """Serve rounds of jobs, `p` plain ones and `s` special ones, whose seeds are their
        places."""
        asked = [
            [
                (kind, (self.specially if kind == "s" else self.plainly)(seed))
                for seed, kind in enumerate(kinds)
            ]
            for kinds in rounds
        ]
        pipeline = self.build()
        before = state(pipeline)
        wrong = []
        with StepEngine(pipeline, knee=False) as engine:
            for number, requests in enumerate(asked):
                jobs = submit_together(engine, [request for _, request in requests])
                found = [numbers(job.result(SECONDS)) for job in jobs]
                for place, ((kind, request), result) in enumerate(
                    zip(requests, found, strict=True)
                ):
                    if kind == "s" and not self.kept:
                        continue
                    [expected] = plain(self.build, [request])
                    if not (apart := difference(result, expected)) <= TOLERANCE:
                        wrong.append(f"{kind}{place} of round {number} by {apart:.2g}")
        assert not wrong, f"jobs differ from plain calls: {wrong}"
        assert engine.stats().errors == 0
        assert state(pipeline) == before, "the caller's pipeline is not as it was"


def callback(function: Callable[[Any], None], at: int = 1) -> Callable[[], dict[str, Any]]:
    """Arguments of a job that does this to its pipeline after one of its steps."""

    def on_step_end(
        pipeline: Any, step: int, timestep: Any, given: dict[str, Any]
    ) -> dict[str, Any]:
        if step == at:
            function(pipeline)
        return given

    return lambda: {"callback_on_step_end": on_step_end}


def official(kind: type[PipelineCallback], at: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"callback_on_step_end": kind(cutoff_step_ratio=None, cutoff_step_index=at)}


# IP-Adapters


def edited_from_image(seed: int) -> dict[str, Any]:
    return {
        "prompt": "a red circle",
        "ip_adapter_image": hint(seed),
        "num_inference_steps": STEPS,
        "output_type": "np",
        "height": 16,
        "width": 16,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(seed),
    }


ADAPTER = Case(
    stable_diffusion_ip_adapter_text, edited_from_image, official(IPAdapterScaleCutoffCallback, 1)
)
SCALED = Case(
    stable_diffusion_ip_adapter_text,
    edited_from_image,
    callback(lambda pipeline: pipeline.set_ip_adapter_scale(2.0)),
)


# Stable Diffusion 3


def asked(seed: int, side: int = 16) -> dict[str, Any]:
    return SD3.arguments("a red circle", seed=seed, steps=STEPS, height=side, width=side)


def tiling() -> Any:
    """Its autoencoder's tiles are small; it makes none until it is told to."""
    pipeline = SD3.build()
    pipeline.vae.tile_sample_min_size = 16
    pipeline.vae.tile_latent_min_size = 8
    return pipeline


def flagged() -> Any:
    """Its transformer heeds an attribute that is not there at first."""
    pipeline = SD3.build()
    transformer = pipeline.transformer
    original = transformer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(hidden_states * getattr(transformer, "strength", 1.0), *args, **kwargs)

    transformer.forward = forward
    return pipeline


class Doubling(JointAttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        return tuple(2 * one for one in output) if isinstance(output, tuple) else 2 * output


def set_attribute(pipeline: Any) -> None:
    pipeline.transformer.strength = 0.5


def replace_processor(pipeline: Any) -> None:
    pipeline.transformer.transformer_blocks[0].attn.processor = Doubling()


def replace_processors(pipeline: Any) -> None:
    pipeline.transformer.set_attn_processor(Doubling())


def scale_weight(pipeline: Any) -> None:
    pipeline.transformer.proj_out.weight.data.mul_(0.5)


def replace_weight(pipeline: Any) -> None:
    layer = pipeline.transformer.proj_out
    layer.weight = torch.nn.Parameter(layer.weight * 0.5, requires_grad=False)


def hook_module(pipeline: Any) -> None:
    pipeline.transformer.proj_out.register_forward_hook(lambda module, args, output: 0.5 * output)


def replace_submodule(pipeline: Any) -> None:
    pipeline.transformer.norm_out.norm = torch.nn.Identity()


def patch_forward(pipeline: Any) -> None:
    layer = pipeline.transformer.proj_out
    original = layer.forward
    layer.forward = lambda x: 0.5 * original(x)


def train(pipeline: Any) -> None:
    pipeline.transformer.train()


def droppy() -> Any:
    """Its transformer drops numbers when it trains."""
    pipeline = SD3.build()
    for part in pipeline.transformer.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3
    return pipeline


def cast(pipeline: Any) -> None:
    pipeline.transformer.proj_out.to(torch.bfloat16).to(torch.float32)


def patch_forward_of_the_whole(pipeline: Any) -> None:
    transformer = pipeline.transformer
    original = transformer.forward
    transformer.forward = lambda *args, **kwargs: (0.5 * original(*args, **kwargs)[0],)


def configure(pipeline: Any) -> None:
    pipeline.vae.register_to_config(scaling_factor=0.5)


class Settings:
    strength = 1.0


def heeding() -> Any:
    """Its transformer heeds an attribute of a class."""
    pipeline = SD3.build()
    transformer = pipeline.transformer
    original = transformer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(hidden_states * Settings.strength, *args, **kwargs)

    Settings.strength = 1.0
    transformer.forward = forward
    return pipeline


def set_class_attribute(pipeline: Any) -> None:
    Settings.strength = 0.5


class Wrapper(torch.nn.Module):
    """A class that no snapshot has seen before a callback makes one of it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.inner(x)


def wrap(pipeline: Any) -> None:
    pipeline.transformer.proj_out = Wrapper(pipeline.transformer.proj_out)


READY = torch.nn.Linear(
    SD3.build().transformer.proj_out.in_features, SD3.build().transformer.proj_out.out_features
)


def put_in_a_ready_module(pipeline: Any) -> None:
    pipeline.transformer.proj_out = READY


class Halving(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def parametrize(pipeline: Any) -> None:
    register_parametrization(pipeline.transformer.proj_out, "weight", Halving())


CASES = {
    "ip_adapter_cutoff": ADAPTER,
    "ip_adapter_scale": SCALED,
    "vae_tiling": Case(
        tiling,
        functools.partial(asked, side=48),
        callback(lambda pipeline: pipeline.vae.enable_tiling()),
    ),
    "vae_tiling_at_the_last_step": Case(
        tiling,
        functools.partial(asked, side=48),
        callback(lambda pipeline: pipeline.vae.enable_tiling(), STEPS - 1),
    ),
    "attribute": Case(flagged, asked, callback(set_attribute)),
    "processor": Case(SD3.build, asked, callback(replace_processor)),
    "processors": Case(SD3.build, asked, callback(replace_processors)),
    "scaled_weight": Case(SD3.build, asked, callback(scale_weight), kept=False),
    "replaced_weight": Case(SD3.build, asked, callback(replace_weight), kept=False),
    "hook": Case(SD3.build, asked, callback(hook_module)),
    "submodule": Case(SD3.build, asked, callback(replace_submodule)),
    "forward": Case(SD3.build, asked, callback(patch_forward)),
    "forward_of_the_whole": Case(SD3.build, asked, callback(patch_forward_of_the_whole)),
    "training": Case(droppy, asked, callback(train), kept=False),
    "cast": Case(SD3.build, asked, callback(cast), effect=1e-6, kept=False),
    "config": Case(SD3.build, asked, callback(configure)),
    "class_attribute": Case(heeding, asked, callback(set_class_attribute), kept=False),
    "wrapper": Case(SD3.build, asked, callback(wrap)),
    "ready_module": Case(SD3.build, asked, callback(put_in_a_ready_module)),
    "parametrization": Case(SD3.build, asked, callback(parametrize)),
}
# A quick run has one of each way to change a module
REPEATED = {
    "ip_adapter_scale",
    "ip_adapter_cutoff",
    "vae_tiling",
    "processor",
    "replaced_weight",
    "forward_of_the_whole",
    "training",
    "config",
    "wrapper",
    "ready_module",
    "submodule",
    "parametrization",
    "attribute",
    "hook",
    "cast",
    "forward",
}
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.full if name in REPEATED else ())
        for name, case in CASES.items()
    ],
)


@pytest.mark.full
@every_case
def test_the_callback_has_an_effect(case: Case) -> None:
    """So that the tests of this module can fail: on its own job, and on later calls of the same
    pipeline."""
    without, special = plain(case.build, [case.plainly(0), case.specially(0)])
    assert difference(without, special) > case.effect
    pipeline = case.build()
    before = state(pipeline)
    pipeline(**case.specially(1)())
    assert state(pipeline) != before
    assert difference(numbers(pipeline(**case.plainly(0)())), without) > case.effect


@pytest.mark.full
@every_case
def test_jobs_without_a_callback_are_right_and_leave_no_trace(case: Case) -> None:
    case.check("pp", "p")


@every_case
def test_what_a_callback_writes_to_the_modules_is_its_jobs_alone(case: Case) -> None:
    """Beside others, and with others before and after."""
    case.check("pp", "pspp", "ppp")


@pytest.mark.full
@every_case
def test_a_job_with_such_a_callback_may_be_the_first(case: Case) -> None:
    case.check("spp", "p")


@pytest.mark.full
@every_case
def test_several_jobs_with_such_callbacks_do_not_add_up(case: Case) -> None:
    case.check("ssp", "sp")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ip_adapter_cutoff", marks=pytest.mark.full),
        pytest.param("attribute", marks=pytest.mark.full),
        "scaled_weight",
    ],
)
def test_a_job_that_ends_early_leaves_nothing_behind(name: str) -> None:
    """Its callback writes, and then raises."""
    case = CASES[name]
    inner = case.special()["callback_on_step_end"]

    def failing(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        inner(pipeline, step, timestep, given)
        if step == 2:
            raise RuntimeError("enough")
        return given

    pipeline = case.build()
    before = state(pipeline)
    requests = [
        case.plainly(0),
        lambda: case.ask(1) | {"callback_on_step_end": failing},
        case.plainly(2),
    ]
    with StepEngine(pipeline, knee=False) as engine:
        jobs = submit_together(engine, requests)
        assert str(jobs[1].exception(SECONDS)) == "enough"
        found = [numbers(jobs[i].result(SECONDS)) for i in (0, 2)]
    expected = plain(case.build, [requests[0], requests[2]])
    assert max(map(difference, found, expected)) <= TOLERANCE
    assert state(pipeline) == before


@pytest.mark.parametrize("rounds", [("pssp", "ps"), ("s", "s", "p")], ids="-".join)
@pytest.mark.full
def test_what_a_callback_put_in_is_as_it_was(rounds: tuple[str, ...]) -> None:
    """Also for other pipelines: its weights, and the methods of its class."""
    weights = {name: one.clone() for name, one in READY.state_dict().items()}
    CASES["ready_module"].check(*rounds)
    CASES["wrapper"].check(*rounds)
    assert all(torch.equal(weights[name], one) for name, one in READY.state_dict().items())
    assert weights.keys() == READY.state_dict().keys()
    assert torch.equal(Wrapper(torch.nn.Identity())(torch.ones(2)), torch.full((2,), 0.5))


def test_weights_that_cannot_be_put_back_have_all_other_jobs_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those written to in place of which there is no copy, since they are too large."""
    for module in (module_state, values):
        monkeypatch.setattr(module, "WHOLE", 16)
    monkeypatch.setattr(values, "SAMPLE", 8)
    case = CASES["scaled_weight"]
    requests = [case.plainly(0), case.specially(1), case.plainly(2)]
    with StepEngine(SD3.build(), knee=False) as engine:
        jobs = submit_together(engine, requests)
        errors = [job.exception(SECONDS) for job in jobs]
        after = engine.submit(**case.plainly(3)()).exception(SECONDS)
    assert errors[1] is None, "what its callback did is what the job asked for"
    for error in (*filter(None, errors), after):
        assert isinstance(error, StepweaveError)
        assert error.code == "engine_failed"
        assert "transformer.proj_out.weight" in str(error)
    done = [i for i in (0, 2) if errors[i] is None]
    expected = plain(case.build, [requests[i] for i in done])
    assert all(
        difference(numbers(jobs[i].result()), one) <= TOLERANCE
        for i, one in zip(done, expected, strict=True)
    )


def test_jobs_whose_callbacks_only_look_share_forwards() -> None:
    def look(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        assert pipeline.transformer.config.in_channels == 4
        assert not pipeline.vae.use_tiling
        return given

    requests: list[Request] = [
        lambda i=i: asked(i) | {"callback_on_step_end": look} for i in range(4)
    ]  # type: ignore
    with StepEngine(SD3.build(), knee=False) as engine:
        found = [numbers(job.result(SECONDS)) for job in submit_together(engine, requests)]
    assert max(map(difference, found, plain(SD3.build, requests))) <= TOLERANCE
    assert engine.stats().forwards["transformer"].merged_share > 0.5


# Pipelines whose own calls write


class Flagging(StableDiffusion3Pipeline):  # type: ignore[misc]
    """Sets an attribute of its transformer for the length of a call, and does not take it back."""

    def __call__(self, *args: Any, flag: float | None = None, **kwargs: Any) -> Any:
        if flag is not None:
            self.transformer.strength = flag
        return super().__call__(*args, **kwargs)


class Scaling(StableDiffusion3Pipeline):  # type: ignore[misc]
    """Writes to the transformer between its steps, from a method that its call comes by."""

    @property
    def interrupt(self) -> bool:
        if getattr(self, "scaled", False):
            self.transformer.strength = 0.9 * getattr(self.transformer, "strength", 1.0)
        return False

    def __call__(self, *args: Any, flag: float | None = None, **kwargs: Any) -> Any:
        self.scaled = flag is not None
        return super().__call__(*args, **kwargs)


def made(kind: type[StableDiffusion3Pipeline]) -> Callable[[], Any]:
    def build() -> Any:
        pipeline = kind(**flagged().components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


class Reweighing(StableDiffusion3Pipeline):  # type: ignore[misc]
    """Replaces a weight of its transformer by another object, for the same numbers or for
    others."""

    def __call__(self, *args: Any, flag: float | None = None, **kwargs: Any) -> Any:
        projection = self.transformer.proj_out
        same = projection.weight.to(self.device)
        projection.weight = torch.nn.Parameter(same if flag is None else flag * same)
        projection.bias = torch.nn.Parameter(projection.bias.clone())
        return super().__call__(*args, **kwargs)


class Choosing(StableDiffusion3Pipeline):  # type: ignore[misc]
    """Writes to its transformer for some values of an argument only."""

    def __call__(self, *args: Any, flag: float = 1.0, **kwargs: Any) -> Any:
        if flag != 1.0:
            self.transformer.strength = flag
        return super().__call__(*args, **kwargs)


def choosing(seed: int) -> dict[str, Any]:
    return asked(seed) | {"flag": 1.0}


OWN = {
    kind.__name__: Case(made(kind), asked, lambda: {"flag": 0.5})
    for kind in (Flagging, Scaling, Reweighing)
}
OWN["Choosing"] = Case(made(Choosing), choosing, lambda: {"flag": 0.5})
every_own = pytest.mark.parametrize("case", OWN.values(), ids=OWN)


@every_own
def test_such_a_pipeline_changes_later_calls(case: Case) -> None:
    without, special = plain(case.build, [case.plainly(0), case.specially(0)])
    assert difference(without, special) > 1e-2
    pipeline = case.build()
    pipeline(**case.specially(1)())
    assert difference(numbers(pipeline(**case.plainly(0)())), without) > 1e-2


@every_own
@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(("pp", "pspp", "ppp"), marks=pytest.mark.full),
        pytest.param(("spp", "p"), marks=pytest.mark.full),
        ("ssp", "sp"),
    ],
    ids="-".join,
)
def test_what_a_pipeline_writes_to_its_modules_is_its_jobs_alone(
    case: Case, rounds: tuple[str, ...]
) -> None:
    case.check(*rounds)


def test_a_weight_replaced_by_another_object_for_the_same_numbers_is_no_change() -> None:
    """As StableUnCLIP's pipelines do with the mean and the deviation of their normaliser."""
    case = OWN["Reweighing"]
    requests = [case.plainly(i) for i in range(4)]
    with StepEngine(case.build(), knee=False) as engine:
        found = [
            numbers(job.result(SECONDS))
            for _ in range(2)
            for job in submit_together(engine, requests)
        ]
        stats = engine.stats()
    assert max(map(difference, found, 2 * plain(case.build, requests))) <= TOLERANCE
    assert stats.forwards["transformer"].merged_share > 0.5
    assert not stats.unshared


def test_jobs_that_each_set_a_value_of_their_own_get_it() -> None:
    case = OWN["Flagging"]
    requests: list[Request] = [lambda i=i: asked(i) | {"flag": 0.4 + 0.2 * i} for i in range(4)]  # type: ignore[misc]
    pipeline = case.build()
    with StepEngine(pipeline, knee=False) as engine:
        found = [numbers(job.result(SECONDS)) for job in submit_together(engine, requests)]
    assert max(map(difference, found, plain(case.build, requests))) <= TOLERANCE
    assert not hasattr(pipeline.transformer, "strength")
