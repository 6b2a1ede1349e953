"""Which calls share the next forward. Pure Python without torch: the engine and the simulator
(`benchmarks/simulate.py`) run the same code."""

from stepweave.scheduling.policy import Policy, WasteAwareSRPT, srpt

__all__ = ["Policy", "WasteAwareSRPT", "srpt"]
