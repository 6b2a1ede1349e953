"""The latents of a denoising step for observers, copied where the view's scheduler steps."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from stepweave.compat.async_scheduler import clone_scheduler
from stepweave.compat.cpu_offload import pipelines_in

logger = logging.getLogger(__name__)

# share of the larger noise level; below it, two samples cannot be separated into image and noise
ILL_CONDITIONED = 1e-3


@dataclass(frozen=True)
class Latents:
    """One denoising step. The tensors are copies on the device, (rows, ...) in the pipeline's form,
    which any thread may read at any time."""

    sample: torch.Tensor  # input of the scheduler's step
    output: torch.Tensor  # of the model, guidance applied
    timestep: Any
    after: torch.Tensor  # result of the scheduler's step
    scheduler: Any  # a copy of the view's, for noise levels

    def clean(self) -> torch.Tensor:
        """The latents without noise, as the model predicts them, in float32; `after` if that cannot
        be calculated."""
        try:
            clean = self._clean()
        except Exception:
            clean = None  # schedulers have no common interface for this
        return self.after.float() if clean is None or not bool(clean.isfinite().all()) else clean

    def rows(self, start: int, stop: int) -> Latents:
        """The latents of some rows."""
        at = slice(start, stop)
        return replace(self, sample=self.sample[at], output=self.output[at], after=self.after[at])

    def _clean(self) -> torch.Tensor | None:
        scheduler = clone_scheduler(self.scheduler)
        timestep = torch.as_tensor(self.timestep).reshape(-1)[:1].cpu()
        signal, noise = noise_level(scheduler, timestep)
        sample, output = self.sample.float(), self.output.float()
        prediction = prediction_of(scheduler) if output.shape == sample.shape else None
        if prediction == "epsilon":
            return (sample - noise * output) / signal
        if prediction == "v_prediction":
            # 1 if the scheduler preserves variance, as the definition of v does
            length: float = (signal**2 + noise**2) ** 0.5
            return signal / length**2 * sample - noise / length * output
        if prediction == "flow_prediction":
            return sample - noise * output
        if prediction == "sample":
            return output.clone()
        later = scheduler.timesteps.cpu()[_after(scheduler.timesteps, timestep) :]
        if not len(later):
            return None
        next_signal, next_noise = noise_level(scheduler, later[:1])
        determinant = next_noise * signal - noise * next_signal
        if abs(determinant) < ILL_CONDITIONED * max(noise, next_noise):
            return None
        return (next_noise * sample - noise * self.after.float()) / determinant


def noise_level(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    """The factors of image and noise in a sample at `timestep`, of shape (1,). Unsets the
    scheduler's step index: otherwise noise is that of the index, whatever the timestep."""
    for name in ("_step_index", "_begin_index"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, None)
    image, noise = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    if hasattr(scheduler, "scale_noise"):
        levels = scheduler.scale_noise(image, timestep, noise)
    else:
        levels = scheduler.add_noise(image, noise, timestep)
    return float(levels[0]), float(levels[1])


def prediction_of(scheduler: Any) -> str | None:
    """The kind of the model's output; None if only the scheduler knows."""
    if hasattr(scheduler, "precondition_outputs"):
        return None
    otherwise = "flow_prediction" if hasattr(scheduler, "scale_noise") else None
    prediction: str | None = scheduler.config.get("prediction_type", otherwise)
    return prediction


def _after(timesteps: torch.Tensor, timestep: torch.Tensor) -> int:
    """The index behind the last occurrence of a timestep; some schedulers have each twice."""
    equal = (timesteps.cpu() == timestep).nonzero()
    return int(equal[-1]) + 1 if len(equal) else len(timesteps)


class Progressing(Protocol):
    """The receiver of a view's progress: a job, or the jobs of one call."""

    @property
    def observed(self) -> bool: ...
    def check_step(self) -> None: ...
    def open(self, total: int) -> None: ...
    def advance(self, steps: int) -> None: ...
    def wants_latents(self) -> bool: ...
    def denoised(self, latents: Latents) -> None: ...


class Tap:
    """Passes a view's progress on to a job, with the latents of the steps that the job wants."""

    def __init__(self, view: Any, job: Progressing) -> None:
        self._job = job
        self._latents: Latents | None = None
        self._warned = False
        self._wrapped: list[Any] = []
        for part in pipelines_in(view):
            for scheduler in list(vars(part).values()):
                steps = hasattr(scheduler, "set_timesteps") and hasattr(type(scheduler), "step")
                if steps and "step" not in vars(scheduler):
                    self._wrap(scheduler)

    def end(self) -> None:
        """Remove the wrappers, which are in reference cycles."""
        for scheduler in self._wrapped:
            scheduler.__dict__.pop("step", None)
        self._wrapped.clear()

    def check_step(self) -> None:
        self._job.check_step()

    def open(self, total: int) -> None:
        self._job.open(total)

    def advance(self, steps: int) -> None:
        latents, self._latents = self._latents, None
        self._job.advance(steps)
        if latents is not None:
            self._job.denoised(latents)

    def _wrap(self, scheduler: Any) -> None:
        plain = type(scheduler).step
        signature = inspect.signature(plain)

        @functools.wraps(plain)  # pipelines read its signature
        def step(own: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain(own, *args, **kwargs)
            if own is scheduler and self._job.wants_latents():
                try:
                    self._take(own, signature.bind(own, *args, **kwargs).arguments, result[0])
                except Exception:
                    self._lost()
            return result

        # a method, since a deep copy of the scheduler must step the copy
        scheduler.__dict__["step"] = types.MethodType(step, scheduler)
        self._wrapped.append(scheduler)

    def _take(self, scheduler: Any, arguments: dict[str, Any], after: torch.Tensor) -> None:
        own = clone_scheduler(scheduler)
        own.__dict__.pop("step", None)
        names = ("sample", "model_output", "timestep")
        sample, output, timestep = (_copied(arguments[name]) for name in names)
        self._latents = Latents(sample, output, timestep, _copied(after), own)

    def _lost(self) -> None:
        if not self._warned:
            self._warned = True
            logger.exception("could not copy the latents of a step: no previews of it")


def _copied(timestep: Any) -> Any:
    return timestep.detach().clone() if isinstance(timestep, torch.Tensor) else timestep
