"""Rehearses a call's steps with a scheduler, without the denoiser.

An oracle that knows the clean latents replaces the denoiser: it answers as a perfect denoiser
would, by the scheduler's prediction type and noise levels. With any scheduler and number of steps,
the latents must then end near the clean ones. This finds schedulers that raise, and those whose
latents are not finite or diverge.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from stepweave.compat.async_scheduler import clone_scheduler
from stepweave.compat.modular import call_class, functions_of, is_modular
from stepweave.previews.latents import noise_level, prediction_of

SHAPE = (1, 4, 8, 8)  # of the latents; schedulers treat each number separately
LARGEST = 4.5  # of the noise, as in an image of a million numbers, to find overflows
MOST = 2 * LARGEST  # largest noise that a bounded oracle sees
# Largest root mean square of the difference between the end and the clean latents. Measured for
# diffusers' schedulers with 1 to 50 steps: at most 0.04; 1.1 to 2.1 for DDIM, DEIS and PNDM with
# few steps; over 10 for those that fail.
FAR = 4.0
SHIFT = 0.5
CHANGES = "it changes its configuration, which all requests share"
# attributes that not all schedulers have
_OPTIONAL = ("init_noise_sigma", "scale_model_input", "scale_noise", "add_noise")

# the denoiser's output for a sample and the index of a step
Output = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Course:
    """The properties of a call that determine its timesteps."""

    steps: int
    strength: float | None = None  # of an edit
    tokens: int | None = None  # of an image, for dynamic shifting; None: the least shift


def problem_of(scheduler: Any, pipeline: Any, course: Course) -> str | None:
    """Why a call of `pipeline` does not run with a scheduler, which is not changed; None if it
    does.

    Timesteps are set as the pipeline's code does; for an edit, from the one that its
    `get_timesteps` gives. Draws from torch's global generator only if such calls do.
    """
    code = code_of(call_class(pipeline))
    for name in _OPTIONAL:
        if f"scheduler.{name}" in code and not hasattr(scheduler, name):
            return f"it has no {name}"
    left = math.inf
    try:
        with torch.no_grad():
            for bounded in (False, True):
                if not left <= FAR:
                    left = _run(clone_scheduler(scheduler), pipeline, code, course, bounded)
    except _ChangesConfig:
        return CHANGES
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not math.isfinite(left):
        return "its latents are not finite"
    return None if left <= FAR else f"its latents end {left:.1e} from where they should"


class _ChangesConfig(Exception):
    """The scheduler has written to its configuration, which all requests share."""


def _run(scheduler: Any, pipeline: Any, code: str, course: Course, bounded: bool) -> float:
    """Run the steps. Returns the root mean square of the difference to the clean latents; without
    an oracle, 0 if all is finite.

    A `bounded` oracle limits the noise that it sees, so small errors are not amplified as the noise
    level falls; but schedulers with very large noise levels need an unbounded one.
    """
    config = scheduler.config  # which all requests share
    before = dict(vars(config))
    arguments = _timestep_arguments(scheduler, pipeline, code, course)
    timesteps, _ = retrieve_timesteps(scheduler, course.steps, "cpu", **arguments)
    if vars(config) != before:
        vars(config).clear()
        vars(config).update(before)
        raise _ChangesConfig
    generator = torch.Generator().manual_seed(0)
    # within [-1, 1]: some schedulers clip
    clean = torch.rand(SHAPE, generator=generator) * 1.8 - 0.9
    sample = torch.randn(SHAPE, generator=generator)
    sample[0, 0, 0, :2] = torch.tensor([-LARGEST, LARGEST])
    answer = _oracle(scheduler, timesteps, clean, MOST if bounded else math.inf)
    noising = re.search(r"scheduler\.(add_noise|scale_noise)\(", code)
    begin = _begin(scheduler, pipeline, course) if noising else 0
    if hasattr(scheduler, "set_begin_index") and (noising or "scheduler.set_begin_index" in code):
        # otherwise it searches for the first timestep, which may occur twice
        scheduler.set_begin_index(begin)
    if noising:
        first = timesteps[begin : begin + 1]
        order = (clean, sample, first) if noising[1] == "add_noise" else (clean, first, sample)
        sample = getattr(scheduler, noising[1])(*order)
    elif "init_noise_sigma" in code:
        sample = sample * scheduler.init_noise_sigma
    arguments = {"return_dict": False}
    known = inspect.signature(scheduler.step).parameters
    if "prepare_extra_step_kwargs" in code and "generator" in known:
        arguments["generator"] = generator
    dtype = _dtype(pipeline)
    sample = sample.to(dtype)
    learned = str(config.get("variance_type")).startswith("learned")
    for index, timestep in enumerate(timesteps[begin:], begin):
        model_input = sample
        if "scheduler.scale_model_input" in code:
            model_input = scheduler.scale_model_input(sample, timestep)
        output = model_input * 0.5 if answer is None else answer(sample.float(), index).to(dtype)
        if learned:  # the denoiser has as many channels again, for the variance
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        sample = scheduler.step(output, timestep, sample, **arguments)[0].to(dtype)
    left = float((sample.float() - clean).square().mean().sqrt())
    return left * 0.0 if answer is None else left


def _begin(scheduler: Any, pipeline: Any, course: Course) -> int:
    """The index of the first timestep of an edit, by the pipeline's `get_timesteps`."""
    if course.strength is None or not hasattr(pipeline, "get_timesteps"):
        return int(scheduler.order) if len(scheduler.timesteps) > scheduler.order else 0
    method = inspect.unwrap(type(pipeline).get_timesteps)
    all_of_them = scheduler.timesteps
    arguments = {
        "num_inference_steps": course.steps,
        "strength": course.strength,
        "device": "cpu",
        "timesteps": all_of_them,
        "sigmas": getattr(scheduler, "sigmas", None),
    }
    known = inspect.signature(method).parameters
    taken = {name: value for name, value in arguments.items() if name in known}
    result = method(SimpleNamespace(scheduler=scheduler), **taken)
    left = len(result[-2])  # (..., timesteps, number of steps)
    if not left:
        raise ValueError(f"no step is left of {course.steps} with strength {course.strength}")
    return len(all_of_them) - left


