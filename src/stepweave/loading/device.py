"""Where the model runs and in which precision."""

from __future__ import annotations

import torch
from loky import cpu_count

from stepweave.config import Settings
from stepweave.errors import LoadError


def choose_device(settings: Settings) -> torch.device:
    """The device asked for, or for `auto` the first GPU and else the CPU. Raises LoadError for one
    that is not there."""
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
    """The dtype asked for, or for `auto` float32 on a CPU and the best half precision of a GPU."""
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
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.float16


def set_cpu_threads(settings: Settings) -> int:
    """Bound torch's threads by the cgroup's CPU quota and the affinity mask, which torch does not
    look at itself.

    With more threads than quota a container is throttled in bursts: loky reads `cpu.max` (cgroup
    v2) and `cpu.cfs_quota_us` (v1). Returns the number set.
    """
    threads = settings.cpu_threads or cpu_count()
    torch.set_num_threads(threads)
    return int(threads)
