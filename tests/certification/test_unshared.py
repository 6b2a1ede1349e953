"""What shares no forward, and whether anybody is told: nothing takes turns that need not, and
whatever does is listed with why.

Plain calls are of untouched pipelines, each built anew.
"""

from __future__ import annotations

import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor, nn

from stepweave import StepEngine
from stepweave.reasons import UnsharedReason
from stepweave.telemetry import collectors
from tests.pipelines.registry import example_image
from tests.support.tiny import FAMILIES
from tests.support.together import (
    SECONDS,
    TOLERANCE,
    Build,
    Loop,
    Outcome,
    Request,
    difference,
    honest,
    looped,
    numbers,
    plain,
    request,
    run,
    submit_together,
    warnings_of,
)

XL = FAMILIES["stable_diffusion_xl"]
SD3 = FAMILIES["stable_diffusion_3"]
PROMPTS = ["a red circle", "two small dogs", "x", "blue"]
STEPS = (5, 6, 7, 6)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "every_row_pays"),
    # diffusers' own call of it
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
]

every_type = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(one, marks=[pytest.mark.full] if one is torch.float16 else [])
        for one in TYPES.values()
    ],
    ids=TYPES,
)


# Autoencoders that calls cast


def upcasting(dtype: torch.dtype) -> Any:
    """Stable Diffusion XL in half precision, whose autoencoder says that it overflows."""
    pipeline = XL.build().to(dtype)
    pipeline.vae.register_to_config(force_upcast=True)
    return pipeline


def drawn(seed: int, **changes: Any) -> Request:
    return lambda: XL.arguments(PROMPTS[seed % 4], seed=seed, steps=STEPS[seed % 4], **changes)


def edited(pipeline: Any, seed: int) -> dict[str, Any]:
    """A call of image to image."""
    given = XL.arguments(PROMPTS[seed % 4], seed=seed, steps=8)
    del given["height"], given["width"]
    return given | {"image": example_image(seed), "strength": 0.7}


def image_to_image(pipeline: Any) -> Any:
    made = StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def runs_in(dtype: torch.dtype) -> str | None:
    """Why the pipeline cannot be run in this type here; None if it can."""
    try:
        upcasting(dtype)(**drawn(0)())
    except RuntimeError as error:
        return f"torch cannot run it here: {error}"
    return None


@functools.cache
def noise(dtype: torch.dtype) -> float:
    """What rounding makes of the same call by itself, and beside one or three others: the largest
    difference of images, times four. Several prompts in one plain call go through the same
    modules with as many times the rows.
    """
    largest = 0.0
    for seed, count in ((0, 2), (1, 4), (2, 2), (3, 4)):
        [alone] = plain(lambda: upcasting(dtype), [drawn(seed)])
        together = drawn(seed)() | {
            "prompt": [PROMPTS[(seed + i) % 4] for i in range(count)],
            "generator": [torch.Generator().manual_seed(seed + 7 * i) for i in range(count)],
        }
        largest = max(largest, difference(alone, numbers(upcasting(dtype)(**together))[:1]))
    return max(4 * largest, 2**-6)  # a few last bits of bfloat16's at the least


@every_type
def test_the_noise_of_half_precision_is_far_less_than_what_tells_images_apart(
    dtype: torch.dtype,
) -> None:
    """So that the tests of this module can fail."""
    if reason := runs_in(dtype):
        pytest.skip(reason)
    images = plain(lambda: upcasting(dtype), [drawn(seed) for seed in range(3)])
    assert noise(dtype) < 0.15
    assert min(difference(images[i], images[j]) for i in range(3) for j in range(i)) > 3 * noise(
        dtype
    )


