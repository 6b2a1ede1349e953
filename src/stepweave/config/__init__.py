"""The server's settings, from the environment; the presets of models that they may name."""

from stepweave.config.settings import EMBEDDED_MODEL, PREFIX, Settings, removed_settings
from stepweave.config.values import Quantization

__all__ = ["EMBEDDED_MODEL", "PREFIX", "Quantization", "Settings", "removed_settings"]
