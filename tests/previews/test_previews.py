"""Observers of jobs, the clean latents that a step predicts, and previews made of them."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch.nn import functional

from stepweave import StepEngine
from stepweave.config import EMBEDDED_MODEL
from stepweave.engine import Job, Latents, Mode
from stepweave.previews.decoder import LONGEST, Previewer, preview_steps, synthetic_images
from tests.support import tiny
from tests.support.waiting import SECONDS
from tools.shapes import evaluate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

REACH = 30  # of latents that a colour stands for
PROMPTS = (
    "a large red circle on a blue background",
    "a small green star on a white background, top left",
    "a large yellow square on a purple background",
    "a small black ring on an orange background, bottom right",
    "a large white triangle on a black background",
    "a large blue cross on a yellow background, right",
)


class Watcher:
    """Keeps all that it is told."""

    def __init__(self, steps: int | tuple[int, ...] = ()) -> None:
        self.steps = range(1, steps + 1) if isinstance(steps, int) else steps
        self.progress: list[tuple[int, int]] = []
        self.latents: dict[int, Latents] = {}
        self.threads: set[str] = set()

    def progressed(self, job: Job) -> None:
        self.progress.append(tuple(job.progress))
        self.threads.add(threading.current_thread().name)

    def wants(self, step: int, total: int) -> bool:
        return step in self.steps

    def denoised(self, job: Job, latents: Latents) -> None:
        assert job.progress.step not in self.latents
        self.latents[job.progress.step] = latents


def pixels(image: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image, dtype=float).ravel()


def correlation(one: Any, other: Any) -> float:
    return float(np.corrcoef(pixels(one), pixels(other))[0, 1])


def images(job: Job) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = job.result(SECONDS).images
    return found


# Observers


@pytest.mark.parametrize("mode", ["off", "threads", "request", "step"])
def test_an_observer_is_told_how_a_job_goes(mode: Mode) -> None:
    family = tiny.FAMILIES["stable_diffusion_3"]
    watcher = Watcher((2, 3))
    with StepEngine(family.build(), mode) as engine:
        job = engine.submit(**family.arguments("a red circle"), observer=watcher)
        job.result(SECONDS)
    assert watcher.progress == [(0, 0), (0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(watcher.latents) == [2, 3]
    assert all(name.startswith("stepweave-engine") for name in watcher.threads)
    assert torch.equal(watcher.latents[2].after, watcher.latents[3].sample)


@pytest.mark.parametrize("mode", ["request", "step"])
def test_each_job_is_given_its_own_rows(mode: Mode) -> None:
    family = tiny.FAMILIES["stable_diffusion_3"]
    calls = [family.arguments("a red circle", seed=seed, output_type="latent") for seed in range(4)]
    watchers = [Watcher(4), None, Watcher((1, 4)), Watcher()]
    with StepEngine(family.build(), mode) as engine:
        jobs = [
            engine.submit(**call, observer=one) for call, one in zip(calls, watchers, strict=True)
        ]
        results = [images(job) for job in jobs]
    for watcher, result, steps in zip(
        watchers, results, ([1, 2, 3, 4], [], [1, 4], []), strict=True
    ):
        if watcher is not None:
            assert sorted(watcher.latents) == steps
            for step, latents in watcher.latents.items():
                assert latents.after.shape == (1, 4, 8, 8)
                assert (step < 4) or torch.equal(latents.after, result)


def test_an_observer_changes_neither_the_result_nor_the_forwards() -> None:
    family = tiny.FAMILIES["stable_diffusion"]

    def run(*watchers: Watcher | None) -> tuple[list[Any], dict[str, Any]]:
        with StepEngine(family.build(), cache_bytes=0) as engine:
            jobs = [
                engine.submit(
                    **family.arguments("a red circle", seed=seed), observer=one, reproducible=True
                )
                for seed, one in enumerate(watchers)
            ]
            return [images(job) for job in jobs], dict(engine.stats().forwards)

    (plain, forwards), (watched, watched_forwards) = run(None, None), run(Watcher(4), Watcher(4))
    assert forwards == watched_forwards
    assert all(np.array_equal(one, other) for one, other in zip(plain, watched, strict=True))


def test_a_failing_observer_fails_no_job(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def progressed(self, job: Job) -> None:
            raise SystemExit

        def wants(self, step: int, total: int) -> bool:
            if step == 2:
                raise ValueError(step)
            return True

        def denoised(self, job: Job, latents: Latents) -> None:
            raise RuntimeError("no")

    family = tiny.FAMILIES["stable_diffusion_3"]
    with StepEngine(family.build()) as engine:
        engine.submit(**family.arguments("a red circle"), observer=Failing()).result(SECONDS)
        engine.submit(**family.arguments("a red circle")).result(SECONDS)
    assert [record.message.partition(" of ")[0] for record in caplog.records].count(
        "an observer"
    ) == 1


def test_a_scheduler_that_cannot_be_watched_fails_no_job(caplog: pytest.LogCaptureFixture) -> None:
    class Renamed(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def step(self, velocity: Any, when: Any, state: Any, return_dict: bool = True) -> Any:
            return super().step(velocity, when, state, return_dict=return_dict)

    family = tiny.FAMILIES["stable_diffusion_3"]
    pipeline = family.build()
    pipeline.scheduler = Renamed.from_config(pipeline.scheduler.config)
    watcher = Watcher(4)
    with StepEngine(pipeline) as engine:
        engine.submit(**family.arguments("a red circle"), observer=watcher).result(SECONDS)
    assert watcher.latents == {}
    assert watcher.progress[-1] == (4, 4)
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1


def test_a_copy_of_a_watched_scheduler_steps_itself() -> None:
    """Pipelines of several media copy their scheduler in the middle of a call."""
    family = tiny.FAMILIES["stable_diffusion_3"]
    indices: list[tuple[int, int]] = []

    class Copying(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def scale_model_input(self, *args: Any) -> None: ...

    pipeline = family.build()
    pipeline.scheduler = Copying.from_config(pipeline.scheduler.config)

    def callback(view: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        other = copy.deepcopy(view.scheduler)
        before = view.scheduler.step_index
        if step < 3:
            other.step(
                values["latents"], other.timesteps[step + 1], values["latents"], return_dict=False
            )
            indices.append((view.scheduler.step_index - before, other.step_index - before))
        return {}

    watcher = Watcher(4)
    with StepEngine(pipeline) as engine:
        call = family.arguments("a red circle", callback_on_step_end=callback)
        engine.submit(**call, observer=watcher).result(SECONDS)
    assert indices == [(0, 1)] * 3
    assert len(watcher.latents) == 4


# Clean latents


DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, Any] = {
    "DDIM": lambda: diffusers.DDIMScheduler(**DIFFUSION, clip_sample=False),
    "DDIM-v": lambda: diffusers.DDIMScheduler(
        **DIFFUSION, clip_sample=False, prediction_type="v_prediction"
    ),
    "DDIM-sample": lambda: diffusers.DDIMScheduler(
        **DIFFUSION, clip_sample=False, prediction_type="sample"
    ),
    "PNDM": lambda: diffusers.PNDMScheduler(**DIFFUSION, skip_prk_steps=True),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**DIFFUSION),
    "Euler-v": lambda: diffusers.EulerDiscreteScheduler(
        **DIFFUSION, prediction_type="v_prediction"
    ),
    "EulerAncestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**DIFFUSION),
    "DPM++2M": lambda: diffusers.DPMSolverMultistepScheduler(**DIFFUSION),
    "DPM++2M-SDE": lambda: diffusers.DPMSolverMultistepScheduler(
        **DIFFUSION, algorithm_type="sde-dpmsolver++"
    ),
    "UniPC-flow": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    ),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(**DIFFUSION),
    "EDM": lambda: diffusers.EDMEulerScheduler(),
    "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "FlowMatchHeun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_clean_latents_are_what_the_model_says(name: str) -> None:
    """A model that knows the clean latents is believed at every step."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    clean, sample = torch.randn(2, 1, 4, 8, 8, generator=generator)
    sample = sample * float(
        scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else 1
    )
    for index, timestep in enumerate(scheduler.timesteps[:-1]):
        signal, noise = levels(scheduler, index, timestep)
        length = (signal**2 + noise**2) ** 0.5
        kind = scheduler.config.get("prediction_type", "flow_prediction")
        if name == "EDM":  # its output is a share of the clean sample
            c_skip = 0.25 / (noise**2 + 0.25)
            output = (clean - c_skip * sample) / (noise * 0.5 / (noise**2 + 0.25) ** 0.5)
        elif kind == "sample":
            output = clean
        elif kind == "epsilon":
            output = (sample - signal * clean) / noise
        elif kind == "flow_prediction":
            output = (sample - clean) / noise
        else:
            output = (signal * sample / length**2 - clean) * length / noise
        before = copy.deepcopy(scheduler)
        after = scheduler.step(output, timestep, sample, return_dict=False)[0]
        found = Latents(sample, output, timestep, after, before).clean()
        assert torch.allclose(found, clean, atol=1e-3 * max(1.0, noise)), (
            index,
            (found - clean).abs().max(),
        )
        sample = after


