"""Equal tensors, told by digests of their bytes."""

from __future__ import annotations

import copy
import hashlib
import logging
import weakref
import zlib
from collections.abc import Iterable, MutableMapping
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

QUICK = 4096  # elements that are looked at again each time, on the CPU
SIZE = 16  # bytes of a digest: two different tensors in 2^64 share one


class Fingerprints:
    """Fingerprints of tensors, each computed once, and again when `_version` tells that the tensor
    was written to.

    Reading a tensor's bytes waits for a GPU; looking a digest up does not.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, bytes, int | None]] = {}
        self.computed = 0
        self._trusted = True

    def of(self, tensor: torch.Tensor) -> bytes:
        """Equal for tensors of equal dtype, shape and bytes, except that rows which all are the
        same count as one.

        So a constant that two jobs carry in different numbers of rows is the same constant.
        """
        # such tensors do not say when they are written to
        if not self._trusted or tensor.is_inference():
            self.computed += 1
            return _digest(tensor)
        known = self._known.get(id(tensor))
        check = _check(tensor)
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            if known[3] == check:
                return known[2]
        self.computed += 1
        digest = _digest(tensor)
        self._remember(tensor, digest, check)
        return digest

    def note(self, tensor: torch.Tensor, digest: bytes) -> None:
        """Remember the digest of a tensor on a device, that of the tensor on the CPU which it was
        copied from."""
        if not tensor.is_inference():
            self._remember(tensor, digest, _check(tensor))

    def _remember(self, tensor: torch.Tensor, digest: bytes, check: int | None) -> None:
        key = id(tensor)
        reference = weakref.ref(tensor, lambda _: self._known.pop(key, None))
        self._known[key] = (reference, tensor._version, digest, check)

    def recheck(self, tensors: Iterable[torch.Tensor]) -> None:
        """Read tensors again whose digests are remembered. If one has changed meanwhile, none is
        remembered any more: something writes past the versions, as `.data` does. Waits for the
        device."""
        for tensor in tensors:
            known = self._known.get(id(tensor))
            if known is None or known[0]() is not tensor or known[1] != tensor._version:
                continue
            if known[2] != _digest(tensor):
                self._trusted = False
                self._known.clear()
                logger.warning(
                    "an argument was written to past its version; arguments are read at every step "
                    "from now on"
                )
                return


class TokenIds(torch.Tensor):
    """Token ids, or their mask, on the CPU. What `to` brings to a device need not be read back to
    be told from others."""

    digests: Fingerprints
    # all that is made of them are plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        moved = torch.Tensor.to(plain, *args, **kwargs)
        if moved.device.type != "cpu":
            self.digests.note(moved, _digest(plain.to(moved.dtype)))
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.as_subclass(torch.Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def followed(output: Any, digests: Fingerprints) -> Any:
    """A tokenizer's output, with tensors that `digests` knows once they are on a device."""
    if isinstance(output, MutableMapping):
        for name, value in output.items():
            output[name] = followed(value, digests)
    elif type(output) is torch.Tensor and output.device.type == "cpu":
        output = output.as_subclass(TokenIds)
        output.digests = digests
    return output


def _check(tensor: torch.Tensor) -> int | None:
    """A quick look at a tensor's bytes, where that waits for no device: `.data`, numpy and the like
    write past its version."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return None
    if tensor.numel() > QUICK:
        step = tensor.numel() // QUICK
        if tensor.is_contiguous():
            flat = tensor.detach().reshape(-1)[::step]
        else:  # to flatten it would copy all of it
            flat = tensor.detach()[
                torch.unravel_index(torch.arange(0, tensor.numel(), step), tensor.shape)
            ]
    else:
        flat = tensor.detach().reshape(-1)
    return zlib.crc32(_bytes(flat).data)


def _digest(tensor: torch.Tensor) -> bytes:
    flat = _bytes(tensor.detach().cpu())
    rows = tensor.shape[0] if tensor.ndim else 1
    table = flat.reshape(rows, -1) if rows else flat.reshape(0, 0)
    if rows > 1 and np.array_equal(table, np.broadcast_to(table[:1], table.shape)):
        table = table[:1]
    hasher = hashlib.blake2b(digest_size=SIZE)
    hasher.update(repr((tensor.dtype, len(table), tuple(tensor.shape[1:]))).encode())
    hasher.update(np.ascontiguousarray(table).data)
    return hasher.digest()


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    # a clone, since contiguous() leaves a stride of 0 to a dimension of size 1, which view refuses
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy()
