"""The step engine: runs many calls of one pipeline at once, in shared forwards."""

from stepweave.config.engine import EngineConfig, Mode
from stepweave.engine.engine import StepEngine
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