def levels(scheduler: Any, index: int, timestep: Any) -> tuple[float, float]:
    """The factors of image and noise, by the tables that each scheduler keeps, another way than
    the code under test."""
    if hasattr(scheduler, "scale_noise"):
        noise = float(timestep) / 1000
        return 1 - noise, noise
    if not hasattr(scheduler, "sigmas"):
        share = float(scheduler.alphas_cumprod[int(timestep)])
        return share**0.5, (1 - share) ** 0.5
    noise = float(scheduler.sigmas[index])
    if scheduler.config.get("use_flow_sigmas"):
        return 1 - noise, noise
    if "Multistep" in type(scheduler).__name__:
        return 1 / (1 + noise**2) ** 0.5, noise / (1 + noise**2) ** 0.5
    return 1.0, noise


def test_without_noise_levels_the_latents_are_taken_as_they_are() -> None:
    sample, after = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    assert torch.equal(Latents(sample, sample, torch.tensor(3), after, object()).clean(), after)


# Previews


def linear(autoencoder: Any) -> Any:
    """An autoencoder of the same class and config whose latents are the colours of 2x2 pixels, and
    their mean."""

    def encode(self: Any, x: torch.Tensor) -> Any:
        small = functional.avg_pool2d(x if x.ndim == 4 else x[:, :, 0], 2) * REACH + 1
        latents = torch.cat([small, small.mean(1, keepdim=True)], 1)
        return DecoderOutput(latents if x.ndim == 4 else latents[:, :, None])

    def decode(self: Any, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        large = functional.interpolate(
            ((z if z.ndim == 4 else z[:, :, 0])[:, :3] - 1) / REACH, scale_factor=2
        )
        return (large if z.ndim == 4 else large[:, :, None],)

    kind = type("Linear", (type(autoencoder),), {"encode": encode, "decode": decode})
    return kind.from_config(autoencoder.config)


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "qwen_image"]
)
def test_previews_where_they_can_be_right(name: str) -> None:
    """Unpacked, scaled, shifted and placed as the pipeline itself does it, the last step's is
    nearly the image."""
    family = tiny.FAMILIES[name]
    pipeline = family.build()
    if name == "qwen_image":
        pipeline.vae.register_to_config(
            latents_mean=[1.0, -2.0, 3.0, 0.0], latents_std=[2.0, 4.0, 1.0, 3.0]
        )
    pipeline.register_modules(vae=linear(pipeline.vae))
    previewer = Previewer.fit(pipeline)
    assert previewer is not None
    assert previewer.explained > 0.95
    watcher = Watcher((8,))
    with StepEngine(pipeline) as engine:
        call = family.arguments("a red circle", steps=8, width=48, height=32, output_type="pil")
        result = engine.submit(**call, observer=watcher).result(SECONDS).images[0]
    preview = previewer.image(watcher.latents[8], 48, 32)
    assert preview.size == result.size == (48, 32)
    assert correlation(preview, result) > 0.9
    assert correlation(preview.transpose(Image.Transpose.FLIP_TOP_BOTTOM), result) < 0.8


