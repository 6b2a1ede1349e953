"""The step engine: many calls of one pipeline at once, sharing forwards at every denoising step."""

from stepweave.engine.engine import StepEngine
from stepweave.engine_config import EngineConfig, Mode
from stepweave.jobs.job import Job, Observer, Progress
from stepweave.planning.stats import EngineStats
from stepweave.previews.latents import Latents

__all__ = [
    "EngineConfig",
    "EngineStats",
    "Job",
    "Latents",
    "Mode",
    "Observer",
    "Progress",
    "StepEngine",
]