@every_type
def test_jobs_share_forwards_though_the_autoencoder_is_to_be_cast(dtype: torch.dtype) -> None:
    """In bfloat16 diffusers never casts it to decode; in float16 it does, for each call, and casts
    it back."""
    if reason := runs_in(dtype):
        pytest.skip(reason)
    requests = [drawn(seed) for seed in range(4)]
    expected = plain(lambda: upcasting(dtype), requests)
    pipeline = upcasting(dtype)
    with StepEngine(pipeline, knee=False) as engine:
        found = [numbers(job.result(SECONDS)) for job in submit_together(engine, requests)]
        found += [numbers(job.result(SECONDS)) for job in submit_together(engine, requests)]
    outcome = Outcome(found, expected * 2, engine.stats())
    outcome.check(noise(dtype))
    assert outcome.merged_share("unet") > 0.5
    assert pipeline.vae.dtype == dtype


@pytest.mark.full
@every_type
def test_a_reproducible_job_beside_them_is_that_of_a_plain_call_to_the_last_bit(
    dtype: torch.dtype,
) -> None:
    if reason := runs_in(dtype):
        pytest.skip(reason)
    requests = [drawn(seed) for seed in range(4)]
    expected = plain(lambda: upcasting(dtype), requests)
    with StepEngine(upcasting(dtype), knee=False) as engine:
        jobs = submit_together(engine, requests[:3])
        jobs.append(engine.submit(**requests[3](), reproducible=True))
        found = [numbers(job.result(SECONDS)) for job in jobs]
    assert torch.equal(found[3], expected[3])
    Outcome(found, expected, engine.stats()).check(noise(dtype))


@pytest.mark.full
@every_type
def test_image_to_image_and_text_to_image_beside_each_other_are_right(dtype: torch.dtype) -> None:
    """Image to image casts the autoencoder while it encodes, in bfloat16, too."""
    if reason := runs_in(dtype):
        pytest.skip(reason)
    drawings = [drawn(seed) for seed in range(3)]
    expected = plain(lambda: upcasting(dtype), drawings)
    for seed in range(3):
        expected.append(numbers(image_to_image(upcasting(dtype))(**edited(None, seed))))
    pipeline = upcasting(dtype)
    other = image_to_image(pipeline)
    with StepEngine(pipeline, knee=False) as engine:
        for _ in range(2):
            jobs = submit_together(engine, drawings)
            jobs += [engine.submit(pipeline=other, **edited(other, seed)) for seed in range(3)]
            found = [numbers(job.result(SECONDS)) for job in jobs]
            Outcome(found, expected, engine.stats()).check(noise(dtype))
    assert pipeline.vae.dtype == dtype


@pytest.mark.full  # beside text to image, which is harder, it is in the quick run
@every_type
def test_an_engine_of_image_to_image_alone_is_right(dtype: torch.dtype) -> None:
    if reason := runs_in(dtype):
        pytest.skip(reason)
    requests: list[Request] = [functools.partial(edited, None, seed) for seed in range(4)]
    outcome = run(lambda: image_to_image(upcasting(dtype)), requests, requests)
    outcome.check(noise(dtype))


# Modules that are wrapped, or whose forward is patched, and that do the same


def asked(seed: int) -> Request:
    return lambda: SD3.arguments(PROMPTS[seed % 4], seed=seed, steps=STEPS[seed % 4])


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.usefixtures("compiler")
def test_a_module_that_is_compiled_whole_shares_forwards() -> None:
    """Stable Diffusion XL gives its UNet the sample and the time by position, and a compiled one
    has no names for them."""
    pipeline = XL.build()
    pipeline.unet = compiled = torch.compile(pipeline.unet, backend="eager")
    requests = [drawn(seed) for seed in range(4)]
    expected = plain(XL.build, requests)  # what is compiled does the same
    with StepEngine(pipeline, knee=False) as engine:
        found = [
            numbers(job.result(SECONDS))
            for _ in range(2)
            for job in submit_together(engine, requests)
        ]
    outcome = Outcome(found, expected * 2, engine.stats())
    outcome.check()
    assert outcome.merged_share("unet") > 0.5
    assert pipeline.unet is compiled


def passing_on(pipeline: Any, wrap: Callable[[Any], Any], name: str = "transformer") -> Any:
    module = getattr(pipeline, name)
    module.forward = wrap(module.forward)
    return pipeline


