"""What a device tells of its memory."""

from __future__ import annotations

import time
from typing import Protocol

import torch

RESERVED = 0.05  # of a GPU's memory, left to what is not measured
FRESH = 0.2  # seconds that a look at the device's memory is good for


class DeviceMemory(Protocol):
    """A device's memory, as far as it can be told."""

    def available(self) -> int | None:
        """Bytes that a forward may take; None if unknown."""

    def start(self) -> None:
        """Begin to measure."""

    def taken(self) -> int | None:
        """The most bytes taken at a time since `start`, beyond what was taken then; None if
        unknown."""

    def free(self) -> None:
        """Give unused memory back to the device."""

    def peak(self) -> int:
        """The most bytes ever taken; 0 if unknown."""


class UnknownMemory:
    """A device that cannot tell: a CPU shares its memory with everybody."""

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
    """A GPU's. Nothing here waits for it: torch's allocator counts when memory is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self._peak = 0
        self._looked = (-FRESH, 0)

    def available(self) -> int | None:
        now = time.monotonic()
        if now - self._looked[0] >= FRESH:
            free, total = torch.cuda.mem_get_info(self._device)
            taken = torch.cuda.memory_allocated(self._device)
            idle = torch.cuda.memory_reserved(self._device) - taken
            own = torch.cuda.get_per_process_memory_fraction(self._device) * total - taken
            self._looked = (now, max(0, int(min(free + idle, own) - RESERVED * total)))
        return self._looked[1]

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