def test_a_large_image_has_a_smaller_preview() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion"].build()
    pipeline.register_modules(vae=linear(pipeline.vae))
    previewer = Previewer.fit(pipeline)
    assert previewer is not None
    zeros = torch.zeros(2, 4, 32, 64)
    latents = Latents(zeros, zeros, torch.tensor(1), zeros, pipeline.scheduler)
    assert previewer.image(latents, 2 * LONGEST, LONGEST, row=1).size == (LONGEST, LONGEST // 2)
    packed = torch.zeros(1, 8, 16)
    with pytest.raises(ValueError, match=r"\(1, 8, 16\); previews need 4 channels"):
        previewer.image(Latents(packed, packed, torch.tensor(1), packed, pipeline.scheduler), 16, 8)


@pytest.mark.parametrize("name", ["stable_diffusion", "qwen_image"])
def test_no_previews_where_latents_say_too_little(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The decoders of random weights draw noise."""
    assert Previewer.fit(tiny.FAMILIES[name].build()) is None
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "previews are disabled"
    ]


def test_no_previews_without_an_autoencoder(caplog: pytest.LogCaptureFixture) -> None:
    assert Previewer.fit(object()) is None
    assert "previews are disabled" in caplog.text


def test_the_autoencoder_stays_in_half_precision() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion_xl"].build().to(torch.float16)
    pipeline.register_modules(vae=linear(pipeline.vae).half())
    assert pipeline.vae.config.force_upcast
    assert Previewer.fit(pipeline) is not None
    assert pipeline.vae.dtype == torch.float16


def test_with_cpu_offload_images_to_fit_on_go_where_the_autoencoder_will_be() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion"].build()
    devices: list[str] = []

    class Watched(linear(pipeline.vae).__class__):  # type: ignore[misc]
        def encode(self, x: torch.Tensor) -> Any:
            devices.append(x.device.type)
            return super().encode(x)

    class Staying(CpuOffload):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    pipeline.register_modules(vae=Watched.from_config(pipeline.vae.config))
    for one in tiny.networks(pipeline):
        add_hook_to_module(one, Staying("meta"))
    Previewer.fit(pipeline)
    assert devices[0] == "meta" and pipeline.vae.device.type == "cpu"


def test_with_cpu_offload_the_copy_in_full_precision_is_of_the_autoencoder_alone() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion_xl"].build().to(torch.float16)
    pipeline.register_modules(vae=linear(pipeline.vae).half())
    pipeline.enable_model_cpu_offload(device="cpu")
    hook = pipeline.vae._hf_hook
    with mock.patch.object(
        type(pipeline.unet), "__deepcopy__", side_effect=MemoryError, create=True
    ):
        assert Previewer.fit(pipeline) is not None
    assert pipeline.vae._hf_hook is hook and pipeline.vae.dtype == torch.float16


def test_preview_steps() -> None:
    assert preview_steps(20, 3) == [5, 10, 15]
    for total in range(60):
        for count in range(4):
            steps = preview_steps(total, count)
            assert len(steps) == max(0, min(count, total - 1))
            assert steps == sorted(set(steps))
            assert all(1 <= step < total for step in steps)
            assert not steps or steps[-1] >= total // 2


def test_images_to_fit_on_are_the_same_every_time() -> None:
    images = synthetic_images(4, 16)
    assert images.shape == (4, 3, 16, 16)
    assert torch.equal(images, synthetic_images(4, 16))
    assert -1 <= float(images.min()) < -0.8 < 0.8 < float(images.max()) <= 1
    assert all(not torch.equal(images[0], other) for other in images[1:])


@pytest.mark.full
def test_previews_of_the_embedded_model_resemble_its_images() -> None:
    """Over 48 prompts and 20 steps of benchmarks/previews.py the median is 0.93 at the last. No
    forward is spent on them."""
    pipeline = evaluate.load(EMBEDDED_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    previewer = Previewer.fit(pipeline)
    assert previewer is not None
    steps = preview_steps(10, 3)
    watchers = [Watcher(tuple(steps)) for _ in PROMPTS]
    call: dict[str, Any] = {
        "num_inference_steps": 10,
        "guidance_scale": 2.0,
        "max_sequence_length": 1,
    }
    with StepEngine(pipeline, cache_bytes=0) as engine:
        jobs = [
            engine.submit(
                prompt=prompt, **call, generator=torch.Generator().manual_seed(i), observer=watcher
            )
            for i, (prompt, watcher) in enumerate(zip(PROMPTS, watchers, strict=True))
        ]
        images = [job.result(SECONDS).images[0] for job in jobs]
        forwards = engine.stats().forwards
    calls = {
        name: forwards[name].calls for name in ("transformer", "vae.decode") if name in forwards
    }
    assert calls == {"transformer": 10 * len(PROMPTS), "vae.decode": len(PROMPTS)}
    found = [
        [correlation(previewer.image(watcher.latents[step], 64, 64), image) for step in steps]
        for watcher, image in zip(watchers, images, strict=True)
    ]
    assert np.median(found, axis=0)[-1] > 0.87, found
    others = [
        correlation(previewer.image(watchers[i].latents[steps[-1]], 64, 64), images[i - 1])
        for i in range(6)
    ]
    assert np.median(others) < 0.5, others
