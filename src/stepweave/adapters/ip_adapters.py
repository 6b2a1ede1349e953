"""IP-Adapters (Ye et al. 2023, arXiv:2308.06721) beside a model: a UNet with the model's own
weights and the adapter's, whose scale and mask each row of a batch has for itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from stepweave.errors import LoadError
from stepweave.loading.checkpoint import read_header
from stepweave.reasons import reason_of

_PARTS = ("image_proj", "ip_adapter")


def is_ip_adapter(file: Path) -> bool:
    """Whether a safetensors file has the weights of an IP-Adapter."""
    try:
        shapes, _ = read_header(file)
    except LoadError:
        return False
    return {name.partition(".")[0] for name in shapes} == set(_PARTS)


def read_ip_adapter(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an IP-Adapter, in its two parts. Raises LoadError."""
    read_header(file)  # which says how a file that cannot be read is damaged
    found: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in load_file(file).items():
        part, _, name = key.partition(".")
        if part not in found:
            raise LoadError(
                f"{file.name} has {key}, which is not of an IP-Adapter: its tensors are "
                "image_proj. and ip_adapter."
            )
        found[part][name] = tensor
    for part, tensors in found.items():
        if not tensors:
            raise LoadError(f"{file.name} has no {part}. tensors: it is no IP-Adapter")
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise LoadError(f"{file.name}: {part}.{name} has numbers that are not finite")
    if any("_lora." in name for name in found["ip_adapter"]):
        raise LoadError(f"{file.name} is a Face ID adapter with LoRA weights, which is not served")
    return found


def adapted(unet: Any, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> nn.Module:
    """A UNet that shares all weights of `unet`, which stays as it is, and has an IP-Adapter.

    Raises LoadError if the adapter is for another model.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise LoadError("IP-Adapters are served for pipelines with a UNet (Stable Diffusion, XL)")
    others = {type(one) for one in unet.attn_processors.values()} - {
        AttnProcessor,
        AttnProcessor2_0,
    }
    if others:
        names = ", ".join(sorted(one.__name__ for one in others))
        raise LoadError(f"the UNet has attention processors of its own already ({names})")
    tensors = [*unet.parameters(), *unet.buffers()]
    twin: Any = copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})
    try:
        twin._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    except KeyError as error:
        raise LoadError(f"it lacks {reason_of(error)}: it is for another model") from None
    except (RuntimeError, ValueError) as error:
        raise LoadError(f"it does not fit this model: {reason_of(error)}") from None
    for part in twin.modules():
        if isinstance(getattr(part, "processor", None), IPAdapterAttnProcessor2_0):
            part.processor.__class__ = RowScaled
    return twin.requires_grad_(False).eval()  # type: ignore[no-any-return]


class RowScaled(IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """An IP-Adapter's attention whose scale is an argument, one for each row. It comes as
    `ip_adapter_masks`, which diffusers passes to all processors: a tensor of scales [rows, 1, 1],
    and one of masks [rows, 1, height, width] if there are any."""

    def __call__(self, *args: Any, ip_adapter_masks: Any = None, **kwargs: Any) -> Any:
        if ip_adapter_masks is None:
            return super().__call__(*args, **kwargs)
        scales, *masks = ip_adapter_masks
        own = copy.copy(self)  # shares the weights
        own.scale = [_RowScale(scales)]
        call = IPAdapterAttnProcessor2_0.__call__
        return call(own, *args, ip_adapter_masks=masks or None, **kwargs)


class _RowScale:
    """A number for each row, as diffusers' processor uses it: it is compared with 0, and multiplies
    a tensor of rows."""

    def __init__(self, scales: torch.Tensor) -> None:
        self._scales = scales

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return False

    def __mul__(self, rows: torch.Tensor) -> torch.Tensor:
        return (self._scales.to(rows.device) * rows).to(rows.dtype)


def attention_arguments(
    scale: float,
    mask: Image.Image | None,
    size: tuple[int, int],
    rows: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The `cross_attention_kwargs` of a call with a RowScaled UNet. `size` is that of the result in
    pixels, `rows` those of its batch, with guidance; `mask` is white where the adapter acts."""
    found = [torch.full((rows, 1, 1), scale, device=device)]
    if mask is not None:
        width, height = size
        made = IPAdapterMaskProcessor().preprocess([mask.convert("L")], height=height, width=width)
        found.append(made.reshape(1, 1, height, width).expand(rows, -1, -1, -1).to(device))
    return {"ip_adapter_masks": found}
