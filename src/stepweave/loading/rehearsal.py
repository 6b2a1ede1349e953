"""A call's steps without its denoiser: whether they run with a scheduler, and end where a perfect
denoiser would lead.

In the denoiser's place stands an oracle that knows the clean latents: by the scheduler's own
prediction type and noise levels it answers what a perfect denoiser would. Whatever the scheduler,
whatever the number of steps, they then end near those latents; so what runs but gives numbers that
are not finite, or grow beyond all noise, is found as well as what raises.
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
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from stepweave.compat.async_scheduler import clone_scheduler
from stepweave.previews.latents import noise_level, prediction_of

SHAPE = (1, 4, 8, 8)  # of the latents; schedulers work on each number by itself
# of the numbers of noise: as in an image of a million of them, for types that overflow
LARGEST = 4.5
MOST = 2 * LARGEST  # noise that a bounded oracle sees
# Root mean square of what may be left between the end and the clean latents. Measured of diffusers'
# schedulers, 1 to 50 steps: at most 0.04, but for DDIM, DEIS and PNDM with few, which may leave the
# noise or twice that (1.1, 2.1); where they break, over 10
FAR = 4.0
SHIFT = 0.5
CHANGES = "it changes its configuration, which all requests share"
# that not all schedulers have
_OPTIONAL = ("init_noise_sigma", "scale_model_input", "scale_noise", "add_noise")

# the denoiser's, of a sample at the step of an index
Output = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Course:
    """What decides the timesteps of a call."""

    steps: int
    strength: float | None = None  # of an edit
    # of an image, which dynamic shifting goes by; as many as shift the least where it is None
    tokens: int | None = None


def problem_of(scheduler: Any, pipeline: Any, course: Course) -> str | None:
    """Why a call of `pipeline` does not run with a scheduler, which stays as it is; None if it
    does.

    Timesteps are set as the pipeline's code does; for an edit of some strength they begin in the
    middle, where its own `get_timesteps` says. Draws from torch's global generator where such calls
    would, and only then.
    """
    code = code_of(type(pipeline))  # type: ignore[arg-type]
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
    """Take the steps; the root mean square of what is left to the clean latents, 0 where no oracle
    knows them and all is finite.

    A `bounded` oracle sees no more noise than there may be. What leads astray by a little, it does
    not drive further; the other does, the more the less noise is left, but steps of huge noise
    levels need it.
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
        # else it looks for the first timestep, which may be there twice
        scheduler.set_begin_index(begin)
    if noising:
        first = timesteps[begin : begin + 1]
        order = (clean, sample, first) if noising[1] == "add_noise" else (clean, first, sample)
        sample = getattr(scheduler, noising[1])(*order)
    elif "init_noise_sigma" in code:
        sample = sample * scheduler.init_noise_sigma
    arguments = {"return_dict": False}
    if (
        "prepare_extra_step_kwargs" in code
        and "generator" in inspect.signature(scheduler.step).parameters
    ):
        arguments["generator"] = generator
    dtype = _dtype(pipeline)
    sample = sample.to(dtype)
    for index, timestep in enumerate(timesteps[begin:], begin):
        model_input = sample
        if "scheduler.scale_model_input" in code:
            model_input = scheduler.scale_model_input(sample, timestep)
        output = model_input * 0.5 if answer is None else answer(sample.float(), index).to(dtype)
        sample = scheduler.step(output, timestep, sample, **arguments)[0].to(dtype)
    left = float((sample.float() - clean).square().mean().sqrt())
    return left * 0.0 if answer is None else left


def _begin(scheduler: Any, pipeline: Any, course: Course) -> int:
    """The index of the first timestep of an edit, by the pipeline's own `get_timesteps`; its
    scheduler has all timesteps."""
    if course.strength is None or not hasattr(pipeline, "get_timesteps"):
        return int(scheduler.order) if len(scheduler.timesteps) > scheduler.order else 0
    method = inspect.unwrap(type(pipeline).get_timesteps)
    all_of_them = scheduler.timesteps
    given = {
        "num_inference_steps": course.steps,
        "strength": course.strength,
        "device": "cpu",
        "timesteps": all_of_them,
        "sigmas": getattr(scheduler, "sigmas", None),
    }
    known = inspect.signature(method).parameters
    found = method(
        SimpleNamespace(scheduler=scheduler),
        **{name: value for name, value in given.items() if name in known},
    )
    left = len(found[-2])  # it gives timesteps and their number, some sigmas before them
    if not left:
        raise ValueError(f"no step is left of {course.steps} with strength {course.strength}")
    return len(all_of_them) - left


def _oracle(
    scheduler: Any, timesteps: torch.Tensor, clean: torch.Tensor, most: float
) -> Output | None:
    """What a denoiser that knows the clean latents gives; None where the scheduler does not tell
    what it should."""
    prediction = prediction_of(scheduler)
    preconditioned = hasattr(scheduler, "precondition_outputs")
    if (
        prediction not in ("epsilon", "v_prediction", "flow_prediction", "sample")
        and not preconditioned
    ):
        return None
    other = clone_scheduler(scheduler)  # asked for noise levels, it keeps an index

    def answer(sample: torch.Tensor, index: int) -> torch.Tensor:
        for name in ("_step_index", "_begin_index"):
            if hasattr(other, name):
                setattr(other, name, None)
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
    """What the pipeline gives `set_timesteps` besides the number of steps. Raises ValueError for
    what cannot be told."""
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
    """Whether the timesteps of a pipeline's calls go by the size of the image."""
    return re.search(r"\bmu=mu\b|\"mu\"", code_of(type(pipeline))) is not None  # type: ignore[arg-type]


def _shift(scheduler: Any, pipeline: Any, course: Course) -> float:
    """What the pipeline's own function makes of the number of tokens, or the least that is usual
    where it has none."""
    module, get = sys.modules[type(pipeline).__module__], scheduler.config.get
    if course.tokens is None:
        return SHIFT
    if empirical := getattr(module, "compute_empirical_mu", None):
        return float(empirical(course.tokens, course.steps))
    if calculate := getattr(module, "calculate_shift", None):
        counts = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
        return float(
            calculate(course.tokens, *counts, get("base_shift", SHIFT), get("max_shift", 1.15))
        )
    return SHIFT


def _dtype(pipeline: Any) -> torch.dtype:
    """Of the latents: the denoiser's, single precision where that is of whole numbers or of eight
    bits."""
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    dtype = getattr(denoiser, "dtype", None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


@functools.cache
def code_of(kind: type[Any]) -> str:
    """The source of those of a pipeline's own methods that use its scheduler."""
    lines = []
    for cls in kind.__mro__:
        if issubclass(cls, DiffusionPipeline) and cls is not DiffusionPipeline:
            for function in filter(inspect.isfunction, vars(cls).values()):
                if "scheduler" not in inspect.unwrap(function).__code__.co_names:
                    continue
                with contextlib.suppress(OSError, TypeError):
                    lines.append(re.sub(r'r?"""[\s\S]*?"""', "", inspect.getsource(function)))
    return "\n".join(lines)
