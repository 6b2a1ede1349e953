"""The configuration of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal, TypedDict, get_args

Mode = Literal["off", "threads", "request", "step"]


class EngineLimits(TypedDict, total=False):
    """Keyword-only arguments of `StepEngine`, which become an `EngineConfig`."""

    max_decode_rows: int
    max_jobs: int
    threads: int
    cache_bytes: int
    audit_every: int
    knee: bool
    beside: Mapping[str, Any]
    loras: Any


@dataclass(frozen=True)
class EngineConfig:
    """The checked arguments of `StepEngine`. Raises ValueError and TypeError.

    Args:
        mode: `step` batches single forwards; `request` whole calls of the pipeline that differ
            only in prompts and generators; `threads` runs calls in parallel; `off` one at a time.
        max_rows: largest batch of a forward (in mode `request`, images of a batch); an image
            counts 1, with guidance 2.
        max_decode_rows: largest batch of the autoencoder, which needs more memory per row.
        max_jobs: concurrent jobs in mode `step`.
        threads: concurrent calls in mode `threads`.
        cache_bytes: size of the cache of text and image encoders' results; 0 turns it off. Close
            the engine before you change an encoder's weights.
        audit_every: 1 in so many merged forwards is compared with single ones.
        knee: whether a policy that uses the knee, as the default, limits batches to it: beyond it,
            more rows raise the throughput by less than 5 %.
        beside: modules that the engine's pipeline does not have, but other pipelines that jobs
            call, such as ControlNets; by names that are no attributes of the pipeline.
        loras: the adapters that jobs may name, a `stepweave.Loras`; None for none.
    """

    mode: Mode = "step"
    max_rows: int = 32
    max_decode_rows: int = 4
    max_jobs: int = 64
    threads: int = 4
    cache_bytes: int = 256 * 2**20
    audit_every: int = 1000
    knee: bool = True
    beside: Mapping[str, Any] = field(default_factory=dict)
    loras: Any = None

    def __post_init__(self) -> None:
        modes = get_args(Mode)
        if self.mode not in modes:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(modes)}")
        others = ("mode", "knee", "beside", "loras")
        for name in (each.name for each in fields(self) if each.name not in others):
            value, least = getattr(self, name), 0 if name == "cache_bytes" else 1
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} is {value!r}; it must be a whole number")
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
