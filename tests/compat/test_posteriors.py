"""What an autoencoder encodes, sampled without a generator: by the seeds of the job's images."""

from __future__ import annotations

import contextvars
import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from stepweave.compat.posteriors import GENERATOR, seeded
from stepweave.engine import StepEngine
from tests.pipelines.parts import parts_of, trained
from tests.pipelines.registry import example_image
from tests.support.tiny import stable_diffusion_3

SEEDS = (3, 4)


def encoded(rows: int) -> AutoencoderKLOutput:
    parameters = torch.linspace(-1, 1, rows * 8 * 16).view(rows, 8, 4, 4)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def in_a_call(result: Any, generator: Any) -> Any:
    """What a call with this generator gets for a result."""
    context = contextvars.copy_context()
    context.run(GENERATOR.set, generator)
    return context.run(seeded, result)


def sample(rows: int, generator: Any) -> torch.Tensor:
    return in_a_call(encoded(rows), generator).latent_dist.sample()  # type: ignore[no-any-return]


def test_rows_of_one_image_are_those_of_the_default_generator_seeded_like_it() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = encoded(2).latent_dist.sample()
    before = torch.get_rng_state()
    assert torch.equal(sample(2, generators(3)), plain)
    assert torch.equal(sample(2, *generators(3)), plain)
    assert torch.equal(torch.get_rng_state(), before), "the default generator was used"


def test_each_image_of_several_has_the_rows_of_its_own_seed() -> None:
    together = sample(4, generators(*SEEDS))  # as with guidance: both images twice
    means = encoded(4).latent_dist
    for i, seed in enumerate(SEEDS):
        noise = [torch.randn(2, 4, 4, 4, generator=one) for one in generators(seed)][0]
        rows = means.mean[i::2] + means.std[i::2] * noise
        assert torch.equal(together[i::2], rows)
    assert sample(3, generators(*SEEDS)).shape == (3, 4, 4, 4)


def test_a_generator_that_is_passed_is_used() -> None:
    posterior = in_a_call(encoded(1), generators(3)).latent_dist
    [own, same] = generators(5, 5)
    assert torch.equal(posterior.sample(own), encoded(1).latent_dist.sample(same))
    assert torch.equal(posterior.mode(), encoded(1).latent_dist.mode())


@pytest.mark.parametrize("result", [encoded(1), (torch.zeros(1),), torch.zeros(1), object()])
def test_without_a_generator_or_a_posterior_the_result_is_unchanged(result: Any) -> None:
    assert in_a_call(result, None) is result
    assert in_a_call(result, []) is result
    if not isinstance(result, AutoencoderKLOutput):
        assert in_a_call(result, generators(3)) is result


def test_tuples_are_seeded_too() -> None:
    (posterior,) = in_a_call((encoded(1).latent_dist,), generators(3))
    assert torch.equal(posterior.sample(), sample(1, generators(3)))


def test_a_control_image_is_sampled_by_the_seed_of_its_job() -> None:
    """Stable Diffusion 3 samples it without the call's generator."""
    parts = parts_of(stable_diffusion_3)
    control = diffusers.SD3ControlNetModel.from_transformer(
        # a copy: it writes the number of layers into the configuration that it is given
        copy.deepcopy(parts["transformer"]), num_layers=1, num_extra_conditioning_channels=0
    )  # fmt: skip
    pipeline = diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=trained(control))
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": "a ring",
        "control_image": example_image(51),
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "output_type": "pt",
        "height": 16,
        "width": 16,
    }

    def plain(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pipeline(**arguments, generator=generators(3)[0]).images  # type: ignore[no-any-return]

    assert (plain(3) - plain(4)).abs().max() > 1e-3, "so that another draw would show"
    expected = plain(3)
    with StepEngine(pipeline) as engine:
        jobs = [engine.submit(**arguments, generator=generators(3)[0]) for _ in range(3)]
        for job in jobs:
            assert (job.result().images - expected).abs().max() < 1e-4
