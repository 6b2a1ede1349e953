"""What encoders gave for inputs that were seen before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from stepweave.batching.call import Call
from stepweave.batching.fingerprints import Fingerprints
from stepweave.compat.nested import cloned, tensors


class EncoderCache:
    """A least-recently-used cache of encoders' results, bounded in bytes, keyed by every input
    exactly."""

    def __init__(self, digests: Fingerprints, max_bytes: int) -> None:
        self._digests = digests
        self._max_bytes = max_bytes
        self._results: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def key(self, call: Call) -> Hashable | None:
        """None for a call that cannot be remembered."""
        exact = call.group.layout and not (call.opaque or call.holds)
        if not (self._max_bytes and call.target.cached and exact):
            return None
        leaves = [tuple(self._value(item) for item in leaf) for leaf in call.leaves]
        return (call.key, call.ragged, tuple(leaves))

    def _value(self, item: Any) -> Hashable:
        if isinstance(item, torch.Tensor):
            return self._digests.of(item), item.shape
        return type(item), item

    def get(self, key: Hashable) -> Any:
        """A copy of the result, or None."""
        found = self._results.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._results.move_to_end(key)
        return cloned(found[0])

    def put(self, key: Hashable, output: Any) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(output))
        if key in self._results or size > self._max_bytes:
            return
        self._results[key] = (cloned(output), size)
        self.bytes += size
        while self.bytes > self._max_bytes:
            self.bytes -= self._results.popitem(last=False)[1][1]

    def clear(self) -> int:
        """Forget everything; how many bytes that was."""
        held, self.bytes = self.bytes, 0
        self._results.clear()
        return held
