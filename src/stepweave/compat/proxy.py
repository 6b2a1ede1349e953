"""Transparent proxies."""

from __future__ import annotations

import copy
from typing import Any

import wrapt


class Proxy(wrapt.ObjectProxy[Any]):
    """Stands in front of an object that requests share. A copy, or what is unpickled, is of that
    object, without the proxy."""

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a lock does not pickle; the copy is another process's
        return self.__wrapped__.__reduce_ex__(protocol)
