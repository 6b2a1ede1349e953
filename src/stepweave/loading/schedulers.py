"""Schedulers that a pipeline may be called with in place of its own: those that a rehearsal without the model proves to run."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import warnings
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.import_utils import DummyObject

from stepweave.scope.scheduler import clone_scheduler

logger = logging.getLogger(__name__)

STEPS = 4  # of a rehearsal
SHAPE = (1, 4, 8, 8)  # of its latents; schedulers work on each number by itself
_OPTIONAL = ("init_noise_sigma", "scale_model_input", "scale_noise", "add_noise")  # that not all schedulers have


def schedulers_of(pipeline: Any) -> dict[str, Any]:
    """Schedulers to call the pipeline with, by class name, its own among them; {} if it has none.

    They are made of the own one's configuration: what diffusers calls compatible, and for flow matching those with flow sigmas.
    """
    own = getattr(pipeline, "scheduler", None)
    if not isinstance(own, SchedulerMixin):
        return {}
    found = {type(own).__name__: clone_scheduler(own)}
    for kind, changes in _candidates(own):
        with contextlib.suppress(Exception):  # a package is missing, or it does not take this configuration
            if kind.__name__ not in found and rehearse(one := _made(kind, own, changes), pipeline):
                found[kind.__name__] = one
    return dict(sorted(found.items()))


def _candidates(own: Any) -> list[tuple[Any, dict[str, Any]]]:
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (kind, {}) for kind in own.compatibles if not isinstance(kind, DummyObject)
    ]
    if not type(own).__name__.startswith("FlowMatch"):
        return kinds
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own.config.get("shift", 1.0)}
    return [
        *kinds,
        (diffusers.FlowMatchEulerDiscreteScheduler, {}),
        (diffusers.FlowMatchHeunDiscreteScheduler, {}),
        (diffusers.FlowMatchLCMScheduler, {}),
        (diffusers.UniPCMultistepScheduler, flow),
        (diffusers.DPMSolverMultistepScheduler, flow),
    ]


def _made(kind: Any, own: Any, changes: dict[str, Any]) -> Any:
    """A scheduler of a class with the configuration of another. Raises ValueError where that would say something else."""
    config, known = own.config, inspect.signature(kind).parameters
    for name in ("use_dynamic_shifting", "beta_schedule"):
        if config.get(name) and name not in known:
            raise ValueError(f"{kind.__name__} has no {name}")
    if changes or kind not in own.compatibles:
        config = {name: value for name, value in config.items() if name in known}
    return kind.from_config(config, **changes)


def rehearse(scheduler: Any, pipeline: Any) -> bool:
    """Whether calls of the pipeline run with a scheduler, and again the same with the same generator.

    Timesteps are set as the pipeline's code does, and all steps are taken from noise; for an edit, from the second timestep.
    """
    code = _code(type(pipeline))  # type: ignore[arg-type]
    if any(f"scheduler.{name}" in code and not hasattr(scheduler, name) for name in _OPTIONAL):
        return False
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            before = torch.get_rng_state()
            finite = _run(clone_scheduler(scheduler), code)
            return finite and torch.equal(torch.get_rng_state(), before)  # a seed would not decide its noise
    except Exception as error:
        logger.debug("%s does not run with %s: %s", type(scheduler).__name__, type(pipeline).__name__, error)
        return False


def _run(scheduler: Any, code: str) -> bool:
    config = scheduler.config  # which all requests share
    before = dict(vars(config))
    timesteps, _ = retrieve_timesteps(scheduler, STEPS, "cpu", **_timestep_arguments(scheduler, code))
    if vars(config) != before:
        return False
    generator = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    begin = 0
    if noising := re.search(r"scheduler\.(add_noise|scale_noise)\(", code):
        begin = scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        first = timesteps[begin : begin + 1]
        order = (sample, noise, first) if noising[1] == "add_noise" else (sample, first, noise)
        sample = getattr(scheduler, noising[1])(*order)
    arguments: dict[str, Any] = {"return_dict": False}
    if "prepare_extra_step_kwargs" in code and "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generator
    for timestep in timesteps[begin:]:
        model_input = sample
        if "scheduler.scale_model_input" in code:
            model_input = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(model_input * 0.5, timestep, sample, **arguments)[0]
    return bool(sample.isfinite().all())


def _timestep_arguments(scheduler: Any, code: str) -> dict[str, Any]:
    """What the pipeline gives `set_timesteps` besides the number of steps. Raises ValueError for what cannot be told."""
    if re.search(r"\btimesteps = \(?\s*(np|torch)\.", code):
        raise ValueError("the pipeline has timesteps of its own")
    arguments: dict[str, Any] = {}
    own_sigmas = "use_flow_sigmas" in code and scheduler.config.get("use_flow_sigmas")
    if re.search(r"\bsigmas = (?!None\b)", code) and not own_sigmas:
        arguments["sigmas"] = np.linspace(1.0, 1 / STEPS, STEPS)
    if re.search(r"\bmu=mu\b|\"mu\"", code):
        if "use_dynamic_shifting" not in code or scheduler.config.get("use_dynamic_shifting"):
            arguments["mu"] = 0.5
    return arguments


@functools.cache
def _code(kind: type[Any]) -> str:
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
