"""Used and free memory of a device."""

from __future__ import annotations

import time
from typing import Protocol

import torch

RESERVED = 0.05  # share of a GPU's memory that is not used, for what is not measured
FRESH = 0.2  # seconds for which a measurement of free memory is used


class DeviceMemory(Protocol):
    """Measures a device's memory."""

    def available(self) -> int | None:
        """Bytes that a forward may use; None if unknown."""

    def start(self) -> None:
        """Start to measure."""

    def taken(self) -> int | None:
        """The largest number of bytes allocated since `start`, less those allocated then; None if
        unknown."""

    def free(self) -> None:
        """Release cached memory to the device."""

    def peak(self) -> int:
        """The largest number of bytes ever allocated; 0 if unknown."""


class UnknownMemory:
    """Memory that is not measured, such as a CPU's, which is shared with other processes."""

    def available(self) -> int | None:
        return None

    def start(self) -> None:
        pass

    def taken(self) -> int | None:
        return None

    def free(self) -> None:
        pass

    def peak(self) -> int:
        return 0


class CudaMemory:
    """A GPU's memory, by torch's allocator, so nothing here waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self._peak = 0
        self._measured = (-FRESH, 0)  # time, and bytes available

    def available(self) -> int | None:
        now = time.monotonic()
        if now - self._measured[0] >= FRESH:
            free, total = torch.cuda.mem_get_info(self._device)
            taken = torch.cuda.memory_allocated(self._device)
            idle = torch.cuda.memory_reserved(self._device) - taken
            own = torch.cuda.get_per_process_memory_fraction(self._device) * total - taken
            self._measured = (now, max(0, int(min(free + idle, own) - RESERVED * total)))
        return self._measured[1]

    def start(self) -> None:
        self._peak = self.peak()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._base = torch.cuda.memory_allocated(self._device)

    def taken(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) - self._base

    def free(self) -> None:
        torch.cuda.empty_cache()

    def peak(self) -> int:
        return max(self._peak, torch.cuda.max_memory_allocated(self._device))


def memory_of(device: torch.device) -> DeviceMemory:
    return CudaMemory(device) if device.type == "cuda" else UnknownMemory()
