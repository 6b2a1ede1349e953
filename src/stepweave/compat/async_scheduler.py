"""Copies of schedulers for single requests."""

from __future__ import annotations

import copy
from typing import Any

import torch
import wrapt
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from stepweave.compat.isolation import Isolation


def clone_scheduler(scheduler: Any) -> Any:
    """A copy of a scheduler (or of the one in a proxy) with its state, sharing only its config."""
    inner = scheduler.__wrapped__ if isinstance(scheduler, wrapt.ObjectProxy) else scheduler
    return Isolation().value(inner, type(inner).__name__)


class BaseAsyncScheduler(wrapt.ObjectProxy[Any]):
    """A transparent proxy of a scheduler that makes copies for requests.

    It has all attributes of the scheduler, passes `isinstance` for its class, and can be copied and
    pickled.

    >>> scheduler = BaseAsyncScheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    >>> own = scheduler.clone_for_request(20)
    >>> len(own.timesteps), own.scheduler is scheduler.scheduler
    (20, False)
    """

    def __init__(self, scheduler: Any) -> None:
        if not isinstance(scheduler, SchedulerMixin):
            raise TypeError(f"expected a diffusers scheduler, got {type(scheduler).__name__}")
        super().__init__(
            scheduler.__wrapped__ if isinstance(scheduler, BaseAsyncScheduler) else scheduler
        )

    @property
    def scheduler(self) -> Any:
        """The wrapped scheduler."""
        return self.__wrapped__

    def clone_for_request(
        self, num_inference_steps: int, device: str | torch.device | None = None, **kwargs: Any
    ) -> BaseAsyncScheduler:
        """Return a proxy of a copy, and set its timesteps.

        `kwargs` are passed to the scheduler's `set_timesteps` (dynamic shifting needs `mu`), which
        raises TypeError or ValueError for wrong ones.
        """
        clone = clone_scheduler(self)
        clone.set_timesteps(num_inference_steps, device=device, **kwargs)
        return BaseAsyncScheduler(clone)

    def __repr__(self) -> str:
        # PNDM and others have none before set_timesteps
        timesteps = getattr(self.__wrapped__, "timesteps", None)
        count = 0 if timesteps is None else len(timesteps)
        return f"BaseAsyncScheduler({type(self.__wrapped__).__name__}, {count} timesteps)"

    __str__ = __repr__

    def __copy__(self) -> BaseAsyncScheduler:
        return BaseAsyncScheduler(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseAsyncScheduler:
        return BaseAsyncScheduler(copy.deepcopy(self.__wrapped__, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[type[BaseAsyncScheduler], tuple[Any]]:
        return BaseAsyncScheduler, (self.__wrapped__,)

    def __reduce__(self) -> tuple[type[BaseAsyncScheduler], tuple[Any]]:
        return self.__reduce_ex__(2)


def async_retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
    return_scheduler: bool = False,
    **kwargs: Any,
) -> Any:
    """diffusers' `retrieve_timesteps`, on the given scheduler or on a copy.

    Without `return_scheduler` exactly diffusers' function: sets the timesteps of `scheduler` and
    returns (timesteps, number of steps). With it, sets those of a copy and returns (timesteps,
    number of steps, copy); `scheduler` is not changed.

    >>> timesteps, n, own = async_retrieve_timesteps(pipeline.scheduler, 20, return_scheduler=True)
    """
    own = clone_scheduler(scheduler) if return_scheduler else scheduler
    if return_scheduler and isinstance(scheduler, BaseAsyncScheduler):
        own = BaseAsyncScheduler(own)
    steps = retrieve_timesteps(own, num_inference_steps, device, timesteps, sigmas, **kwargs)
    return (*steps, own) if return_scheduler else steps
