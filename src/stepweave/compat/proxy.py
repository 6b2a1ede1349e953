"""The base of proxies for shared objects."""

from __future__ import annotations

import copy
from typing import Any

import wrapt


class Proxy(wrapt.ObjectProxy[Any]):
    """A transparent proxy of an object that requests share. Copying or pickling it gives a copy of
    that object, without the proxy."""

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a lock cannot be pickled, and another process needs none
        return self.__wrapped__.__reduce_ex__(protocol)