def by_lambda(original: Any) -> Any:
    return lambda *args, **kwargs: original(*args, **kwargs)


def by_function(original: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        """With a local of its own."""
        output = original(*args, **kwargs)
        return output

    return forward


def by_wraps(original: Any) -> Any:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return forward


def by_partial(original: Any) -> Any:
    return functools.partial(original)


def by_object(original: Any) -> Any:
    class Forward:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

    return Forward()


WRAPS = (by_lambda, by_function, by_wraps, by_partial, by_object)
QUICK = {("transformer", by_wraps)}


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        pytest.param(name, wrap, marks=() if (name, wrap) in QUICK else pytest.mark.full)
        for name in ("transformer", "unet")
        for wrap in WRAPS
    ],
)
def test_a_module_whose_forward_is_passed_on_shares_forwards(
    wrap: Callable[[Any], Any], name: str
) -> None:
    """The UNet is given its sample and its time by position."""
    family, ask = (XL, drawn) if name == "unet" else (SD3, asked)
    requests = [ask(seed) for seed in range(4)]
    outcome = run(lambda: passing_on(family.build(), wrap, name), requests, requests)
    outcome.check_merged(name, 0.5)


def test_a_module_that_is_called_by_position_through_a_lambda_shares_forwards() -> None:
    """Without a signature there are no names for what is given by position."""

    def build() -> Loop:
        loop: Loop = looped(lambda self, x, shift=None: honest(x))()
        original = loop.denoiser.forward
        loop.denoiser.forward = lambda *args, **kwargs: original(*args, **kwargs)
        return loop

    run(
        build, [request(seed) for seed in range(4)], [request(seed) for seed in range(4)]
    ).check_merged()


# What is listed