def _oracle(
    scheduler: Any, timesteps: torch.Tensor, clean: torch.Tensor, most: float
) -> Output | None:
    """A denoiser that knows the clean latents; None for an unknown prediction type."""
    prediction = prediction_of(scheduler)
    preconditioned = hasattr(scheduler, "precondition_outputs")
    known = ("epsilon", "v_prediction", "flow_prediction", "sample")
    if prediction not in known and not preconditioned:
        return None
    other = clone_scheduler(scheduler)  # for noise levels, which set its index

    def answer(sample: torch.Tensor, index: int) -> torch.Tensor:
        signal, level = noise_level(other, timesteps[index : index + 1])
        if preconditioned:
            one = torch.ones(())
            skipped = scheduler.precondition_outputs(one, one * 0, one * level)
            scale = scheduler.precondition_outputs(one * 0, one, one * level)
            return torch.as_tensor((clean - skipped * sample) / scale)
        noise = (sample - signal * clean) / level if level else torch.zeros_like(sample)
        noise = noise.clamp(-most, most)
        if prediction == "epsilon":
            return noise
        if prediction == "v_prediction":
            return (signal * noise - level * clean) / math.hypot(signal, level)
        return noise - clean if prediction == "flow_prediction" else clean

    return answer


def _timestep_arguments(scheduler: Any, pipeline: Any, code: str, course: Course) -> dict[str, Any]:
    """The pipeline's arguments of `set_timesteps`, besides the number of steps. Raises ValueError
    if they are unknown."""
    if re.search(r"\btimesteps = \(?\s*(np|torch)\.", code):
        raise ValueError("the pipeline has timesteps of its own")
    arguments: dict[str, Any] = {}
    own_sigmas = "use_flow_sigmas" in code and scheduler.config.get("use_flow_sigmas")
    if re.search(r"\bsigmas = (?!None\b)", code) and not own_sigmas:
        arguments["sigmas"] = np.linspace(1.0, 1 / course.steps, course.steps)
    if takes_shift(pipeline):
        if "use_dynamic_shifting" not in code or scheduler.config.get("use_dynamic_shifting"):
            arguments["mu"] = _shift(scheduler, pipeline, course)
    return arguments


def takes_shift(pipeline: Any) -> bool:
    """Whether the timesteps of a pipeline's calls depend on the size of the image."""
    return re.search(r"\bmu=mu\b|\"mu\"", code_of(call_class(pipeline))) is not None


def _shift(scheduler: Any, pipeline: Any, course: Course) -> float:
    """The shift for the number of tokens, by the pipeline's function; SHIFT if it has none."""
    module, get = sys.modules[type(pipeline).__module__], scheduler.config.get
    if course.tokens is None:
        return SHIFT
    if empirical := getattr(module, "compute_empirical_mu", None):
        return float(empirical(course.tokens, course.steps))
    if calculate := getattr(module, "calculate_shift", None):
        counts = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
        shifts = get("base_shift", SHIFT), get("max_shift", 1.15)
        return float(calculate(course.tokens, *counts, *shifts))
    return SHIFT


def _dtype(pipeline: Any) -> torch.dtype:
    """The dtype of the latents: the denoiser's half precision, else float32 (also if quantised)."""
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    dtype = getattr(denoiser, "dtype", None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


@functools.cache
def code_of(kind: type[Any]) -> str:
    """The source code of a pipeline's methods, or of a modular one's blocks, that use its
    scheduler."""
    modular, lines = is_modular(kind), []
    for function in functions_of(kind):
        code = inspect.unwrap(function).__code__
        # functions of blocks get the scheduler as an argument, too
        names = code.co_names + code.co_varnames if modular else code.co_names
        if "scheduler" in names:
            with contextlib.suppress(OSError, TypeError):
                lines.append(re.sub(r'r?"""[\s\S]*?"""', "", inspect.getsource(function)))
    return "\n".join(lines)
