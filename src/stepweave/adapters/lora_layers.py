"""What a LoRA adds to one layer, as PEFT computes it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer, DoraLinearLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stepweave.compat.row_adapters import AdapterLayer, Scale
from stepweave.errors import LoadError

ADAPTER = "stepweave"  # the name by which PEFT's layers know the one adapter that they have

_LORA = (Linear, Conv1d, Conv2d, Conv3d)
_DORA = (DoraLinearLayer, DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer)


def adapter_layer(tuner: BaseTunerLayer, layer: nn.Module, device: torch.device) -> AdapterLayer:
    """What PEFT's layer `tuner` adds to the pipeline's `layer`, on `device`. Raises LoadError for a
    kind of adapter that is not known to act on each row by itself."""
    del tuner._modules["base_layer"]
    tuner.requires_grad_(False).eval()
    for weights in (*tuner.parameters(), *tuner.buffers()):
        weights.data = weights.data.to(device, copy=True)  # they are mapped from the file
    tuner.base_layer = layer
    if isinstance(tuner, LoKrLayer):
        return _LoKr(tuner)
    if not isinstance(tuner, _LORA):
        raise LoadError(f"it adapts a {type(layer).__name__}, which is not supported")
    if ADAPTER not in tuner.lora_variant:
        return _Lora(tuner)
    kinds = tuner._modules.get("lora_magnitude_vector", {})
    if ADAPTER in kinds and isinstance(kinds[ADAPTER], _DORA):
        return _Dora(tuner)
    raise LoadError(f"it is of the kind {type(tuner.lora_variant[ADAPTER]).__name__}")


class _Lora:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    by_row = True

    def __init__(self, tuner: Any) -> None:
        self._down, self._up = tuner.lora_A[ADAPTER], tuner.lora_B[ADAPTER]
        self._dtype = self._down.weight.dtype
        self._alpha, self._rank = tuner.lora_alpha[ADAPTER], tuner.r[ADAPTER]
        if tuner.use_rslora.get(ADAPTER, False):
            self._rank = math.sqrt(self._rank)

    def apply(self, x: torch.Tensor, result: torch.Tensor, scale: Scale) -> torch.Tensor:
        # in this order, so that the result is bitwise that of PEFT's layers
        scaling = scale * self._alpha / self._rank
        added: torch.Tensor = self._up(self._down(x.to(self._dtype))) * scaling
        return result + added


class _Scaled:
    """An adapter whose part is not proportional to its scale."""

    by_row = False

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner

    def _scaled(self, scale: Scale) -> Any:
        """PEFT's layer at this scale; it shares everything else."""
        tuner = copy.copy(self._tuner)
        tuner.scaling = dict(self._tuner.scaling)
        tuner.set_scale(ADAPTER, scale)
        return tuner


class _Dora(_Scaled):
    """Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353)."""

    def apply(self, x: torch.Tensor, result: torch.Tensor, scale: Scale) -> torch.Tensor:
        tuner = self._scaled(scale)
        x = x.to(tuner.lora_A[ADAPTER].weight.dtype)
        adapted: torch.Tensor = tuner.lora_variant[ADAPTER].forward(
            tuner, active_adapter=ADAPTER, x=x, result=result
        )
        return adapted


class _LoKr(_Scaled):
    """Adaptation by Kronecker products (Yeh et al. 2023, arXiv:2309.14859)."""

    def apply(self, x: torch.Tensor, result: torch.Tensor, scale: Scale) -> torch.Tensor:
        added: torch.Tensor = self._scaled(scale)._get_delta_activations(ADAPTER, x)
        return result + added
