"""How torch says that memory ran out."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size

# besides what accelerate knows
_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, as torch says it for each device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    try:
        return should_reduce_batch_size(error) or any(words in str(error) for words in _WORDS)
    except BaseException:  # an error of somebody's own, which cannot even say what it is
        return False
