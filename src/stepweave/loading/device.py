"""Chooses the device and the precision of the model."""

from __future__ import annotations

import torch
from loky import cpu_count

from stepweave.config import Settings
from stepweave.errors import LoadError


def choose_device(settings: Settings) -> torch.device:
    """The device of the settings; for `auto` the first GPU, or the CPU. Raises LoadError if it does
    not exist."""
    if settings.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(settings.device)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise LoadError(
                f"STEPWEAVE_DEVICE={settings.device!r}: this machine has {count} CUDA devices"
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise LoadError("STEPWEAVE_DEVICE='mps': this machine has no Metal GPU")
    return device


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype of the settings; for `auto` float32 on a CPU, the best half precision on a GPU."""
    if settings.dtype != "auto":
        if settings.dtype == "float16" and device.type == "cpu":
            raise LoadError(
                "STEPWEAVE_DTYPE='float16': diffusers pipelines do not run in float16 on a CPU"
            )
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float16
    return torch.float16


def set_cpu_threads(settings: Settings) -> int:
    """Limit torch's threads to the cgroup's CPU quota (cgroup v2 `cpu.max`, v1 `cpu.cfs_quota_us`)
    and the affinity mask: with more, a container is throttled in bursts. Returns their number."""
    threads = settings.cpu_threads or cpu_count()
    torch.set_num_threads(threads)
    return int(threads)
