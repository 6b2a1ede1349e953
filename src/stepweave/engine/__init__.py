"""The step engine: many calls of one pipeline at once, sharing forwards at every denoising step."""

from stepweave.engine.engine import EngineStats, Mode, StepEngine
from stepweave.engine.job import Job, Progress

__all__ = ["EngineStats", "Job", "Mode", "Progress", "StepEngine"]
