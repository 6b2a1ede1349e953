"""The loop that every stage shares: fixed seeds per step, checkpoints, a log line and a progress
bar."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn
from tqdm import tqdm

LOG_EVERY = 50
SAVE_EVERY = 250
NetworkT = TypeVar("NetworkT", bound=nn.Module)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def add_noise(
    clean: torch.Tensor, shift: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (n, c, h, w) at random times of a rectified flow (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206; logit-normal times, shifted): the noisy latents, the velocity
    to learn, and the times as timesteps of 0 to 1,000, shape (n,)."""
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    sigma = torch.randn(len(clean), generator=generator, device=clean.device).sigmoid()
    sigma = (shift * sigma / (1 + (shift - 1) * sigma)).view(-1, 1, 1, 1)
    return (1 - sigma) * clean + sigma * noise, noise - clean, sigma.flatten() * 1000


def freeze(pipeline: StableDiffusion3Pipeline) -> None:
    """Let nothing of the model's own be trained."""
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)


@torch.no_grad()
def text_of(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as the transformer is given them: (n, tokens, width), and pooled (n, width)."""
    context, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts,
        device=device, do_classifier_free_guidance=False, max_sequence_length=1,
    )  # fmt: skip
    return context, pooled


def run_stage(
    name: str,
    network: NetworkT,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[np.random.Generator, torch.Generator], dict[str, torch.Tensor]],
    *,
    folder: Path,
    steps: int,
    peak: float,
    seed: int,
    device: torch.device,
    ema_decay: float = 0.999,
    warmup: int = 200,
) -> NetworkT:
    """Train `network` for `steps` steps and return the moving average of its weights.

    `loss_of(rng, generator)` gives the named losses of one batch, summed for the gradient. Both
    generators are seeded by (seed, step), so a run that is interrupted and started again goes on
    exactly where it stood.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(network).requires_grad_(False)
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
    began = time.monotonic()
    sums: dict[str, float] = {}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup)
        rng = np.random.default_rng([seed, step])
        losses = loss_of(rng, torch.Generator(device).manual_seed(seed * 1_000_003 + step))
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for shadow, value in zip(average.parameters(), network.parameters(), strict=True):
                shadow.lerp_(value, 1 - decay)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        if (step + 1) % LOG_EVERY == 0:
            means = {key: value / LOG_EVERY for key, value in sums.items()}
            bar.set_postfix({key: f"{value:.4f}" for key, value in means.items()}, refresh=False)
            seconds = spent + time.monotonic() - began
            with log.open("a") as file:
                file.write(
                    json.dumps({"step": step + 1, "seconds": round(seconds, 1), **means}) + "\n"
                )
            sums = {}
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": spent + time.monotonic() - began,
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
    return average
