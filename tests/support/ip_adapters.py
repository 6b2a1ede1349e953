"""Directories of IP-Adapters, as published ones are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILE = "ip-adapter.safetensors"


def save_ip_adapter(
    weights: Mapping[str, Mapping[str, torch.Tensor]], image_encoder: Any, folder: Path
) -> None:
    """Write the weights of an IP-Adapter, in its two parts, and its image encoder."""
    image_encoder.save_pretrained(folder / "image_encoder")
    tensors = {}
    for part, named in weights.items():
        tensors |= {f"{part}.{name}": tensor for name, tensor in named.items()}
    save_file(tensors, folder / FILE)


def load_ip_adapter(pipeline: Any, folder: Path) -> None:
    """Load it as diffusers does."""
    pipeline.load_ip_adapter(str(folder), subfolder="", weight_name=FILE)
