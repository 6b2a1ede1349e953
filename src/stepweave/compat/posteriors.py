"""Samples of an autoencoder's posterior that depend on a job's seed alone.

Some pipelines, such as those of Stable Diffusion 3 with ControlNets, sample the latents of their
images without the call's generator: from torch's default one, which all jobs share.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

# the generator of the running call, or those of its images
GENERATOR: contextvars.ContextVar[Any] = contextvars.ContextVar("stepweave_generator", default=None)


class SeededPosterior(DiagonalGaussianDistribution):  # type: ignore[misc]
    """A posterior whose row i is sampled, if no generator is passed, as after
    `torch.manual_seed(seeds[i % len(seeds)])`: rows of one image follow each other."""

    def __init__(self, posterior: DiagonalGaussianDistribution, seeds: Sequence[int]) -> None:
        self.__dict__.update(vars(posterior))
        self._seeds = seeds

    def sample(
        self, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        if generator is None:
            made = [torch.Generator().manual_seed(seed) for seed in self._seeds]
            generator = [made[i % len(made)] for i in range(len(self.mean))]
        return super().sample(generator)  # type: ignore[no-any-return]


def seeded(encoded: Any) -> Any:
    """What an autoencoder's `encode` returned, with a posterior that is seeded like the generators
    of the running call. Other results, and those of calls without a generator, are unchanged."""
    given = GENERATOR.get()
    generators = list(given) if isinstance(given, (list, tuple)) else [given]
    alone = isinstance(encoded, tuple) and len(encoded) == 1
    posterior = encoded[0] if alone else getattr(encoded, "latent_dist", None)
    known = all(isinstance(one, torch.Generator) for one in generators)
    if not generators or not known or type(posterior) is not DiagonalGaussianDistribution:
        return encoded
    sampled = SeededPosterior(posterior, [one.initial_seed() for one in generators])
    return (sampled,) if alone else type(encoded)(latent_dist=sampled)