def listed(outcome: Outcome, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = outcome.stats.unshared
    for one in found:
        assert set(one) == {"call", "reason", "detail"}
        assert (
            one["reason"].isidentifier()
            and one["reason"] == one["reason"].lower()
            and len(one["reason"]) <= 40
        )
        assert isinstance(one["detail"], str) and one["detail"]
    return [one for one in found if one["call"] == name]


def counting() -> Build:
    def build() -> Loop:
        loop: Loop = looped(lambda self, x: honest(x))()
        original = loop.denoiser.forward
        kept = {"turns": 0}

        def forward(x: Tensor) -> Tensor:
            kept["turns"] += 1
            return original(x) * (0.5 if kept["turns"] % 3 == 0 else 1)

        loop.denoiser.forward = forward
        return loop

    return build


def four() -> list[Request]:
    return [request(seed) for seed in range(4)]


def check_listed(outcome: Outcome, reasons: set[str], caplog: pytest.LogCaptureFixture) -> None:
    """One entry, and one line of the log."""
    [entry] = listed(outcome, "denoiser")
    assert entry["reason"] in reasons
    assert len(warnings_of(caplog, "denoiser")) == 1


def test_a_module_that_keeps_state_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    outcome = run(counting(), four(), four(), four())
    outcome.check_alone()
    check_listed(outcome, {"state"}, caplog)


def test_a_module_that_mixes_rows_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    outcome = run(
        looped(lambda self, x: honest(x) + x.mean(0, keepdim=True)), four(), four(), four()
    )
    outcome.check_alone()
    check_listed(outcome, {"failed"}, caplog)


class Rowless(Loop):
    """Calls its denoiser with numbers only."""

    @torch.no_grad()
    def __call__(self, *, steps: int = 6, generator: torch.Generator | None = None) -> Tensor:  # type: ignore[override]
        x = torch.randn(1, 8, generator=generator)
        with self.progress_bar(total=steps) as bar:
            for step in range(steps):
                x = 0.9 * x + 0.3 * self.denoiser(scale=0.1 * step)
                bar.update()
        return x


def rowless() -> Rowless:
    return Rowless(looped(lambda self, scale: torch.full((1, 8), scale))().denoiser)


def test_a_call_whose_arguments_have_no_rows_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    outcome = run(rowless, four(), four(), four())
    outcome.check_alone()
    [entry] = listed(outcome, "denoiser")
    assert entry["reason"] not in ("state", "failed", "callback", "reproducible", "random")
    assert len(warnings_of(caplog, "denoiser")) == 1


def test_what_shares_forwards_is_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    outcome = run(looped(lambda self, x: honest(x)), four(), four())
    outcome.check_merged()
    assert listed(outcome, "denoiser") == []
    assert warnings_of(caplog, "denoiser") == []


def test_nothing_is_listed_twice_however_many_sizes_it_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A module that mixes rows fails for each size of its samples: the list stays short."""
    with caplog.at_level(logging.WARNING):
        outcome = run(
            looped(lambda self, x, extra: honest(x) + x.mean(0, keepdim=True) + 0 * extra.sum()),
            *[
                [request(seed, functools.partial(sized, size)) for seed in range(4)]
                for size in range(1, 40)
            ],
        )
    outcome.check_alone()
    found = listed(outcome, "denoiser")
    assert 1 <= len(found) <= 40
    assert len({(one["call"], one["reason"], one["detail"]) for one in found}) == len(found)


def sized(size: int) -> Callable[[int], dict[str, Any]]:
    extra = torch.zeros(1, size)
    return lambda step: {"extra": extra}


def test_a_module_in_company_of_one_that_fails_goes_on_sharing() -> None:
    """Each is told apart by its name."""
    pipeline = SD3.build()
    mixing = passing_on(
        pipeline, lambda original: lambda *args, **kwargs: mixed(original(*args, **kwargs))
    )
    with StepEngine(mixing, knee=False) as engine:
        requests = [asked(seed) for seed in range(4)]
        found = [
            numbers(job.result(SECONDS))
            for _ in range(2)
            for job in submit_together(engine, requests)
        ]
        stats = engine.stats()
    build = functools.partial(
        passing_on, wrap=lambda original: lambda *args, **kwargs: mixed(original(*args, **kwargs))
    )
    outcome = Outcome(found, plain(lambda: build(SD3.build()), requests) * 2, stats)
    outcome.check_alone("transformer", TOLERANCE)
    assert [one["reason"] for one in listed(outcome, "transformer")] == ["failed"]
    assert listed(outcome, "vae.decode") == []


def mixed(output: tuple[Tensor]) -> tuple[Tensor]:
    return (output[0] + output[0].mean(0, keepdim=True),)


def test_the_metric_has_every_reason() -> None:
    families = collectors.EngineCollector(lambda: None).collect()
    [metric] = [family for family in families if family.name == "stepweave_unshared_calls"]
    reasons = {sample.labels["reason"] for sample in metric.samples}
    assert reasons == set(get_args(UnsharedReason))


def test_the_list_is_empty_at_first() -> None:
    with StepEngine(looped(nn.Module.forward)()) as engine:  # type: ignore[arg-type]
        assert engine.stats().unshared == []


# Context variables

SCALE: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=1.0)


class Setting(Loop):
    """Sets a context variable for the length of a call, which its denoiser reads."""

    @torch.no_grad()
    def __call__(self, *args: Any, strength: float = 1.0, **kwargs: Any) -> Tensor:
        token = SCALE.set(strength) if strength != 1.0 else None
        try:
            return super().__call__(*args, **kwargs)
        finally:
            if token is not None:
                SCALE.reset(token)


def heeds_the_context(self: nn.Module, x: Tensor) -> Tensor:
    return honest(SCALE.get() * x)


def test_jobs_that_set_context_variables_run_alone_and_find_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def build() -> Any:
        return Setting(looped(heeds_the_context)().denoiser)

    ordinary = [request(i) for i in range(4)]
    special = [request(i, strength=0.5 + 0.1 * i) for i in range(4)]
    outcome = run(build, ordinary, [*special, *ordinary], ordinary)
    outcome.check()
    assert outcome.merged_share() > 0.3, "of the ordinary ones"
    assert [
        "scale" in one["detail"] for one in outcome.stats.unshared if one["reason"] == "state"
    ] == [True]
