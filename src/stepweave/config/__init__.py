"""Settings from the environment, presets of models, and the engine's configuration."""

from stepweave.config.groups import GROUPS
from stepweave.config.settings import EMBEDDED_MODEL, PREFIX, Settings, removed_settings
from stepweave.config.values import Quantization

__all__ = ["EMBEDDED_MODEL", "GROUPS", "PREFIX", "Quantization", "Settings", "removed_settings"]
