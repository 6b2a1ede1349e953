"""Recognises out-of-memory errors."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size

# besides those that accelerate recognises
_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException | None) -> bool:
    """Whether an error means that memory ran out, on any of torch's devices."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    try:
        return should_reduce_batch_size(error) or any(words in str(error) for words in _WORDS)
    except BaseException:  # a foreign error whose `str` raises
        return False
