"""Group keys of calls, as an engine makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stepweave.batching.call import Call, Target
from stepweave.batching.fingerprints import Fingerprints
from stepweave.batching.layout import LayoutReader
from stepweave.compat import torch_state as ambient
from tests.support.toy import module

Tensor = torch.Tensor


def anything(self: nn.Module, x: Any, timestep: Any = None, **others: Any) -> Any: ...


def target_of(forward: Callable[..., Any]) -> Target:
    one = module(forward)
    return Target("denoiser", one, one.forward)


class Describing:
    """Describes calls of one target, as an engine does."""

    def __init__(self, forward: Callable[..., Any] = anything) -> None:
        self.digests = Fingerprints()
        self.target = target_of(forward)
        self._reader = LayoutReader(self.digests)

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        call = Call(self.target, args, kwargs, ambient.quiet(("cpu",)))
        return self._reader.read(call)


def rows(*values: float, width: int = 2) -> Tensor:
    """One row for each value."""
    return torch.tensor(values).reshape(-1, 1).expand(-1, width).clone()
