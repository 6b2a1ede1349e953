"""The numbers by which an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral
from typing import Literal, TypedDict, get_args

Mode = Literal["off", "threads", "request", "step"]


class EngineLimits(TypedDict, total=False):
    """What `StepEngine` takes of `EngineConfig` by name only."""

    max_decode_rows: int
    max_jobs: int
    threads: int
    cache_bytes: int
    audit_every: int
    knee: bool


@dataclass(frozen=True)
class EngineConfig:
    """What `StepEngine` takes by name, checked. Raises ValueError.

    Args:
        mode: `step` shares single forwards; `request` puts calls that differ in prompts and
            generators only into one call of the pipeline; `threads` runs calls side by side; `off`
            one at a time.
        max_rows: rows of a shared forward (in mode `request`, images of a shared call); a call with
            guidance has two for each image.
        max_decode_rows: rows of a shared forward of the autoencoder, which needs more memory for
            each.
        max_jobs: jobs that run at a time in mode `step`; more wait.
        threads: calls at a time in mode `threads`.
        cache_bytes: bound of the remembered results of text and image encoders; 0 remembers none.
            Close the engine before you change an encoder's weights.
        audit_every: one in so many merged forwards is compared with the single ones.
        knee: with a policy that cuts at the knee, as the default does, forwards have no more rows
            than pay: beyond the knee they bring less than 5 % more a second.
    """

    mode: Mode = "step"
    max_rows: int = 32
    max_decode_rows: int = 4
    max_jobs: int = 64
    threads: int = 4
    cache_bytes: int = 256 * 2**20
    audit_every: int = 1000
    knee: bool = True

    def __post_init__(self) -> None:
        modes = get_args(Mode)
        if self.mode not in modes:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(modes)}")
        for name in (field.name for field in fields(self) if field.name not in ("mode", "knee")):
            value, least = getattr(self, name), 0 if name == "cache_bytes" else 1
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} is {value!r}; it must be a whole number")
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
