"""The step engine: many calls of one pipeline at once, sharing forwards at every denoising step."""

from stepweave.engine.engine import EngineStats, Mode, StepEngine
from stepweave.engine.job import Job, Observer, Progress
from stepweave.previews.latents import Latents

__all__ = ["EngineStats", "Job", "Latents", "Mode", "Observer", "Progress", "StepEngine"]
